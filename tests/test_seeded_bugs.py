"""The bugs of tests/seeded_bugs.py are still bugs of this source."""

from __future__ import annotations

import pytest
from seeded_bugs import BUGS, Bug, source


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what)
def test_a_bug_has_its_place_in_the_source(bug: Bug) -> None:
    assert bug.edit(source()) != source()
