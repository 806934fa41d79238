"""A bundle's folder: how its files are called, and how it appears whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote
from uuid import uuid4

from fusionkit.errors import BundleError
from fusionkit.manifest import FILE

SHARED = "shared.safetensors"
WHOLE = "tensor"
"""The reserved part: the tensor itself, as the task has it."""
START = "start:"
"""Put before an adapter tensor's name: its initial value, among the shared parts."""


def task_file(task: str) -> str:
    """The name of a task's file; never a path, whatever the task is called."""
    return f"task-{quote(task, safe='', errors='surrogatepass')}.safetensors"


@contextmanager
def new_folder(path: Path, overwrite: bool = False, known_by: str = FILE) -> Iterator[Path]:
    """A context in which a folder is filled under a temporary name; it appears whole or not at all.

    Args:
        path: the folder to make.
        overwrite: replace a folder of this kind that is there.
        known_by: the file that tells the kind; a bundle's manifest.

    Raises:
        BundleError: it exists and `overwrite` is not set, or is of another kind, or the disk is
            full.
    """
    path = path if path.name else path.absolute()
    if path.exists() and not overwrite:
        raise BundleError(f"{path}: exists; choose another folder, or set overwrite to replace it")
    if path.exists() and (path.is_symlink() or not (path / known_by).is_file()):
        kind = "a bundle's own folder" if known_by == FILE else f"a folder with {known_by}"
        raise BundleError(
            f"{path}: exists and is not {kind}, so it is not overwritten; choose another folder, "
            "or delete it first"
        )
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
        folder.mkdir()
        try:
            yield folder
            if path.exists():
                old = folder.with_suffix(".old")
                path.rename(old)
                try:
                    folder.rename(path)
                except BaseException:
                    old.rename(path)
                    raise
                shutil.rmtree(old)
            else:
                folder.rename(path)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A context that reports what the disk refuses as an error of the bundle.

    Raises:
        BundleError: the disk is full, or may not be written.
    """
    try:
        yield
    except OSError as error:
        raise BundleError(
            f"{path}: could not be written ({error.strerror}); nothing was left behind"
        ) from error
