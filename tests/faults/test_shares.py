"""A few of the trials of the other campaigns; each is run whole by hand, see its module."""

from itertools import chain
from pathlib import Path

import pytest
from faults import full_disk, signals
from faults.beside import beside
from faults.full_disk import small_disk
from faults.switches import switched

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("way", "pages"),
    [("first", [3]), ("overwrite", [5]), ("add", [1]), ("save", [4]), ("export", [0])],
)
def test_a_full_disk_leaves_what_was_there(way: str, pages: list[int], tmp_path: Path) -> None:
    try:
        with small_disk(tmp_path / "disk") as disk:
            assert list(full_disk.trials(way, disk, pages))
    except PermissionError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("line", "moment"), [("compress", 20), ("add", 5), ("remove", 4)])
def test_a_command_that_is_interrupted_ends_in_order(
    line: str, moment: int, tmp_path: Path
) -> None:
    assert list(signals.trials(line, tmp_path, chain([moment])))


def test_readers_beside_writers_read_what_was_written_or_are_told(tmp_path: Path) -> None:
    found = beside(tmp_path / "f", 3, readers=2, writers=2)
    for seen in found.values():
        assert seen["right"]
        assert not [what for what in seen if what.startswith("fault")], seen


def test_switches_over_a_cache_cost_nothing(tmp_path: Path) -> None:
    found = switched(tmp_path, 400, 36)
    assert found.compared
    assert (found.wrong, found.files) == (0, 0)
    assert found.memory < 4 << 20
