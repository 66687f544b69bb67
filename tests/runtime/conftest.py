"""Fixture that starts ranks which a test kills or freezes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.victims import Ranks


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    started: list[Ranks] = []

    def start(size: int, function: Callable[..., Any], *arguments: Any) -> Ranks:
        started.append(Ranks(size, tmp_path, function, *arguments))
        return started[-1]

    yield start
    for each in started:
        each.end()
