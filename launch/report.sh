#!/usr/bin/env bash
# Tables and figures:  slurm/submit launch/report.sh grid='runs/red_70b*' [overrides]
# Reads files for a few seconds. Needs no GPU, so SBATCH_PARTITION may be a CPU partition.
#SBATCH --job-name=report
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=00:30:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
exec "${SLURM_SUBMIT_DIR:?submit this by slurm/submit launch/report.sh}/slurm/run" --ranks=1 report "$@"
