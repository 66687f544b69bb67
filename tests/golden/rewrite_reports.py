"""Write reports/ anew after a change of what reports say; look at the difference before committing it.

python -m tests.golden.rewrite_reports
"""

import tempfile
from pathlib import Path

from tests.golden import cases, commands
from tests.golden.reading import HERE, collected, unpacked


def main() -> None:
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
