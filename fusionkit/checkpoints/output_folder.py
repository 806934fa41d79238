"""A folder or file that is written: it appears whole or not at all, from one run at a time."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from fusionkit.checkpoints.disk import Needed, bytes_of, check_space, check_writable, disk_errors
from fusionkit.checkpoints.paths import (
    copy_file,
    is_remote,
    is_there,
    open_path,
    refuse_existing,
    upload,
)
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
        BundleError: something is there, and `overwrite` is not set, or it is of another kind; or
            it may not be written.
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
    check_writable(path)


@contextmanager
def new_folder(
    path: Path,
    overwrite: bool,
    known_by: str,
    keep: bool = False,
    needed: Needed | None = None,
) -> Iterator[Path]:
    """A context in which a folder is filled under a temporary name; it appears whole or not at all.

    Args:
        path: the folder to make.
        overwrite: replace a folder of this kind that is there.
        known_by: the file that tells the kind: a bundle's manifest, an adapter's config.
        keep: what an interrupted run, or a full disk, leaves is kept, and found again next time.
        needed: what it takes on the disk, where that is known.

    Raises:
        BundleError: it exists and `overwrite` is not set, or is of another kind, or can't fit on
            the disk, or the disk is full, or another run is making it.
    """
    path = path if path.name or is_remote(path) else path.absolute()
    check_replaceable(path, overwrite, known_by)
    if is_remote(path):
        with disk_errors(path), TemporaryDirectory(prefix="fusionkit-") as temporary:
            yield Path(temporary)
            upload(Path(temporary), path, last=known_by)
        return
    with disk_errors(path, partial(path) if keep else None, needed):
        path.parent.mkdir(parents=True, exist_ok=True)
        with sole_writer(path, known_by):
            check_replaceable(path, overwrite, known_by)  # as it may have come meanwhile
            folder = partial(path) if keep else unfinished(path)
            if needed:
                check_space(path, needed, there=bytes_of(folder))
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
def new_file(path: Path, needed: Needed | None = None, wait: float = 0) -> Iterator[Path]:
    """A context in which a file is written under a temporary name; it replaces what is there.

    Args:
        path: the file, of the local disk or a URL.
        needed: what it takes on the disk, where that is known.
        wait: seconds for another run that is writing it to end.

    Yields:
        where to write it: of its name, in a folder that goes at the end.

    Raises:
        BundleError: it can't fit on the disk, the disk is full, or another run is writing it.
    """
    if is_remote(path):
        with disk_errors(path), TemporaryDirectory(prefix="fusionkit-") as temporary:
            yield Path(temporary) / path.name
            copy_file(Path(temporary) / path.name, path)
        return
    with disk_errors(path, needed=needed):
        path.parent.mkdir(parents=True, exist_ok=True)
        with sole_writer(path, wait=wait):
            if needed:
                check_space(path, needed)
            folder = unfinished(path)
            folder.mkdir()
            try:
                yield folder / path.name
                os.replace(folder / path.name, path)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
