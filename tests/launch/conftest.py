"""No run outlives the test that began it, or leaves anything outside of its folder."""

from collections.abc import Iterator

import launching
import pytest


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    # Sockets have their names in TMPDIR, which must be short.
    with launching.surroundings(tmp_path_factory.mktemp("around")):
        yield
        launching.end_all()
