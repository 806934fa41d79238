"""A bundle, opened: any task's deltas, tensors and whole model; its format is in `format`."""

import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fusionkit.bundles.base import fitted, reopen_base
from fusionkit.bundles.by_task import ByTask
from fusionkit.bundles.changeable import Changeable
from fusionkit.bundles.changing import current
from fusionkit.bundles.format import INITIAL, MANIFEST
from fusionkit.bundles.manifest import Manifest
from fusionkit.bundles.published import Published
from fusionkit.bundles.reader import BundleReader, decoding
from fusionkit.bundles.signature import key_of
from fusionkit.bundles.snapshot import Stamp, at_once
from fusionkit.bundles.weights import TaskWeights
from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.checkpoints.adapters.with_start import WithStart
from fusionkit.checkpoints.checkpoint import Checkpoint, Source
from fusionkit.checkpoints.paths import open_path
from fusionkit.checkpoints.stacks import row_name, split, unsplit
from fusionkit.codecs.base import WHOLE, Parts
from fusionkit.codecs.operands import Operand
from fusionkit.errors import BundleError, CheckpointError, in_line, size
from fusionkit.task_vectors.task_source import own_tensor
from fusionkit.task_vectors.vectors import difference
from fusionkit.task_vectors.workers import full_precision

Decoded = TypeVar("Decoded")


class Bundle(ByTask, Changeable, Published):
    """A family's compressed deltas on disk; opening one reads the manifest and nothing else.

    It is a mapping of its tasks: `len(bundle)`, `"dogs" in bundle`, `bundle["dogs"]`. Many threads
    may read from one at once. Beside a run that changes the bundle it reads what was there when it
    was opened, or raises a BundleError that says to open it again.

    Args:
        path: the bundle's folder.
        base: the base model, where it is not where the manifest says.
        key: minisign's public key, its text (`RWQ…`) or its file: the bundle must be signed by it.
            By default what the environment variable FUSIONKIT_PUBLIC_KEY says; `""`: none.

    Attributes:
        path: the bundle's folder.
        key: by which it was verified; None: it was not.
        manifest: what it says of itself.
        codec: the codec that decodes it.
        roles: base tensor's name → role; private tensors and tied names are not in it.
        space: how adapters' own tensors make the base's weights; None where weights are reused.
        stacks: name of a stack of experts → how many matrices it is split into.
        tied: name → name of the tensor of the base that it shares, in every task.
        rename: how the base's own names become the bundle's; see `Family`.
        version: how often its tasks were changed since it was opened.

    Raises:
        BundleError: the folder holds no bundle, or its shared file is missing or truncated; a
            task's own file is looked at when it is needed, or by `check`.
        PluginError: its codec is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        base: Source | Checkpoint | None = None,
        key: str | Path | None = None,
    ) -> None:
        self.path, self.key = open_path(path), key_of(key)
        self.version, self._given = 0, base
        self._open()
        self._see_base()

    def _open(self) -> None:
        """Read the manifest, and set what follows from it."""
        self.manifest, self._stored = at_once(self.path, self._read)
        self.codec = self._stored.codec
        record = self.manifest.base
        self.roles = {name: tensor.role for name, tensor in record.tensors.items()}
        self.space, self.stacks = record.space, record.stacks
        self.tied, self.rename = record.tied, record.rename

    def _see_base(self) -> None:
        """See the base that was given by the manifest's names; another is opened when needed."""
        self._base_checked = False
        self._initial: dict[str, Tensor] = {}
        self._base: Checkpoint | None = None
        if self._given is not None:
            dequantize = self.manifest.base.dequantized
            self._base = self._seen(Checkpoint.of(self._given, dequantize=dequantize))

    @classmethod
    def load(
        cls,
        path: str | Path,
        base: Source | Checkpoint | None = None,
        key: str | Path | None = None,
    ) -> "Bundle":
        """The same as `Bundle(path, base, key)`."""
        return cls(path, base, key)

    @classmethod
    def temporary(cls, path: Path, base: Checkpoint) -> "Bundle":
        """Open a bundle whose folder goes when the object does."""
        bundle = cls(path, base, key="")
        weakref.finalize(bundle, shutil.rmtree, path, ignore_errors=True)
        return bundle

    def __repr__(self) -> str:
        tasks = f"{len(self)} tasks ({in_line(self.tasks)}), {size(self.manifest.nbytes)}"
        return f"Bundle({str(self.path)!r}, {self.codec!r}, {tasks})"

    @property
    def label(self) -> str:
        """How messages call it."""
        return str(self.path)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return tuple(self.manifest.tasks)

    @property
    def nbytes(self) -> int:
        """Bytes on disk: the manifest, the shared parts and every task's file."""
        return (self.path / MANIFEST).stat().st_size + self.manifest.nbytes

    @property
    def bits_per_parameter(self) -> float:
        """Stored bits per compressed parameter, the shared parts spread over the tasks.

        Private and exact tensors are in `nbytes` but not in here.
        """
        private = sum(record.private_bytes for record in self.manifest.tasks.values())
        parameters = self.manifest.base.parameters * len(self.tasks)
        return 8 * (self.nbytes - private) / max(parameters, 1)

    @property
    def base(self) -> Checkpoint:
        """The base model: as given, or opened from where it was; its fingerprint is checked.

        Raises:
            BundleError: it was not given and can't be found.
            WrongBaseError: it is another model.
        """
        if self._base is None:
            self._base = self._seen(reopen_base(self.manifest.base))
        # A model in memory may have been trained or switched since it was last looked at.
        if self._base.live or not self._base_checked:
            self.manifest.base.check(self._base, f"{self.path}: {self._base.label}")
            self._base_checked = True
        return self._base

    @property
    def whole_base(self) -> Checkpoint:
        """The same, its stacks of experts whole, and without adapters' initial tensors."""
        return unsplit(self.base.plain)

    def attach_base(self, base: Checkpoint) -> None:
        """Take the base from another place, a copy in memory, say.

        Raises:
            WrongBaseError: it is another model.
        """
        seen = self._seen(base)
        self.manifest.base.check(seen, f"{self.path}: {seen.label}")
        self._given, self._base, self._base_checked = base, seen, True

    def delta(self, task: str, name: str, device: torch.device | None = None) -> Tensor | None:
        """Decode one task's delta of one tensor, or of a whole stack; nothing else is read.

        Returns:
            float32 `(*shape)` on `device`, or None where nothing is stored (the delta is zero).

        Raises:
            BundleError: the bundle has no such task or tensor, or a file was changed.
        """
        if name in self.stacks:
            return self._stacked(task, name, device)
        if self.codec.restores:
            base = self.base[name].to(device or torch.device("cpu"))
            whole = self.tensor(task, name, base)
            return None if whole is None else difference(whole, base)
        return self._shaped(task, name, self._decoded(task, name, self.codec.decode, device))

    def _stacked(self, task: str, name: str, device: torch.device | None) -> Tensor | None:
        """A stack's delta: of its matrices, those without one are zero."""
        rows = [self.delta(task, row_name(name, i), device) for i in range(self.stacks[name])]
        found = next((row for row in rows if row is not None), None)
        if found is None:
            return None
        return torch.stack([torch.zeros_like(found) if row is None else row for row in rows])

    def tensor(
        self, task: str, name: str, base: Tensor, out: Tensor | None = None
    ) -> Tensor | None:
        """One task's tensor; nothing else is read.

        Args:
            task: one of `tasks`.
            name: the tensor's name.
            base: the base's tensor; the result is on its device.
            out: float32 `(*shape)`; a sum is formed in it, and not in memory of its own.

        Returns:
            base plus delta in float32, not rounded; or, by a codec that restores tensors, the
            tensor in the dtype that it had; None where it is the base's.

        Raises:
            BundleError: as for `delta`.
        """
        codec = self.codec

        def decode(parts: Parts, _: torch.Size) -> Tensor:
            return codec.restore(parts, base) if codec.restores else codec.added(parts, base, out)

        return self._shaped(task, name, self._decoded(task, name, decode, base.device))

    def factors(self, task: str, name: str) -> LowRank | None:
        """One task's delta of one matrix as a product; None where the codec has none."""
        return self._decoded(task, name, self.codec.factors)

    def operand(self, task: str, name: str) -> Operand | None:
        """One task's delta as the codec has it; None where it has to be decoded, or is zero."""
        return self._decoded(task, name, self.codec.operand)

    @property
    def tasks_share(self) -> bool:
        """Whether there are parts that were computed from all tasks together."""
        return self._stored.tasks_share

    def shared_parts(self, name: str, device: torch.device | None = None) -> Parts:
        """The parts of a tensor that all tasks share."""
        return self._stored.shared(name, device)

    def check(self, tasks: Iterable[str]) -> None:
        """Check that these tasks' files are there, whole in size; nothing of them is read.

        Raises:
            BundleError: one is not, or the bundle has no such task.
        """
        for task in tasks:
            self._stored.check(self._known(task))

    def task_parts(self, task: str, name: str, device: torch.device | None = None) -> Parts:
        """The parts of a tensor that a task owns; of the whole model under `WHOLE_MODEL`."""
        return self._stored.own(self._known(task), name, device)

    def task_names(self, task: str) -> Iterator[str]:
        """The names under which a task owns parts."""
        return self._stored.names(self._known(task))

    def private(self, task: str) -> list[str]:
        """Names of a task's private tensors."""
        return self.manifest.tasks[self._known(task)].private

    def private_tensor(self, task: str, name: str) -> Tensor:
        """One of a task's private tensors, whole, in its own dtype."""
        with decoding(self.path, task, name, self.codec):
            return self.task_parts(task, name)[WHOLE]

    def private_tensors(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """All of them, by name."""
        return ((name, self.private_tensor(task, name)) for name in self.private(task))

    def added(self, task: str) -> dict[str, int]:
        """The tensors that a task added rows of a vocabulary to → how many."""
        return self.manifest.tasks[self._known(task)].added

    def added_rows(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """The rows that a task added to the vocabulary, by tensor, in their own dtype.

        Raises:
            BundleError: they are of another shape than the manifest says.
        """
        return ((name, self._stored.added(task, name)) for name in self.added(task))

    def exact(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """A task's exact tensors that differ from the base's, in their own dtype.

        Raises:
            BundleError: one has another shape than the base's.
        """
        return self._stored.exact(self._known(task))

    def adapter_tensors(self, task: str) -> dict[str, Tensor]:
        """A task's adapter as it comes back: float32, by name; empty where weights are reused."""
        self._known(task)
        return {
            name: own_tensor(self, task, name, start).to(torch.float32)
            for name, start in self.initial.items()
        }

    @property
    def initial(self) -> dict[str, Tensor]:
        """The tensors that adapters started from, by name; empty where weights are reused.

        Raises:
            BundleError: the installed PEFT draws others from the seed on record.
        """
        space = self.space
        if space and not self._initial:
            names, records = space.layout.tensors, self.manifest.base.tensors
            if space.stored:
                self._initial = {n: self.shared_parts(INITIAL + n)[WHOLE] for n in names}
            else:
                shapes = {name: tuple(records[name].shape) for name in names}
                self._initial = space.initial(shapes, str(self.path))
        return self._initial

    def state_dict(self, task: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """A task's whole model: base plus decoded delta, private tensors and added rows included.

        Args:
            task: one of `tasks`.
            dtype: of all floating-point tensors; by default the base's own, and of private
                and restored tensors the one that they had.

        Returns:
            tensors by name on the CPU, the caller's own; tied names share one tensor.

        Raises:
            BundleError: the bundle has no such task, its base can't be found, a file was
                changed, or a finite value would be infinite in the dtype.
            WrongBaseError: the base at hand is another model.
        """
        state = {**TaskWeights(self, task, dtype)}
        for alias, name in self.tied.items():
            if name in state:
                state.setdefault(alias, state[name])
        return state

    def reread(self) -> None:
        """See what other runs have changed since it was opened, be it all that is in it.

        Raises:
            BundleError, PluginError: as when it is opened.
        """
        known = self.manifest.base
        self._open()
        self.version += 1
        if self.manifest.base != known:
            self._see_base()

    def _read(self, moment: Stamp) -> tuple[Manifest, BundleReader]:
        manifest = current(self.path, self.key)
        return manifest, BundleReader(self.path, manifest, moment)

    def _seen(self, base: Checkpoint) -> Checkpoint:
        """The base as deltas are taken from: by the bundle's names, with adapters' start."""
        try:
            base = split(fitted(unsplit(base), self.manifest.base), self.stacks)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path / MANIFEST}: {error}") from error
        return WithStart(base, self.initial) if self.space and base.plain is base else base

    def _decoded(
        self,
        task: str,
        name: str,
        decode: Callable[[Parts, torch.Size], Decoded],
        device: torch.device | None = None,
    ) -> Decoded | None:
        """What the codec makes of a tensor's parts; None where there are none."""
        record = self.manifest.base.tensors.get(name)
        if record is None or record.role != "delta":
            raise BundleError(f"{self.path}: holds no deltas of a tensor '{name}'")
        with decoding(self.path, task, name, self.codec), full_precision():
            parts = self._stored.of_tensor(self._known(task), name, device)
            return None if parts is None else decode(parts, torch.Size(record.shape))

    def _shaped(self, task: str, name: str, decoded: Tensor | None) -> Tensor | None:
        expected = self.manifest.base.tensors[name].shape
        if decoded is not None and list(decoded.shape) != expected:
            raise BundleError(
                f"{self.path}: '{name}' of task '{task}' decodes to shape {list(decoded.shape)}, "
                f"expected {expected}; the codec {self.codec!r} is at fault"
            )
        return decoded
