"""A share of `faults.mutations`."""

import os
import subprocess
import sys

import pytest
from tiny_net import TESTS

pytestmark = pytest.mark.slow


def test_changed_bundles_are_refused_or_right() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "faults.mutations", "--trials", "200", "--seed", "7"],
        cwd=TESTS,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    faults = [line for line in done.stdout.splitlines() if line.startswith("  ")]
    # A machine that is busy with other tests is slow, too.
    assert all(" took " in line for line in faults), done.stdout
    assert "together" in done.stdout, done.stderr
