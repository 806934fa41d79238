"""A share of `faults.lying_parts`, in another process, where compiled loops check their bounds."""

import os
import subprocess
import sys

import pytest
from tiny_net import TESTS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("every", "names"),
    [(41, ["emr", "dbms of emr", "prune merged", "sketch"]), (97, [])],
    ids=["within bounds", "every codec"],
)
def test_parts_that_lie_are_refused(every: int, names: list[str]) -> None:
    checked = {"NUMBA_BOUNDSCHECK": "1"} if names else {}
    done = subprocess.run(
        [sys.executable, "-m", "faults.lying_parts", str(every), *names],
        cwd=TESTS,
        env={**os.environ, **checked},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("'refused'") >= len(names)
