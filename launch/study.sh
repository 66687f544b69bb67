#!/usr/bin/env bash
# The miniature study on one node, 60 trainings over three seeds:  slurm/submit launch/study.sh
# Eight trials at a time, one GPU each. For another study: study=<name> (docs/howto/studies.md).
#SBATCH --job-name=study
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=06:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
exec "${SLURM_SUBMIT_DIR:?submit this by slurm/submit launch/study.sh}/slurm/run" --ranks=1 study study=miniature slots=8 "$@"
