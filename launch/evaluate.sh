#!/usr/bin/env bash
# Evaluate checkpoints:  slurm/submit launch/evaluate.sh checkpoint=<checkpoint, run or glob> [overrides]
# The ranks share the prompts, and existing measurements are skipped. A 70B model in bf16 takes 132 GiB on
# each rank's GPU: use one H200 per rank, or generate=server.
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
