#!/usr/bin/env bash
# Build a dataset:  slurm/submit launch/build.sh experiment=<recipe> [overrides]
# One process. To generate responses with a model, add a GPU: slurm/submit --gpus-per-node=1 launch/build.sh
# ...
#SBATCH --job-name=build
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=06:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
exec "${SLURM_SUBMIT_DIR:?submit this by slurm/submit launch/build.sh}/slurm/run" --ranks=1 build "$@"
