"""A folder that is written: it appears whole or not at all, and one run at a time fills it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from fusionkit.checkpoints.paths import is_remote, is_there, open_path, refuse_existing, upload
from fusionkit.checkpoints.sole_writer import partial, put, sole_writer, unfinished
from fusionkit.errors import BundleError, FusionKitError, ProcessError

_MEND = "choose another folder, or set overwrite (--overwrite) to replace it"


def check_replaceable(path: str | Path, overwrite: bool, known_by: str, mend: str = _MEND) -> None:
    """See that a folder may be written, before what goes into it is made.

    Args:
        path: the folder to make; of the local disk, or a URL.
        overwrite: a folder of this kind may be replaced.
        known_by: the file that tells the kind: a bundle's manifest, an adapter's config.
        mend: what to do where one is there and may not be.

    Raises:
        BundleError: something is there, and `overwrite` is not set, or it is of another kind.
    """
    refuse_existing(path, overwrite, mend)
    path = open_path(path)
    if is_there(path) and (
        (not is_remote(path) and path.is_symlink()) or not (path / known_by).is_file()
    ):
        raise BundleError(
            f"{path}: exists and is not a folder with {known_by}, so it is not overwritten; choose "
            "another folder, or delete it first"
        )


@contextmanager
def new_folder(path: Path, overwrite: bool, known_by: str, keep: bool = False) -> Iterator[Path]:
    """A context in which a folder is filled under a temporary name; it appears whole or not at all.

    Args:
        path: the folder to make.
        overwrite: replace a folder of this kind that is there.
        known_by: the file that tells the kind: a bundle's manifest, an adapter's config.
        keep: what an interrupted run, or a full disk, leaves is kept, and found again next time.

    Raises:
        BundleError: it exists and `overwrite` is not set, or is of another kind, or the disk is
            full, or another run is making it.
    """
    path = path if path.name or is_remote(path) else path.absolute()
    check_replaceable(path, overwrite, known_by)
    if is_remote(path):
        with disk_errors(path), TemporaryDirectory(prefix="fusionkit-") as temporary:
            yield Path(temporary)
            upload(Path(temporary), path, last=known_by)
        return
    with disk_errors(path, keep):
        path.parent.mkdir(parents=True, exist_ok=True)
        with sole_writer(path, known_by):
            check_replaceable(path, overwrite, known_by)  # as it may have come meanwhile
            folder = partial(path) if keep else unfinished(path)
            folder.mkdir(exist_ok=keep)
            try:
                yield folder
                put(folder, path)
            except BaseException as error:
                told = isinstance(error, FusionKitError) and not isinstance(error, ProcessError)
                if told or not keep:
                    shutil.rmtree(folder, ignore_errors=True)
                raise


@contextmanager
def disk_errors(path: Path, keep: bool = False) -> Iterator[None]:
    """A context that reports what the disk refuses as an error of the bundle.

    Args:
        path: what is written.
        keep: whether what was written so far stays.

    Raises:
        BundleError: the disk is full, or may not be written.
    """
    try:
        yield
    except OSError as error:
        left = "run it again to go on from there" if keep else "nothing was left behind"
        raise BundleError(f"{path}: could not be written ({error.strerror}); {left}") from error
