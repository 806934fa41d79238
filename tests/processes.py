"""Test files run as scripts, in new processes: what several processes do together."""

import os
import subprocess
import sys

from conftest import TESTS


def run_script(file: str, *arguments: object) -> None:
    """Run a file in a process of its own, one thread to each that it starts, and see it succeed."""
    done = subprocess.run(
        [sys.executable, file, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
        timeout=300,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
