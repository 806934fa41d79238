"""What `faults.fuzz` starts from, and what it once found at fault; and a few of its changes."""

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from faults.fuzz import TARGETS, held
from faults.fuzz_changes import changed
from faults.fuzz_targets import seeds
from tiny_net import TESTS


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_is_read_or_refused(target: str) -> None:
    found = seeds(target)
    assert found
    for data in found.values():
        held(target, data)


@pytest.mark.parametrize("target", ["manifest", "parts"])
def test_changed_json_is_read_or_refused(target: str) -> None:
    random, corpus = Random(0), [*seeds(target).values()]
    for _ in range(60):
        data = changed(target, random.choice(corpus), random)
        if data is not None:
            held(target, data)


@pytest.mark.slow
def test_compiled_kernels_stay_within_their_bounds(tmp_path: Path) -> None:
    """Every code, and every second one cut short or altered, with bounds checked."""
    script = """
from random import Random
from faults.fuzz import held
from faults.fuzz_targets import RUN, seeds
random = Random(0)
for data in seeds("codes").values():
    RUN["codes"](data)  # all that is compiled late, is
for data in seeds("codes").values():
    held("codes", data)
    for _ in range(200):
        other = bytearray(data[: random.randint(4, len(data))])
        other[random.randrange(len(other))] = random.randrange(256)
        held("codes", bytes(other))
"""
    environment = {
        **os.environ,
        "NUMBA_BOUNDSCHECK": "1",
        "NUMBA_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
    }
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
