"""A few of the moments of `faults.kills`."""

from itertools import chain
from pathlib import Path

import pytest
from faults.kills import WAYS, trials

pytestmark = pytest.mark.slow
LATE = range(85, 100, 6)
"""Moments at which names change."""


@pytest.mark.parametrize("name", WAYS)
def test_a_killed_run_leaves_the_old_or_the_new(name: str, tmp_path: Path) -> None:
    moments = LATE if name != "add" and name != "remove" else range(2, 60, 6)
    assert list(trials(name, tmp_path, chain(moments)))
