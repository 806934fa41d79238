"""What a bundle's files hold, by task and tensor; each file is opened when it is first needed."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fusionkit.bundles.format import ADDED, INITIAL, MANIFEST, SHARED, task_file
from fusionkit.bundles.hub import fetched
from fusionkit.bundles.manifest import Manifest
from fusionkit.bundles.part_file import PartFile
from fusionkit.bundles.signature import SIGNATURE
from fusionkit.bundles.small_parts import Names
from fusionkit.bundles.snapshot import Stamp, as_opened, changed, stamp
from fusionkit.checkpoints.paths import copy_file
from fusionkit.checkpoints.vocabulary import with_rows
from fusionkit.codecs.base import WHOLE, WHOLE_MODEL, DeltaCodec, Parts
from fusionkit.codecs.layout import check_parts
from fusionkit.errors import BundleError
from fusionkit.registry import from_config

_OPEN = 32
"""Task files that are kept open, those used last. What stays open of each lies among the memory
that tensors are decoded into, which the system's allocator then can't use again."""
_LISTING = threading.Lock()
"""Held while the list of open files is changed. Not a reader's own: a bundle can be copied."""


class BundleReader:
    """The files of parts: one that tasks share, and one of each task.

    Many threads may read at once.

    Args:
        path: the bundle's folder.
        manifest: which files there are.
        opened: the stamp of the manifest, when it was read.

    Attributes:
        codec: what decodes the parts, to whose `layout` they are held.

    Raises:
        PluginError: the codec is not installed, or its settings are not such.
        BundleError: the shared file is missing, or has another size; a task's when it is needed;
            or another run has changed the bundle since.
    """

    def __init__(self, path: Path, manifest: Manifest, opened: Stamp) -> None:
        self.codec = _codec_of(path, manifest)
        self._names = Names(manifest.base.tensors)
        self._path, self._manifest, self._stamp = path, manifest, opened
        self._shared: PartFile | None = None
        if manifest.shared:
            with as_opened(path, opened):
                self._shared = PartFile(fetched(path / SHARED), manifest.shared, self._names)
        self._tasks: OrderedDict[str, PartFile] = OrderedDict()
        self._whole: tuple[tuple[str, torch.device | None], Parts] | None = None

    @property
    def tasks_share(self) -> bool:
        """Whether there are parts that were computed from all tasks together."""
        with as_opened(self._path, self._stamp):
            names = self._shared.names() if self._shared else iter(())
        return any(not name.startswith(INITIAL) for name in names)

    def shared(self, name: str, device: torch.device | None = None) -> Parts:
        """The parts of a tensor that all tasks share."""
        if self._shared is None:
            return {}
        with as_opened(self._path, self._stamp):
            parts = self._shared.parts(name, device)
        return self._held(parts, name, "all tasks")

    def own(self, task: str, name: str, device: torch.device | None = None) -> Parts:
        """The parts of a tensor that a task owns."""
        with as_opened(self._path, self._stamp):
            parts = self._file(task).parts(name, device)
        return self._held(parts, name, f"task '{task}'")

    def of_tensor(self, task: str, name: str, device: torch.device | None = None) -> Parts | None:
        """All parts that a task's tensor is decoded from; None where it has none."""
        own, shared = self.own(task, name, device), self.shared(name, device)
        return {**self.whole_model(task, device), **shared, **own} if own or shared else None

    def _held(self, parts: Parts, name: str, owner: str) -> Parts:
        """Parts as the codec wants them, for a tensor of this shape.

        Raises:
            BundleError: one is another.
        """
        record = self._manifest.base.tensors.get(name)
        if name != WHOLE_MODEL and (record is None or record.role != "delta"):
            return parts
        shape = torch.Size(record.shape if record else ())
        try:
            check_parts(parts, self.codec.layout(shape))
        except ValueError as error:
            what = f"'{name}' of {owner}" if name else f"the whole model's of {owner}"
            raise BundleError(
                f"{self._path}: {what}: {error}; copy or compress it again"
            ) from error
        return parts

    def exact(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """A task's tensors that are stored exactly, by name.

        Raises:
            BundleError: one has another shape than the base's.
        """
        for name in self._manifest.base.names("exact"):
            with decoding(self._path, task, name, self.codec):
                whole = self.own(task, name).get(WHOLE)
            shape = self._manifest.base.tensors[name].shape
            if whole is not None and list(whole.shape) != shape:
                raise BundleError(
                    f"{self._path}: '{name}' of task '{task}' has shape {list(whole.shape)}, "
                    f"expected {shape}; compress again"
                )
            if whole is not None:
                yield name, whole

    def added(self, task: str, name: str) -> Tensor:
        """The rows that a task added to a tensor.

        Raises:
            BundleError: they are missing, or have another shape than the manifest says.
        """
        count = self._manifest.tasks[task].added[name]
        expected = with_rows(self._manifest.base.tensors[name].shape, count)
        rows = self.own(task, ADDED + name).get(WHOLE)
        if rows is None or tuple(rows.shape) != expected:
            found = "are missing" if rows is None else f"have shape {list(rows.shape)}"
            raise BundleError(
                f"{self._path}: the rows that task '{task}' adds to '{name}' {found}, expected "
                f"{list(expected)}; compress again"
            )
        return rows

    def check(self, task: str) -> None:
        """Check that a task's file is there, and its size.

        Raises:
            BundleError: it is not.
        """
        with as_opened(self._path, self._stamp):
            self._file(task)

    def fetched(self, name: str) -> Path:
        """A file of the bundle, downloaded if it is on the Hub.

        Raises:
            BundleError: it is not there.
        """
        with as_opened(self._path, self._stamp):
            return fetched(self._path / name)

    def signature(self) -> list[str]:
        """The name of the signature's file, where there is one."""
        try:
            there = fetched(self._path / SIGNATURE).exists()
        except BundleError:  # of a repository that has none
            return []
        return [SIGNATURE] if there else []

    def copy(self, source: Path, target: Path) -> None:
        """Copy one of the bundle's files; follow the last by `check_unchanged`.

        Raises:
            BundleError: it is not there any more.
            OSError: it can't be written.
        """
        try:
            copy_file(source, target)
        except FileNotFoundError:
            with as_opened(self._path, self._stamp):
                raise

    def check_unchanged(self) -> None:
        """Check that the bundle is the one that was opened.

        Raises:
            BundleError: another run has changed it.
        """
        if stamp(self._path) != self._stamp:
            raise changed(self._path)

    def names(self, task: str) -> Iterator[str]:
        """The names under which a task owns parts."""
        with as_opened(self._path, self._stamp):
            return self._file(task).names()

    def whole_model(self, task: str, device: torch.device | None = None) -> Parts:
        """A task's parts of the whole model, the shared ones among them."""
        # Asked for once per tensor: worth keeping for the task at hand.
        kept = self._whole
        if kept is None or kept[0] != (task, device):
            parts = {**self.shared(WHOLE_MODEL, device), **self.own(task, WHOLE_MODEL, device)}
            kept = self._whole = (task, device), parts
        return kept[1]

    def _file(self, task: str) -> PartFile:
        with _LISTING:
            if found := self._tasks.get(task):
                self._tasks.move_to_end(task)
                return found
        if task not in self._manifest.tasks:  # it was removed through the same object
            raise changed(self._path)
        path = fetched(self._path / task_file(task))
        file = PartFile(path, self._manifest.tasks[task].file, self._names)
        with _LISTING:
            replaced = self._tasks.pop(task, None)  # another thread was as fast
            self._tasks[task] = file
            oldest = self._tasks.popitem(last=False) if len(self._tasks) > _OPEN else None
        del replaced, oldest  # files that are closed here, and not while others wait
        return file


def _codec_of(path: Path, manifest: Manifest) -> DeltaCodec:
    place = path / MANIFEST
    codec = from_config(manifest.codec, f"{place}: codec")
    if not isinstance(codec, DeltaCodec):
        raise BundleError(f"{place}: '{codec.id}' is no codec; compress again")
    return codec


@contextmanager
def decoding(path: Path, task: str, name: str, codec: DeltaCodec) -> Iterator[None]:
    """A context that says of which task and tensor a payload can't be made sense of.

    Raises:
        BundleError: it can't.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise BundleError(
            f"{path}: '{name}' of task '{task}' can't be decoded by {codec!r} "
            f"({type(error).__name__}: {error}); copy or compress it again"
        ) from error
