"""A bundle as it was when it was opened, beside runs that change it.

Nothing is held against writers: whoever reads finds the files as they were, or is told to open the
bundle again. Every change writes the manifest anew, before it takes files away.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from fusionkit.bundles.format import MANIFEST
from fusionkit.checkpoints.paths import is_remote
from fusionkit.checkpoints.steady_file import stamp_of
from fusionkit.errors import BundleError, FusionKitError

Opened = TypeVar("Opened")
Stamp = tuple[int, int, int] | None
_TRIES = 100


def stamp(path: Path) -> Stamp:
    """What tells a bundle's manifest from the one that follows it.

    Args:
        path: the bundle's folder.

    Returns:
        None: it is remote, or has none.
    """
    if is_remote(path):
        return None
    try:
        return stamp_of((path / MANIFEST).stat())
    except OSError:
        return None


def changed(path: Path) -> BundleError:
    """That a bundle is another one now."""
    return BundleError(
        f"{path}: another run has changed it since it was opened here; open it again"
    )


@contextmanager
def as_opened(path: Path, opened: Stamp) -> Iterator[None]:
    """A context in which files of a bundle are read.

    Args:
        path: the bundle's folder.
        opened: its stamp when its manifest was read.

    Raises:
        BundleError: what can't be read was changed by another run, or can't be read at all.
    """
    try:
        yield
    except (FusionKitError, OSError) as error:
        if stamp(path) != opened:
            raise changed(path) from error
        if isinstance(error, OSError):
            raise BundleError(
                f"{error.filename or path}: can't be read ({error.strerror}); copy it again"
            ) from error
        raise


def at_once(path: Path, read: Callable[[Stamp], Opened]) -> Opened:
    """Read what lies in several files of a bundle, all of one moment.

    Args:
        path: the bundle's folder.
        read: reads them, given the stamp of the moment; again, if they changed meanwhile.
    """
    for _ in range(_TRIES):
        moment = stamp(path)
        try:
            return read(moment)
        except FusionKitError:
            if stamp(path) == moment:
                raise
    raise changed(path)
