"""A family: one base model and the models fine-tuned from it, read as a stream of task vectors.

Every check of names, shapes, dtypes and values that base and fine-tuned checkpoints must pass to
fit together is here. Each tensor of the base has one role:

- *delta*: a floating-point weight; its task vectors are what codecs compress.
- *exact*: an integer tensor or a buffer (BatchNorm statistics); comes back exactly, stored
  whole for the tasks in which it differs from the base.
- *frozen*: declared equal to the base in every task; may be absent, costs no bytes.

Tensors declared *private* (a task's own head) belong to their task alone: stored whole, never
compressed or merged, and free to differ in shape or to be absent from the base.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, Self, TypeVar

import torch
from torch import Tensor

from fusionkit.checkpoints.adapters.folder import is_adapter
from fusionkit.checkpoints.adapters.merged import MergedAdapter
from fusionkit.checkpoints.adapters.modules import Adapters, AdapterSpace, open_space
from fusionkit.checkpoints.checkpoint import Checkpoint, Pieces, Source, TensorSpec, matches
from fusionkit.errors import CheckpointError, FamilyError, listing
from fusionkit.task_vectors.vectors import Change, ChangedVectors, TaskVectors
from fusionkit.task_vectors.workers import Workers, total

Role = Literal["delta", "exact", "frozen"]
Result = TypeVar("Result")

_BUFFERS = ("*running_mean", "*running_var", "*num_batches_tracked")


class Family:
    """A base model and the models fine-tuned from it; iterating streams their task vectors.

    Args:
        base: the base model: anything that `Checkpoint.of` reads.
        finetuned: task name → fine-tuned checkpoint: anything that `Checkpoint.of` reads.
        private: patterns (`classifier.*`) of the tensors that are each task's own.
        frozen: patterns of the tensors that equal the base's in every task; those that no
            adapter touches are so without being named.
        adapters: what is taken of PEFT adapters: `merged`, the deltas of the weights that they
            are merged into; or `modules`, their own tensors, with task vectors from where they
            started. Then all fine-tuned models are adapters of one kind and shape, and `base`
            has the initial tensors beside its own.

    Attributes:
        base: the base's checkpoint.
        finetuned: task name → checkpoint.
        tasks: the tasks' names.
        roles: base tensor's name → role; private tensors and tied names are not in it.
        private: task name → names of its private tensors.
        tied: name → name of the tensor of the base that it shares.
        space: how adapters' own tensors make the base's weights; None where they are merged.
        sizes: name of a tensor to compress (of role delta) → its number of entries.
        parameters: number of compressible parameters of one task.
        version: always the same, as are its tasks.
        device: where task vectors are formed, and so encoded: the CPU, unless it is changed.
        workers: who does the passes over it: some threads, by default.

    Raises:
        FamilyError: the checkpoints don't fit together; the message lists every finding with
            its file and tensor.
    """

    version = 0

    def __init__(
        self,
        base: Source | Checkpoint,
        finetuned: Mapping[str, Source | Checkpoint],
        private: Sequence[str] = (),
        frozen: Sequence[str] = (),
        adapters: Adapters = "merged",
    ) -> None:
        if not finetuned:
            raise FamilyError("expected at least one fine-tuned checkpoint, got none")
        self.base = Checkpoint.of(base)
        self.space: AdapterSpace | None = None
        if adapters == "modules":
            self.base, self.finetuned, self.space = open_space(self.base, finetuned)
        else:
            self.finetuned = {task: self._open(source) for task, source in finetuned.items()}
        self.tasks = tuple(self.finetuned)
        self.private_patterns = tuple(private)
        self.frozen_patterns = tuple(frozen)
        self._check_patterns()
        self.tied = {
            alias: name
            for alias, name in self.base.aliases.items()
            if not self._is_private(alias) and not self._is_private(name)
        }
        self.roles = {
            name: self._role(name, spec)
            for name, spec in self.base.specs.items()
            if name not in self.tied and not self._is_private(name)
        }
        self._known_as: dict[str, list[str]] = {name: [name] for name in self.roles}
        for alias, name in self.tied.items():
            self._known_as.setdefault(name, [name]).append(alias)
        self.private: dict[str, list[str]] = {}
        findings = [
            finding for task in self.tasks for finding in self._check(task, self.finetuned[task])
        ]
        if findings:
            raise FamilyError(
                f"the fine-tuned checkpoints don't fit the base {self.base.label}:"
                f"{listing(findings)}{self._hint()}"
            )
        self._changes: tuple[Callable[[TaskVectors], Sequence[Change | None]], ...] = ()
        self.device = torch.device("cpu")
        self.workers = Workers(threads=1 if self.base.serial else None)
        self.sizes = {name: self.base.specs[name].numel for name in self.names("delta")}
        self.parameters = sum(self.sizes.values())

    @property
    def bits_per_parameter(self) -> float:
        """Bits per compressible parameter in the fine-tuned checkpoints, over all tasks."""
        bits = 0
        for checkpoint in self.finetuned.values():
            own = checkpoint
            if isinstance(checkpoint, MergedAdapter):
                own = checkpoint.folder.tensors
                names = [name for name in own if not self._is_private(name)]
            else:
                names = [known for n in self.names("delta") if (known := self._known(own, n))]
            bits += sum(8 * own.specs[name].nbytes for name in names)
        return bits / max(self.parameters * len(self.tasks), 1)

    def names(self, role: Role) -> list[str]:
        """Names of the base's tensors with this role, in the base's order."""
        return [name for name, its_role in self.roles.items() if its_role == role]

    def __len__(self) -> int:
        """Number of tensors that iterating yields."""
        return len(self.names("delta"))

    def __iter__(self) -> Iterator[TaskVectors]:
        """Stream the task vectors, tensor by tensor, in the base's order."""
        for name in self.names("delta"):
            yield self.vectors(name)

    def each(self, function: Callable[[TaskVectors], Result]) -> dict[str, Result]:
        """One pass, shared out among threads and processes: a function of every tensor's vectors.

        Args:
            function: called in several threads; its results are kept for all tensors, so they
                should be small.

        Returns:
            tensor's name → result, in the base's order, the same in every process.
        """
        own = dict(self.run(lambda name: function(self.vectors(name)), self.share))
        return {
            name: result
            for results in self.workers.processes.gather(own)
            for name, result in results.items()
        }

    def total(self, function: Callable[[TaskVectors], Tensor]) -> Tensor | None:
        """The sum over all tensors of a function of their vectors; None if there are no tensors.

        Shared out as by `each`. Numbers are added in the base's order, whoever computed them, so
        that the sum is always the same to the bit; only integers may be large, as they are added
        up at once.

        Args:
            function: called in several threads; makes a tensor of one shape and dtype.
        """
        count: Tensor | None = None
        floats: list[Tensor] = []
        for _, value in self.run(lambda name: function(self.vectors(name)), self.share):
            if value.is_floating_point():
                floats.append(value)
            else:
                count = value if count is None else count.add_(value)
        own = floats if count is None else [count]
        return total(value for each in self.workers.processes.gather(own) for value in each)

    def run(
        self, function: Callable[[str], Result], sizes: Mapping[str, int]
    ) -> Iterator[tuple[str, Result]]:
        """Call a function with each name, as `Workers.run`; the tensors are read ahead."""
        entries = {name: size * len(self.tasks) for name, size in sizes.items()}
        return self.workers.run(function, entries, ahead=self._prefetch)

    @property
    def share(self) -> dict[str, int]:
        """The sizes of the tensors that are this process's to work on: all, if it is alone."""
        return {name: self.sizes[name] for name in self.workers.share(self.sizes)}

    def changed(self, changes: Callable[[TaskVectors], Sequence[Change | None]]) -> Self:
        """The same family with its task vectors changed as they are streamed.

        Args:
            changes: called with each tensor's vectors; per task what is done to its vector, in
                place, or None.
        """
        other = copy(self)
        other._changes = (*self._changes, changes)
        return other

    def vectors(self, name: str) -> TaskVectors:
        """The task vectors of one tensor."""
        vectors = self._vectors(name)
        for changes in self._changes:
            vectors = ChangedVectors.of(vectors, changes(vectors))
        return vectors

    def _vectors(self, name: str) -> TaskVectors:
        def place(task: int | None) -> tuple[Checkpoint, str]:
            if task is None:
                return self.base, name
            checkpoint = self.finetuned[self.tasks[task]]
            return checkpoint, self._name_in(checkpoint, name)

        def pieces(task: int | None) -> Pieces:
            checkpoint, known = place(task)
            return checkpoint.pieces(known)

        def read(task: int | None) -> Tensor:
            checkpoint, known = place(task)
            return checkpoint[known]

        def label(task: int | None) -> str:
            return place(task)[0].label + (" (the base)" if task is None else "")

        def adapter(task: int) -> MergedAdapter | None:
            checkpoint = self.finetuned[self.tasks[task]]
            return checkpoint if isinstance(checkpoint, MergedAdapter) else None

        shape = torch.Size(self.base.specs[name].shape)
        return TaskVectors(name, shape, self.tasks, self.device, read, pieces, label, adapter)

    def exact(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """A task's exact tensors that differ from the base's, in their own dtype."""
        for name in self.names("exact"):
            tuned = self._tuned(task, name)
            base = self.base[name]
            if tuned.dtype != base.dtype or not torch.equal(tuned, base):
                yield name, tuned

    def private_tensors(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """A task's private tensors, whole, in their own dtype."""
        for name in self.private[task]:
            yield name, self.finetuned[task][name]

    def check_frozen(self) -> None:
        """Check that frozen tensors, where present, do equal the base's.

        Raises:
            FamilyError: one differs.
        """
        findings = []
        for task in self.tasks:
            for name in self.names("frozen"):
                known = self._known(self.finetuned[task], name)
                if known is None or not self._touches(self.finetuned[task], name):
                    continue
                tuned = self.finetuned[task][known]
                if not torch.equal(self.base[name].to(tuned.dtype), tuned):
                    findings.append(f"{self.finetuned[task].label}: '{known}' (task '{task}')")
        if findings:
            raise FamilyError(
                f"tensors are declared frozen but differ from the base:{listing(findings)}\n"
                "take them out of `frozen`, so that their deltas are stored"
            )

    @property
    def initial(self) -> dict[str, Tensor]:
        """The tensors that adapters started from, by name; empty where they are merged."""
        names = self.space.layout.tensors if self.space else []
        return {name: self.base[name] for name in names}

    def tensor(self, task: str, name: str, base: Tensor, out: Tensor | None = None) -> Tensor:
        """One of a task's tensors, uncompressed, in its own dtype; see `TaskSource`."""
        return self._tuned(task, name).to(base.device)

    def _prefetch(self, name: str) -> None:
        self.base.prefetch(name)
        for checkpoint in self.finetuned.values():
            checkpoint.prefetch(self._name_in(checkpoint, name))

    def _open(self, source: Source | Checkpoint) -> Checkpoint:
        if isinstance(source, str | Path) and is_adapter(source):
            return MergedAdapter(self.base, source)
        return Checkpoint.of(source)

    def _tuned(self, task: str, name: str) -> Tensor:
        checkpoint = self.finetuned[task]
        return checkpoint[self._name_in(checkpoint, name)]

    def _name_in(self, checkpoint: Checkpoint, name: str) -> str:
        known = self._known(checkpoint, name)
        if known is None:
            raise CheckpointError(f"{checkpoint.label}: no tensor '{name}'")
        return known

    def _known(self, checkpoint: Checkpoint, name: str) -> str | None:
        """The first of the tensor's tied names that the checkpoint has."""
        return next((known for known in self._known_as[name] if known in checkpoint), None)

    def _is_private(self, name: str) -> bool:
        return matches(name, self.private_patterns)

    def _touches(self, checkpoint: Checkpoint, name: str) -> bool:
        """Whether a checkpoint has a tensor of its own, rather than the base's seen through it."""
        if isinstance(checkpoint, MergedAdapter):
            return name in checkpoint.touched
        return self.space is None or name in checkpoint

    def _role(self, name: str, spec: TensorSpec) -> Role:
        touched = any(self._touches(checkpoint, name) for checkpoint in self.finetuned.values())
        if self.space and name in self.space.still:
            return "frozen"
        if matches(name, self.frozen_patterns) or not touched:
            return "frozen"
        is_buffer = name in self.base.buffers or matches(name, _BUFFERS)
        return "delta" if spec.dtype.is_floating_point and not is_buffer else "exact"

    def _check_patterns(self) -> None:
        names = set(self.base).union(*self.finetuned.values())
        idle = [
            f"{kind} pattern '{pattern}'"
            for kind, patterns in (
                ("private", self.private_patterns),
                ("frozen", self.frozen_patterns),
            )
            for pattern in patterns
            if not any(fnmatchcase(name, pattern) for name in names)
        ]
        if idle:
            raise FamilyError(
                f"these match no tensor of {self.base.label} or of a fine-tuned checkpoint:"
                f"{listing(idle)}\nthe names begin like '{min(names)}'; mend or drop the pattern"
            )
        both = [
            name
            for name in self.base
            if self._is_private(name) and matches(name, self.frozen_patterns)
        ]
        if both:
            raise FamilyError(f"declared both private and frozen:{listing(both)}")

    def _check(self, task: str, tuned: Checkpoint) -> Iterator[str]:
        where = f"{tuned.label} (task '{task}')"
        self.private[task] = sorted(name for name in tuned if self._is_private(name))
        for name in self.base:
            if self._is_private(name) and name not in tuned and self.space is None:
                yield f"{where}: misses the private tensor '{name}'"
        for name, role in self.roles.items():
            known = self._known(tuned, name)
            if known is None:
                if role != "frozen":
                    yield f"{where}: misses tensor '{name}' (declare it frozen if it is the base's)"
                continue
            yield from self._check_spec(where, known, self.base.specs[name], tuned.specs[known])
            yield from self._check_tied(where, tuned, name, known)
        known_names = set(self.roles) | set(self.tied)
        for name in tuned:
            if name not in known_names and not self._is_private(name):
                yield f"{where}: has tensor '{name}', which the base lacks (declare it private?)"

    def _check_spec(
        self, where: str, name: str, base: TensorSpec, tuned: TensorSpec
    ) -> Iterator[str]:
        if base.shape != tuned.shape:
            yield (
                f"{where}: tensor '{name}' has shape {list(tuned.shape)}, the base's has "
                f"{list(base.shape)} (declare it private to store it whole)"
            )
        elif base.dtype != tuned.dtype and not (
            base.dtype.is_floating_point and tuned.dtype.is_floating_point
        ):
            yield f"{where}: tensor '{name}' is {tuned.dtype}, the base's is {base.dtype}"

    def _check_tied(self, where: str, tuned: Checkpoint, name: str, known: str) -> Iterator[str]:
        for other in self._known_as[name]:
            if other == known or other not in tuned or tuned.aliases.get(other) == known:
                continue
            if tuned.specs[other] != tuned.specs[known] or not torch.equal(
                tuned[other], tuned[known]
            ):
                yield (
                    f"{where}: '{known}' and '{other}' are one tied tensor in the base but differ "
                    "here (untie them in the base: give it as a checkpoint that holds both)"
                )

    def _hint(self) -> str:
        """Name the prefix that would make the names fit, where there is one."""
        for tuned in self.finetuned.values():
            for name in self.roles:
                for other in tuned:
                    if other.endswith("." + name):
                        prefix = other.removesuffix(name)
                        if sum(prefix + own in tuned for own in self.roles) > len(self.roles) // 2:
                            return (
                                f"\n{tuned.label} names its tensors with the prefix '{prefix}': "
                                f"give the base as Checkpoint.of(…, add_prefix='{prefix}') or the "
                                f"fine-tuned one as Checkpoint.of(…, strip_prefix='{prefix}')"
                            )
                break
        return ""
