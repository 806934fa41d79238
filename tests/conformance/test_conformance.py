"""The conformance sweep: every family of the table, through the crossing."""

import importlib.util
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import transformers
from conformance.crossing import CODECS, CROSSING, SINKS, cross
from conformance.families import FAMILIES
from conformance.row import ModelFamily
from conformance.table import table

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def _item(row: ModelFamily) -> object:
    marks = [
        pytest.mark.skipif(
            importlib.util.find_spec(row.library) is None, reason=f"{row.library} is not installed"
        )
    ]
    return pytest.param(row, id=str(row), marks=marks)


@pytest.fixture
def quiet() -> Iterator[None]:
    """Without what libraries say of models that nobody has trained."""
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


@pytest.mark.conformance
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("row", [_item(row) for row in FAMILIES])
def test_the_fine_tune_comes_back(row: ModelFamily, tmp_path: Path) -> None:
    wrong = {name: what for name, what in cross(row, tmp_path).items() if what}
    assert not wrong, "\n".join(f"{name}: {what}" for name, what in wrong.items())


def test_there_are_as_many_as_promised() -> None:
    assert len(FAMILIES) >= 45
    assert len({str(row) for row in FAMILIES}) == len(FAMILIES)


def test_every_family_meets_everything() -> None:
    """Bases and fine-tunes in all pairs, each of both with every codec, and every sink."""
    kinds = {"folder", "sharded", "live"}, {"folder", "live", "LoRA"}
    assert {(base, tuned) for base, tuned, _, _ in CROSSING} == set(product(*kinds))
    assert {(base, codec) for base, _, codec, _ in CROSSING} == set(product(kinds[0], CODECS))
    assert {(tuned, codec) for _, tuned, codec, _ in CROSSING} == set(product(kinds[1], CODECS))
    assert {sink for *_, sinks in CROSSING for sink in sinks} == SINKS.keys()


def test_the_page_is_the_table() -> None:
    assert PAGE.read_text() == table(), (
        "write it again: PYTHONPATH=tests python -m conformance.table > docs/models.md"
    )
