#!/usr/bin/env bash
# Measure checkpoints:  slurm/submit launch/evaluate.sh checkpoint=<checkpoint, run or glob> [words]
# Prompts are shared out over the ranks; what is measured already is skipped. A 70B in 16 bits takes
# 132 GiB of each rank's GPU: an H200 each, or generate=server.
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=06:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
exec "${SLURM_SUBMIT_DIR:?submit this by slurm/submit launch/evaluate.sh}/slurm/run" evaluate "$@"
