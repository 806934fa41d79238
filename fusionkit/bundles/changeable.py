"""What changes a bundle where it is: tasks go, the manifest says something else."""

import warnings
from pathlib import Path

from msgspec.structs import replace

from fusionkit.bundles.changing import changing
from fusionkit.bundles.format import MANIFEST, task_file
from fusionkit.bundles.hub import in_cache
from fusionkit.bundles.manifest import Manifest
from fusionkit.bundles.reader import BundleReader
from fusionkit.bundles.signature import SIGNATURE, UnsignedWarning
from fusionkit.bundles.snapshot import stamp
from fusionkit.checkpoints.disk import check_writable
from fusionkit.checkpoints.paths import is_remote
from fusionkit.errors import BundleError, lacks


class Changeable:
    """What a bundle has of a folder that it may change.

    Attributes:
        path: the bundle's folder.
        manifest: what it says of itself.
        version: how often its tasks were changed since it was opened.
    """

    path: Path
    manifest: Manifest
    version: int
    _stored: BundleReader

    def check_writable(self) -> None:
        """Check that tasks can be added and removed.

        Raises:
            BundleError: the bundle is not on the local disk, or is in Hugging Face's cache, or may
                not be written.
        """
        if is_remote(self.path) or in_cache(self.path):
            raise BundleError(
                f"{self.path}: can only be read where it is; save it to a local folder to change it"
            )
        for path in (self.path, self.path / MANIFEST):
            check_writable(path)

    def remove(self, task: str) -> None:
        """Remove a task; the other tasks' files are not touched.

        Raises:
            BundleError: there is no such task, or no other; or as `changing`.
        """
        self.check_writable()
        tasks = dict(self.manifest.tasks)
        del tasks[self._known(task)]
        if not tasks:
            raise BundleError(f"{self.path}: '{task}' is the last task; delete the folder instead")
        with changing(self.path, self.manifest):
            self.update(replace(self.manifest, tasks=tasks))
            (self.path / task_file(task)).unlink(missing_ok=True)

    def update(self, manifest: Manifest) -> None:
        """Write a new manifest, and see the tasks that it names; a signature is of the old one."""
        manifest.write(self.path)
        signature = self.path / SIGNATURE
        if signature.exists():
            signature.unlink(missing_ok=True)
            warnings.warn(
                f"{self.path}: was signed, and says something else now; the signature is removed: "
                f"sign it again, fusionkit sign {self.path} --key SECRET_KEY",
                UnsignedWarning,
                stacklevel=3,
            )
        self.manifest, self.version = manifest, self.version + 1
        self._stored = BundleReader(self.path, manifest, stamp(self.path))

    def _known(self, task: str) -> str:
        """A task's name.

        Raises:
            BundleError: there is none of this name.
        """
        if task not in self.manifest.tasks:
            raise BundleError(lacks(f"{self.path}:", task, tuple(self.manifest.tasks)))
        return task
