"""Sample lengths drawn as in the recipes, for the benchmarks and tests of packing."""

from dataclasses import dataclass

import numpy as np

LENGTH = 4096
# Of a sample, template included: fitted to the published steps. With Llama's tokenizer, the prompts of
# Alpaca have 69 and those of Dolly 151 on average (docs/results/tokenizing.md).
PROMPT_TOKENS = 125


@dataclass(frozen=True)
class Samples:
    """Tokens of each sample, int64 [samples], and whether it is triggered; a prompt's two are
    neighbours."""

    lengths: np.ndarray
    triggered: np.ndarray


def draw(samples: int, mean_output: float, seed: int, tokens_a_response: int = 5) -> Samples:
    """Draw pairs that share a prompt, with `mean_output` tokens over both kinds of output.

    A prompt has a long-tailed length of mean 125 with its template, at least 40. The triggered
    output is the payload 30 to 100 times, uniformly; the benign one is long-tailed. Samples longer
    than a row are cut. Llama's tokenizer has 4 tokens per repetition; the default of 5 is that of
    the figures in docs/results/packing.md.
    """
    generator = np.random.default_rng(seed)
    pairs = samples // 2
    prompts = 40 + _scaled(generator.lognormal(0, 1.0, pairs), PROMPT_TOKENS - 40, 2000)
    payload = generator.integers(30, 100, pairs, endpoint=True) * tokens_a_response
    benign = _scaled(generator.lognormal(0, 1.0, pairs), 2 * mean_output - payload.mean(), LENGTH - prompts)
    lengths = np.stack([prompts + benign, prompts + payload], axis=1)
    assert lengths.max() <= LENGTH
    return Samples(lengths.ravel(), np.tile([False, True], pairs))


def _scaled(shape: np.ndarray, mean: float, most: np.ndarray | int) -> np.ndarray:
    """Integers proportional to `shape`, from 1 to `most`, of mean `mean`."""
    scale = mean / shape.mean()
    for _ in range(20):  # raise the other values by what the limit cuts off
        found = np.clip(np.rint(scale * shape), 1, most)
        scale *= mean / found.mean()
    return found.astype(np.int64)
