"""A few of the moments of `faults.kills`."""

from itertools import chain
from pathlib import Path

import pytest
from faults.kills import WAYS, pushes, trials

pytestmark = pytest.mark.slow
LATE = range(85, 100, 6)
"""Moments at which names change."""


@pytest.mark.parametrize("name", WAYS)
def test_a_killed_run_leaves_the_old_or_the_new(name: str, tmp_path: Path) -> None:
    moments = range(2, 60, 6) if name in ("add", "remove", "export") else LATE
    assert list(trials(name, tmp_path, chain(moments)))


def test_a_killed_push_leaves_nothing_or_all(tmp_path: Path) -> None:
    assert list(pushes(tmp_path / "f", iter([0.3])))
