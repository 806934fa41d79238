"""A share of `faults.side_files`."""

import os
import subprocess
import sys

import pytest
from tiny_net import TESTS

pytestmark = pytest.mark.slow


def test_changed_files_beside_weights_are_refused_or_read() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "faults.side_files", "--trials", "60", "--seed", "5"],
        cwd=TESTS,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "together" in done.stdout
