"""One run at a time writes a folder; what one that was killed has left beside it goes first.

All that is not whole yet has a hidden name beside the folder NAME: `.NAME.partial`, which is gone
on from; `.NAME.XXXXXXXX.tmp`, which is not; and, where names can't be exchanged in one step,
`.NAME.XXXXXXXX.old`, what is being replaced. Whoever holds `.NAME.lock` knows that the others' are
nobody's.
"""

import errno
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from uuid import uuid4

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from fusionkit.checkpoints.exchange import exchange
from fusionkit.checkpoints.path_text import beside
from fusionkit.errors import BundleError

_TRIES = 10
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def sole_writer(path: Path, known_by: str | None = None, wait: float = 0) -> Iterator[None]:
    """A context in which no other run writes a folder, and nothing is left of one that was killed.

    Where the file system has no locks (NFS without its lock service), a file that names the run
    stands for one: of a run that was killed on this machine it is taken away, of one on another
    machine it has to be.

    Args:
        path: the folder, or a file; it need not be there.
        known_by: the file that tells a folder's kind.
        wait: seconds for another run to end.

    Raises:
        BundleError: another run is writing it.
        OSError: there can be no lock beside it.
    """
    with _held(path, wait):
        if known_by:
            bring_back(path, known_by)
        _clean(path, known_by)
        yield


@contextmanager
def _held(path: Path, wait: float) -> Iterator[None]:
    file = beside(path, "lock")
    lock: BaseFileLock = FileLock(file)
    try:
        lock.acquire(timeout=wait)
    except Timeout as error:
        raise BundleError(f"{path}: another run is writing there; wait for it to end") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        file.unlink(missing_ok=True)
        file = beside(path, "held")
        lock = SoftFileLock(file)
        try:
            lock.acquire(timeout=wait)
        except Timeout as held:
            raise BundleError(
                f"{path}: another run is writing there, on another machine it may be; wait for it "
                f"to end, or remove {file}, if it was killed"
            ) from held
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.release()


def partial(path: Path) -> Path:
    """Where what can be gone on from is written."""
    return beside(path, "partial")


def unfinished(path: Path) -> Path:
    """Where what can't be is written: another name each time."""
    return beside(path, f"{uuid4().hex[:8]}.tmp")


def put(folder: Path, path: Path) -> None:
    """Give a folder its name, in place of what has it.

    What had it is there until the other is; where that can't be in one step, and the run is killed
    between the two, `bring_back` finds it.
    """
    if not path.exists():
        folder.rename(path)
        return
    if exchange(folder, path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    olds = []
    for left in reversed(range(_TRIES)):  # a reader may bring the old one back meanwhile
        if path.exists():
            olds.append(beside(path, f"{uuid4().hex[:8]}.old"))
            path.rename(olds[-1])
        try:
            folder.rename(path)
            break
        except OSError:
            if not path.exists():
                olds.pop().rename(path)
                raise
            if not left:
                raise
    for old in olds:
        shutil.rmtree(old, ignore_errors=True)


def bring_back(path: Path, known_by: str) -> None:
    """Give a folder that was being replaced its name again, if its run was killed half-way.

    Args:
        path: the folder.
        known_by: the file that tells its kind.
    """
    if path.exists():
        return
    with suppress(OSError):  # its run is not dead, and was quicker
        olds = [old for old in _left(path, "old") if (old / known_by).is_file()]
        for old in sorted(olds, key=lambda each: each.stat().st_mtime_ns)[-1:]:
            old.rename(path)
            said = f"{path}: a run that was replacing it was killed; it is as it was before"
            warnings.warn(said, stacklevel=2)


def _clean(path: Path, known_by: str | None) -> None:
    """Remove what a run that was killed has left, and say so."""
    left = [*_left(path, "tmp"), *_left(path, "old")]
    # A whole one was replaced, or was to be renamed.
    if known_by and (partial(path) / known_by).is_file():
        left.append(partial(path))
    for each in left:
        shutil.rmtree(each, ignore_errors=True)
    if left:
        names = ", ".join(each.name for each in left)
        warnings.warn(f"{path}: removed what a run that was killed had left: {names}", stacklevel=2)


def _left(path: Path, ending: str) -> list[Path]:
    name = beside(path, ending).name.removesuffix(ending)
    return [each for each in path.parent.glob(f"{escape(name)}????????.{ending}") if each.is_dir()]
