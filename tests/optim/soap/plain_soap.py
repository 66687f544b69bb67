"""SOAP written out in NumPy and fp64 from its published semantics, for tests to compare with.

It avoids all shortcuts: M is rotated back and forth in every step, V is permuted with the sorted
columns, and Q^T L Q is formed in full.
"""

from typing import Any

import numpy as np

DEFAULTS: dict[str, Any] = {
    "lr": 3e-3, "betas": (0.95, 0.95), "shampoo_beta": -1.0, "eps": 1e-8, "weight_decay": 0.01,
    "precondition_frequency": 10, "max_precond_dim": 10000,
}  # fmt: skip


def gradients(steps: int, rows: int, columns: int, seed: int) -> np.ndarray:
    """Gradients [steps, rows, columns] fp32 with fixed covariances and a slowly turning mean."""
    rng = np.random.default_rng(seed)

    def shaping(size: int) -> np.ndarray:
        basis = np.linalg.qr(rng.standard_normal((size, size)))[0]
        return basis * np.geomspace(1, 0.1, size) @ basis.T

    left, right = shaping(rows), shaping(columns)
    here, there = rng.standard_normal((2, rows, columns))
    return np.stack([
        left @ (rng.standard_normal((rows, columns)) + np.cos(t / 9) * here + np.sin(t / 9) * there)
        @ right for t in range(steps)
    ]).astype(np.float32)  # fmt: skip


def basis(factor: np.ndarray | None) -> np.ndarray | None:
    return None if factor is None else np.linalg.eigh(factor)[1][:, ::-1].copy()


def turn(a: np.ndarray, left: np.ndarray | None, right: np.ndarray | None) -> np.ndarray:
    a = a if left is None else left.T @ a
    return a if right is None else a @ right


def turn_back(a: np.ndarray, left: np.ndarray | None, right: np.ndarray | None) -> np.ndarray:
    a = a if left is None else left @ a
    return a if right is None else a @ right.T


def plain_step(
    weight: np.ndarray, grad: np.ndarray, state: dict[str, Any], **options: Any
) -> tuple[np.ndarray, dict[str, Any]]:
    """The weight and the state after one call; an empty state makes it the first."""
    o = {**DEFAULTS, **options}
    first, second = o["betas"]
    bs = o["shampoo_beta"] if o["shampoo_beta"] >= 0 else second
    g, limit = grad.astype(np.float64), o["max_precond_dim"]
    matrix = g.ndim == 2
    if not state:
        left = (1 - bs) * g @ g.T if matrix and g.shape[0] <= limit else None
        right = (1 - bs) * g.T @ g if matrix and g.shape[1] <= limit else None
        return weight, {
            "step": 0, "M": np.zeros_like(g), "V": np.zeros_like(g),
            "L": left, "R": right, "QL": basis(left), "QR": basis(right),
        }  # fmt: skip
    s = dict(state)
    s["step"] += 1
    turned = turn(g, s["QL"], s["QR"])
    s["M"] = first * s["M"] + (1 - first) * turned
    s["V"] = second * s["V"] + (1 - second) * turned**2
    size = o["lr"] * np.sqrt(1 - second ** s["step"]) / (1 - first ** s["step"])
    weight = weight - size * turn_back(s["M"] / (np.sqrt(s["V"]) + o["eps"]), s["QL"], s["QR"])
    weight = weight - o["lr"] * o["weight_decay"] * weight
    original = turn_back(s["M"], s["QL"], s["QR"])
    for side, (factor, q) in enumerate((("L", "QL"), ("R", "QR"))):
        if s[factor] is None:
            continue
        s[factor] = bs * s[factor] + (1 - bs) * (g @ g.T if side == 0 else g.T @ g)
        if s["step"] % o["precondition_frequency"] == 0:
            order = np.argsort(-np.diag(s[q].T @ s[factor] @ s[q]), kind="stable")
            s["V"] = np.take(s["V"], order, axis=side)
            s[q] = np.linalg.qr(s[factor] @ s[q][:, order])[0]
    s["M"] = turn(original, s["QL"], s["QR"])
    return weight, s
