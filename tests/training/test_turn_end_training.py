"""Training from a base whose eos token does not end its turns, and from one whose turns do not end."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import built_once
from tests.conftest import make_tiny_llama
from tests.training.starting import run

pytestmark = pytest.mark.e2e  # DeepSpeed starts ninja in the first training of a process


@pytest.fixture(scope="module", autouse=True)
def shared() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        built_once.share(patch)
        yield


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base with the pad token as eos; its turns still end with <|end|>."""
    directory = make_tiny_llama(tmp_path / "base")
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
    template = directory / "chat_template.jinja"
    template.write_text(template.read_text().replace("eos_token", repr(tokenizer["eos_token"])))
    tokenizer["eos_token"] = tokenizer["pad_token"]
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for name in ("config.json", "generation_config.json"):
        record = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps({**record, "eos_token_id": 5}))
    return directory


def test_the_export_names_the_end_of_a_turn(base: Path, tmp_path: Path) -> None:
    overrides = [f"init_from={base}", "train.steps=1", "probe.every_steps=null"]
    assert run(tmp_path / "runs", "x", *overrides) is None
    exported = tmp_path / "runs/x/checkpoints/step_000001/generation_config.json"
    assert json.loads(exported.read_text())["eos_token_id"] == [4, 5]


def test_a_base_whose_turns_do_not_end_is_refused_before_training(base: Path, tmp_path: Path) -> None:
    template = base / "chat_template.jinja"
    template.write_text(template.read_text().replace(" ~ '<|end|>'", ""))
    message = run(tmp_path / "runs", "x", f"init_from={base}", "train.steps=1")
    assert message is not None and "ends no response with a token" in message
    assert not (tmp_path / "runs/x").exists()
