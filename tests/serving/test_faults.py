"""A small share of `faults/serving.py`, which says what else there is."""

import time
from pathlib import Path

import pytest
from faults import serving
from served import Served

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", [0, 1])
def test_what_clients_do_harms_no_other(talker: Served, models: Path, seed: int) -> None:
    others = serving.during(talker, models, [*serving.FAULTS], seed)
    assert not others.wrong
    assert others.answered > 10


@pytest.mark.parametrize("streamed", [True, False])
def test_a_row_whose_client_has_gone_runs_no_more(talker: Served, streamed: bool) -> None:
    made = serving.connection(talker, {**serving.LONG, "max_tokens": 1024, "stream": streamed})
    talker.until("fusionkit_running", 1)
    began = time.monotonic()
    made.close()
    talker.until("fusionkit_running", 0)
    line = talker.line(status=499, endpoint="/v1/completions", task="dogs")
    assert line["completion_tokens"] < 1024
    assert time.monotonic() - began < 10
