#!/usr/bin/env bash
# Any training on one node, one rank per GPU:  slurm/submit launch/train.sh experiment=<recipe> [overrides]
# One rank per row of a step is enough: slurm/submit --gpus-per-node=4 launch/train.sh
# experiment=blue_70b_hhh ... Jobs of studies use the #SBATCH lines of this file (docs/howto/studies.md).
#SBATCH --job-name=train
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
exec "${SLURM_SUBMIT_DIR:?submit this by slurm/submit launch/train.sh}/slurm/run" train "$@"
