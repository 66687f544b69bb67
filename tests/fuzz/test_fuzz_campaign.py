"""No file, directory or response that others have made ends a command in a traceback, a hang or without memory.

pytest -m slow tests/fuzz/test_fuzz_campaign.py -s    2,000 cases by seed; prints their time and memory
"""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests import built_once
from tests.fuzz.inputs import make_files, make_inputs
from tests.fuzz.kinds import KINDS
from tests.fuzz.running import outcomes

pytestmark = pytest.mark.e2e

# Cases of CI by seed: those that end before a model is loaded.
SAMPLE = {
    "model": (0, 3, 4, 6, 8, 15, 17, 18, 26, 31, 37, 44, 45, 49, 51, 55),
    "data": (12, 13, 14, 20, 21, 24),
}


def check(inputs: Path, kind: str, seeds: Sequence[int]) -> None:
    """Fail with every case that did what no input may cause."""
    failed, seconds, memory = [], 0.0, 0
    for outcome in outcomes(inputs, kind, seeds):
        seconds, memory = seconds + outcome.seconds, max(memory, outcome.mebibytes)
        if outcome.fault:
            failed.append(f"{outcome}\n{outcome.output[-2000:]}")
    print(f"\n{kind}: {len(seeds)} cases, {seconds:.0f} s of a processor, {memory} MiB at most")
    assert not failed, f"{len(failed)} of {len(seeds)} cases of {kind}:\n" + "\n\n".join(failed[:10])


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_sample_ends_with_a_status_and_a_line(kind: str) -> None:
    check(built_once.once("fuzz/files", make_files), kind, SAMPLE[kind])


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", KINDS)
def test_every_case_ends_with_a_status_and_a_line(kind: str) -> None:
    _, cases, _ = KINDS[kind]
    check(built_once.once("fuzz/inputs", make_inputs), kind, range(cases))
