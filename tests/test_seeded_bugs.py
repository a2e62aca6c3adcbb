"""The planted bugs of seeded_bugs.py and seeded_prefill_bugs.py are still bugs of this source."""

from __future__ import annotations

import pytest
import seeded_bugs
import seeded_prefill_bugs
from seeded_bugs import Bug


@pytest.mark.parametrize("bug", seeded_bugs.BUGS, ids=lambda bug: bug.what)
def test_a_bug_of_a_step_has_its_place_in_the_source(bug: Bug) -> None:
    assert bug.edit(seeded_bugs.source()) != seeded_bugs.source()


@pytest.mark.parametrize("bug", seeded_prefill_bugs.BUGS, ids=lambda bug: bug.what)
def test_a_bug_of_prefill_has_its_place_in_the_source(bug: Bug) -> None:
    assert bug.edit(seeded_prefill_bugs.source()) != seeded_prefill_bugs.source()
