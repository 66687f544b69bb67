"""Fixtures of trainings."""

from collections.abc import Iterator

import pytest

from tests import built_once


@pytest.fixture(scope="module")
def shared_datasets() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        built_once.share(patch)
        yield
