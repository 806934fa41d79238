"""A bundle as models are on the Hugging Face Hub: `from_pretrained`, `save_pretrained`, a push."""

import re
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, cast

from msgspec.structs import replace

from fusionkit.bundles.format import MANIFEST, SHARED, task_file
from fusionkit.bundles.hub import CARD, download, in_cache, is_name, name_of, push
from fusionkit.bundles.manifest import Manifest
from fusionkit.bundles.model_card import Scores, model_card
from fusionkit.bundles.reader import BundleReader
from fusionkit.bundles.signature import SIGNATURE, UnsignedWarning
from fusionkit.checkpoints.checkpoint import Checkpoint, Source
from fusionkit.checkpoints.disk import Needed, check_space
from fusionkit.checkpoints.output_folder import check_replaceable, new_folder
from fusionkit.checkpoints.paths import is_remote, open_path
from fusionkit.errors import BundleError, lacks

Opened = TypeVar("Opened", bound="Published")

_STALE = re.compile(r"task-[^/]*\.safetensors|shared\.safetensors|manifest\.json\.minisig")
_UNSIGNED = (
    "{path}: is signed as a bundle of another base's name, and so what is pushed is not; pull it, "
    "sign that, and push it without the base's name"
)


class Published:
    """What a bundle has of models on the Hub.

    Attributes:
        path: the bundle's folder.
        manifest: what it says of itself.
    """

    path: Path
    manifest: Manifest
    _stored: BundleReader

    @classmethod
    def from_pretrained(
        cls: type[Opened],
        name: str | Path,
        base: Source | Checkpoint | None = None,
        revision: str | None = None,
        key: str | Path | None = None,
    ) -> Opened:
        """Open a bundle: a folder's, or one on the Hugging Face Hub.

        Of one on the Hub the manifest, and what its tasks share, are downloaded now; a task's file
        when it is first needed; the base, when it is. All lie in Hugging Face's cache.

        Args:
            name: a path, a URL, or `OWNER/NAME` where there is no such folder.
            base: the base model, where it is not where the bundle says.
            revision: of the repository: a branch, tag or commit.
            key: as of `Bundle`.

        Raises:
            BundleError: there is no such bundle, or it can't be downloaded.
        """
        opened: Any = cls
        text = str(name)
        if is_remote(text) or open_path(text).exists() or not is_name(text):
            return cast(Opened, opened(text, base, key))
        return cast(Opened, opened(download(text, MANIFEST, revision).parent, base, key))

    def save_pretrained(self, path: str | Path, overwrite: bool = False) -> None:
        """The same as `save`."""
        self.save(path, overwrite)

    def save(
        self, path: str | Path, overwrite: bool = False, tasks: Collection[str] | None = None
    ) -> None:
        """Copy the bundle to another folder; of some tasks alone it is another, without signature.

        Args:
            path: the folder.
            overwrite: replace a bundle that is there.
            tasks: these alone; by default all.

        Raises:
            BundleError: the folder exists (and `overwrite` is not set), the disk is full, or the
                bundle has no such task.
        """
        known = self.manifest.tasks
        chosen = list(known) if tasks is None else list(tasks)
        if unknown := [task for task in chosen if task not in known]:
            raise BundleError(lacks(f"{self.path}:", unknown[0], list(known)))
        target = open_path(path)
        check_replaceable(target, overwrite, known_by=MANIFEST)
        part = replace(self.manifest, tasks={task: known[task] for task in chosen})
        needed = Needed(part.nbytes, part.nbytes)
        check_space(target, needed)  # before anything is downloaded
        if in_cache(self.path):
            sizes = _files(part, chosen).items()
            missing = sum(size for name, size in sizes if not (self.path / name).exists())
            check_space(self.path / MANIFEST, Needed(missing, missing))
        files = {name: self._stored.fetched(name) for name in _files(part, chosen)}
        with new_folder(target, overwrite, known_by=MANIFEST, needed=needed) as folder:
            for name, file in files.items():
                self._stored.copy(file, folder / name)
            if set(chosen) == set(known):
                for name in (MANIFEST, *self._stored.signature()):
                    self._stored.copy(self.path / name, folder / name)
            else:
                part.write(folder)
            self._stored.check_unchanged()

    def push_to_hub(
        self,
        name: str,
        *,
        base_model: str | None = None,
        private: bool = False,
        titles: Sequence[str] = (),
        scores: Scores | None = None,
        message: str = "Upload a FusionKit bundle",
    ) -> str:
        """Put the bundle into a repository of the Hugging Face Hub, with a model card.

        It is one commit: an interrupted push changes nothing there. Tasks that were removed here go
        there, too; other files stay.

        Args:
            name: `OWNER/NAME`; it is made, if there is none.
            base_model: the base's name on the Hub, where whoever pulls finds it; by default what
                the bundle says, if its base was read from there.
            private: a repository that is made is private.
            titles: of the columns of scores in the card's table.
            scores: by task.
            message: of the commit.

        Returns:
            the commit's URL.

        Raises:
            BundleError: it can't be reached or written to.
        """
        manifest = self.manifest
        if base_model is not None and not is_name(base_model):
            raise BundleError(f"'{base_model}' is no name on the Hugging Face Hub: OWNER/NAME")
        if base_model and name_of(manifest.base.source) != base_model:
            source = f"hf://{base_model}"
            manifest = replace(manifest, base=replace(manifest.base, source=source))
        base_model = base_model or name_of(manifest.base.source)
        files: dict[str, Path | bytes] = {
            each: self._stored.fetched(each) for each in _files(manifest, list(manifest.tasks))
        }
        signature = self._stored.signature()
        if manifest is self.manifest:
            files |= {each: self._stored.fetched(each) for each in (MANIFEST, *signature)}
        else:
            with TemporaryDirectory(prefix="fusionkit-") as folder:
                manifest.write(Path(folder))
                files[MANIFEST] = (Path(folder) / MANIFEST).read_bytes()
            if signature:
                warnings.warn(_UNSIGNED.format(path=self.path), UnsignedWarning, stacklevel=2)
        self._stored.check_unchanged()
        signed = SIGNATURE in files
        files[CARD] = model_card(name, manifest, base_model, titles, scores, signed).encode()
        return push(name, files, _STALE, message, private)


def _files(manifest: Manifest, tasks: Sequence[str]) -> dict[str, int]:
    """Names of a bundle's files of parts → their bytes."""
    shared = {SHARED: manifest.shared.bytes} if manifest.shared else {}
    return shared | {task_file(task): manifest.tasks[task].file.bytes for task in tasks}
