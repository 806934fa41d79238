"""The disk that is written to: whether it may be, how much is free there, and what it refuses."""

import errno
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from fusionkit.checkpoints.paths import is_remote, open_path
from fusionkit.errors import BundleError, size

_NUMBER = re.compile(r"\(os error (\d+)\)")
_FULL = (errno.ENOSPC, errno.EDQUOT)


class SpaceWarning(UserWarning):
    """What is written may not fit on the disk."""


class Needed(NamedTuple):
    """Bytes that something takes on the disk.

    Attributes:
        least: it can't take less.
        likely: it takes about so many.
    """

    least: int
    likely: int


def check_writable(path: str | Path) -> None:
    """See that a file or a folder can be made, or replaced, before the work that goes into it.

    Nothing is made; of a URL nothing can be told.

    Raises:
        BundleError: a file is where one of its folders should be, or nobody may write there.
        FusionKitError: as of `open_path`.
    """
    path = open_path(path)
    if is_remote(path):
        return
    place = _nearest(path.absolute().parent)
    if not place.is_dir():
        raise BundleError(f"{path}: can't be written: {place} is no folder; choose another place")
    if not os.access(place, os.W_OK | os.X_OK):
        read_only = os.statvfs(place).f_flag & os.ST_RDONLY
        why = "it is on a read-only file system" if read_only else "you may not write there"
        raise BundleError(
            f"{path}: can't be written in {place}: {why}; choose another place, or change that"
        )


def check_space(path: Path, needed: Needed, there: int = 0) -> None:
    """See that something fits on the disk, before the work that goes into it.

    Args:
        path: where it is to be.
        needed: what it takes.
        there: bytes of it that are there already.

    Raises:
        BundleError: it can't fit. Where it likely does not, that is a warning: an estimate does not
            refuse what might have worked.
    """
    if is_remote(path):
        return
    place = _nearest(path.absolute().parent)
    free = shutil.disk_usage(place).free + there
    if needed.least > free:
        raise BundleError(
            f"{path}: needs {size(needed.least)} at least, and {size(free)} are free on the file "
            f"system at {_mount(place)}: {size(needed.least - free)} are missing; make room there, "
            "or choose another place"
        )
    if needed.likely > free:
        warnings.warn(
            f"{path}: will take about {size(needed.likely)}, and {size(free)} are free on the file "
            f"system at {_mount(place)}; make room there, or choose another place, if it is more",
            SpaceWarning,
            stacklevel=3,
        )


@contextmanager
def disk_errors(
    path: Path, kept: Path | None = None, needed: Needed | None = None
) -> Iterator[None]:
    """A context that reports what the disk refuses as an error of the bundle.

    Args:
        path: what is written.
        kept: the folder of what was written so far, where that stays.
        needed: what it takes in all, where that is known.

    Raises:
        BundleError: the disk is full, or may not be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as raised:
        error = _refusal(raised)
        if error is None:
            raise
        left = "run it again to go on from there" if kept else "nothing was left behind"
        why = error.strerror or str(error)
        if error.errno in _FULL and not is_remote(path):
            room = _room(path, needed, bytes_of(kept) if kept else 0)
            left = f"{room}, and {left}" if kept else f"{left}; {room}"
        raise BundleError(f"{path}: could not be written ({why}); {left}") from raised


def bytes_of(folder: Path) -> int:
    """Of all files in a folder; nothing where there is none."""
    return sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())


def _refusal(error: Exception) -> OSError | None:
    """What the system refused; None of other errors. Writers of other libraries hide it."""
    if isinstance(error, OSError):
        return error
    if isinstance(error, SafetensorError) and (found := _NUMBER.search(str(error))):
        return OSError(int(found[1]), os.strerror(int(found[1])))
    return error.__context__ if isinstance(error.__context__, OSError) else None  # torch.save's


def _room(path: Path, needed: Needed | None, written: int) -> str:
    """What is free, what more it takes, and what to do."""
    place = _nearest(path.absolute().parent)
    free = shutil.disk_usage(place).free
    there = f"{size(free)} are free on the file system at {_mount(place)}"
    missing = needed.likely - written - free if needed else 0
    more = f", about {size(missing)} more are needed" if missing > 0 else ""
    return f"{there}{more}: make room there, or choose another place"


def _nearest(path: Path) -> Path:
    """The nearest of a path and its folders that is there."""
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return path


def _mount(path: Path) -> Path:
    path = path.resolve()
    while not os.path.ismount(path) and path != path.parent:
        path = path.parent
    return path
