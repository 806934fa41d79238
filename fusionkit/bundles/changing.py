"""A bundle is changed where it is: by one run at a time, and by none that knows an older one."""

import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from fusionkit.bundles.format import MANIFEST, SHARED, task_file
from fusionkit.bundles.manifest import Manifest
from fusionkit.bundles.signature import SIGNATURE, verify
from fusionkit.bundles.snapshot import changed
from fusionkit.checkpoints.disk import disk_errors
from fusionkit.checkpoints.paths import is_remote
from fusionkit.checkpoints.sole_writer import bring_back, sole_writer

_NEW = ".add."


def current(path: Path, key: str | Path | None = None) -> Manifest:
    """A bundle's manifest; of one that a killed run was replacing, as it was before.

    Args:
        path: the bundle's folder.
        key: minisign's public key; it must be signed by it.

    Raises:
        BundleError: the folder holds no bundle.
        SignatureError: it is not signed by the key.
    """
    if not is_remote(path):
        bring_back(path, MANIFEST)
    if key is None:
        return Manifest.read(path)
    return Manifest.read(path, partial(verify, signature=path / SIGNATURE, key=key))


@contextmanager
def changing(path: Path, manifest: Manifest) -> Iterator[Path]:
    """A context in which tasks are put into a bundle, or taken out.

    What a run that was killed has left in the bundle's folder goes first.

    Args:
        path: the bundle's folder.
        manifest: as it was when the bundle was opened, or last changed.

    Yields:
        a folder in the bundle's, for files that are not whole yet; it goes at the end.

    Raises:
        BundleError: another run is changing the bundle, or has since it was opened; or the disk is
            full.
    """
    with disk_errors(path), sole_writer(path, MANIFEST):
        if Manifest.read(path).text() != manifest.text():
            raise changed(path)
        _clean(path, manifest)
        with tempfile.TemporaryDirectory(prefix=_NEW, dir=path) as new:
            yield Path(new)


def _clean(path: Path, manifest: Manifest) -> None:
    """Remove what no one needs any more of what runs leave, and say so."""
    known = {SHARED, *map(task_file, manifest.tasks)}
    files = [each for each in path.glob("task-*.safetensors") if each.name not in known]
    left = [*path.glob(f"{_NEW}*"), *path.glob(f"{MANIFEST}.tmp"), *files]
    for each in left:
        if each.is_dir():
            shutil.rmtree(each, ignore_errors=True)
        else:
            each.unlink(missing_ok=True)
    if left:
        names = ", ".join(each.name for each in left)
        warnings.warn(f"{path}: removed what a run that was killed had left: {names}", stacklevel=2)
