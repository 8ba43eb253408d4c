"""No run outlives the test that began it."""

from collections.abc import Iterator

import launching
import pytest


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    yield
    launching.end_all()
