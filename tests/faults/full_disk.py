"""Fill the disk at each page that a run writes: what it says, what is there, what comes next.

The folder is on a small disk of its own (tmpfs; only root may mount one), on which a number of
pages is left, from none up. A run that needs more must be refused by an error that says so; what
it writes must be as before, with nothing beside it but what can be gone on from; and once there is
room, the same command must give what it gives undisturbed. From the folder `tests`:

    python -m faults.full_disk [every n-th page] [ways]
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from faults.kills import WAYS, Way, beside, found_in, made
from processes import by_itself

from fusionkit.bundles import journal
from fusionkit.errors import BundleError

PAGE = 4096
_ROOM = 4 << 20
_SAID = ("could not be written (No space left on device)", " at least, and ")
_KEPT = ".bundle.partial"


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A context with a small disk of its own.

    Raises:
        PermissionError: this user may not mount one.
    """
    folder.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", f"size={_ROOM}", "tmpfs", str(folder)]
    if subprocess.run(line, capture_output=True, check=False).returncode:
        raise PermissionError("only root may mount a small disk, outside of containers")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, pages: int) -> None:
    """Leave so many pages on a disk."""
    with (disk / "filler").open("wb", buffering=0) as file:
        left = shutil.disk_usage(disk).free // PAGE - pages
        file.write(b"\0" * (left * PAGE))
    assert shutil.disk_usage(disk).free // PAGE == pages


def said(way: Way, folder: Path) -> str:
    """What a run says; nothing, if it comes to its end."""
    journal._DUE = 0
    try:
        way.run(folder)
    except BundleError as error:
        return str(error)
    return ""


def trials(name: str, disk: Path, pages: Iterable[int]) -> Iterator[str]:
    """Run with so many pages left, until it comes to its end.

    Raises:
        AssertionError: it says something else; or what is there is neither as before nor as after;
            or the next run, with room, gives another, or leaves something.
    """
    way, here, start = WAYS[name], disk / "work", disk.parent / f"start of {name}"
    way.before(made(here))
    before = found_in(here)
    shutil.copytree(here, start)
    assert by_itself(said, way, here) == (0, "")
    after, left = found_in(here), beside(here)
    for count in pages:
        shutil.rmtree(here)
        shutil.copytree(start, here)
        was = beside(here)
        fill(disk, count)
        code, told = by_itself(said, way, here)
        assert code == 0, f"{name}, {count} pages: ended with {code}"
        (disk / "filler").unlink()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = found_in(here)
            if told:
                assert any(each in told for each in _SAID), f"{name}, {count} pages: {told}"
                assert found == before, f"{name}, {count} pages: not as before"
                odd = {each for each in beside(here) - was if _KEPT not in each}
                odd = {each for each in odd if not each.startswith("other")}  # what `save` copies
                assert not odd, f"{name}, {count} pages: {odd}"
                assert by_itself(said, way, here) == (0, ""), f"{name}, {count}: can't be repeated"
            assert found_in(here) == after, f"{name}, {count} pages: another"
            assert beside(here) == left, f"{name}, {count} pages: {beside(here) ^ left}"
        if not told:
            return
        yield "refused before" if _SAID[1] in told else "full"


def main(every: int, ways: list[str]) -> None:
    """All of it, and a table."""
    for name in ways or WAYS:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, small_disk(Path(folder) / "disk") as disk:
            found = Counter(trials(name, disk, range(0, 10**6, every)))
        spent = time.perf_counter() - start
        print(f"{name:24} {found.total():4} points: {dict(found)}, {spent:.0f} s", flush=True)


if __name__ == "__main__":
    if os.geteuid():
        sys.exit("only root may mount a small disk")
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1, sys.argv[2:])
