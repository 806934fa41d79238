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
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from fusionkit.checkpoint import Checkpoint, Source, TensorSpec
from fusionkit.errors import CheckpointError, FamilyError, listing

Role = Literal["delta", "exact", "frozen"]

BLOCK = 1 << 17
"""Entries per block of `TaskVectors.blocks`: small enough for eight tasks to stay in cache."""

_BUFFERS = ("*running_mean", "*running_var", "*num_batches_tracked")


@dataclass(frozen=True, eq=False)
class TaskVectors:
    """The task vectors of one tensor, one per task: θ_t − θ₀ in float32, formed on demand.

    Nothing but the tensors asked for is read or kept: `vectors[t]` forms one task's,
    `stack()` all of them, `blocks()` all of them a block at a time.

    Attributes:
        name: the tensor's name.
        shape: its shape.
        tasks: the tasks' names, in the order of the indices.
    """

    name: str
    shape: torch.Size
    tasks: tuple[str, ...]
    _base: Tensor
    _read: Callable[[int], Tensor]
    _label: Callable[[int | None], str]

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, task: int) -> Tensor:
        """One task's vector: float32 `(*shape)`.

        Raises:
            FamilyError: it holds a NaN or an infinity.
        """
        delta = torch.sub(self._read(task).to(torch.float32), self._base)
        self._check_finite(delta, task)
        return delta

    def stack(self) -> Tensor:
        """All tasks' vectors: float32 `(T, *shape)`."""
        stacked = torch.empty((len(self), *self.shape))
        for task in range(len(self)):
            stacked[task] = self[task]
        return stacked

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[slice, Tensor]]:
        """All tasks' vectors, flattened, a block of at most `size` entries at a time.

        Yields:
            the block's place in the flattened tensor, and float32 `(T, n)`; the memory is used
            again for the next block.

        Raises:
            FamilyError: a block holds a NaN or an infinity.
        """
        base = self._base.reshape(-1)
        tuned = [self._read(task).reshape(-1) for task in range(len(self))]
        buffer = torch.empty((len(self), min(size, base.numel())))
        for start in range(0, base.numel(), size):
            place = slice(start, min(start + size, base.numel()))
            block = buffer[:, : place.stop - start]
            for task, values in enumerate(tuned):
                torch.sub(values[place].to(torch.float32), base[place], out=block[task])
            if not torch.isfinite(block.sum()):
                for task in range(len(self)):
                    self._check_finite(block[task], task)
            yield place, block

    def _check_finite(self, delta: Tensor, task: int) -> None:
        # The sum is one cheap pass; only a suspicious one is looked at entry by entry.
        if torch.isfinite(delta.sum()) or torch.isfinite(delta).all():
            return
        bad = int((~torch.isfinite(delta)).sum())
        at_fault = self._label(task if torch.isfinite(self._base).all() else None)
        raise FamilyError(
            f"{at_fault}: tensor '{self.name}' holds {bad} values that are NaN or infinite "
            f"(task '{self.tasks[task]}'); mend or retrain that checkpoint"
        )


class Family:
    """A base model and the models fine-tuned from it; iterating streams their task vectors.

    Args:
        base: the base model: anything that `Checkpoint` reads.
        finetuned: task name → fine-tuned checkpoint: anything that `Checkpoint` reads.
        private: patterns (`classifier.*`) of the tensors that are each task's own.
        frozen: patterns of the tensors that equal the base's in every task.

    Attributes:
        base: the base's checkpoint.
        finetuned: task name → checkpoint.
        tasks: the tasks' names.
        roles: base tensor's name → role; private tensors and tied names are not in it.
        private: task name → names of its private tensors.
        tied: name → name of the tensor of the base that it shares.
        parameters: number of compressible parameters of one task (those with role delta).

    Raises:
        FamilyError: the checkpoints don't fit together; the message lists every finding with
            its file and tensor.
    """

    def __init__(
        self,
        base: Source | Checkpoint,
        finetuned: Mapping[str, Source | Checkpoint],
        private: Sequence[str] = (),
        frozen: Sequence[str] = (),
    ) -> None:
        if not finetuned:
            raise FamilyError("expected at least one fine-tuned checkpoint, got none")
        self.base = Checkpoint.of(base)
        self.finetuned = {task: Checkpoint.of(source) for task, source in finetuned.items()}
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
        self.parameters = sum(
            torch.Size(self.base.specs[name].shape).numel() for name in self.names("delta")
        )

    @property
    def bits_per_parameter(self) -> float:
        """Bits per compressible parameter in the fine-tuned checkpoints, over all tasks."""
        bits = sum(
            8
            * torch.Size(self.base.specs[name].shape).numel()
            * checkpoint.specs[known].dtype.itemsize
            for checkpoint in self.finetuned.values()
            for name in self.names("delta")
            if (known := self._known(checkpoint, name))
        )
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

    def vectors(self, name: str) -> TaskVectors:
        """The task vectors of one tensor."""
        base = self.base[name].to(torch.float32)
        return TaskVectors(
            name=name,
            shape=base.shape,
            tasks=self.tasks,
            _base=base,
            _read=lambda task: self._tuned(self.tasks[task], name),
            _label=lambda task: (
                f"{self.base.label} (the base)"
                if task is None
                else self.finetuned[self.tasks[task]].label
            ),
        )

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
                if known is None:
                    continue
                tuned = self.finetuned[task][known]
                if not torch.equal(self.base[name].to(tuned.dtype), tuned):
                    findings.append(f"{self.finetuned[task].label}: '{known}' (task '{task}')")
        if findings:
            raise FamilyError(
                f"tensors are declared frozen but differ from the base:{listing(findings)}\n"
                "take them out of `frozen`, so that their deltas are stored"
            )

    def write_into(self, task: str, base: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> None:
        """Write a task's own weights, uncompressed, into `out`, all but private and frozen ones.

        Args:
            task: one of `tasks`.
            base: the base's tensors; not needed here, but a bundle does.
            out: tensors to write into, by name.
        """
        for name, role in self.roles.items():
            if role == "delta" or (role == "exact" and name in out):
                out[name].copy_(self._tuned(task, name))

    def _tuned(self, task: str, name: str) -> Tensor:
        checkpoint = self.finetuned[task]
        known = self._known(checkpoint, name)
        if known is None:
            raise CheckpointError(f"{checkpoint.label}: no tensor '{name}'")
        return checkpoint[known]

    def _known(self, checkpoint: Checkpoint, name: str) -> str | None:
        """The first of the tensor's tied names that the checkpoint has."""
        return next((known for known in self._known_as[name] if known in checkpoint), None)

    def _is_private(self, name: str) -> bool:
        return matches(name, self.private_patterns)

    def _role(self, name: str, spec: TensorSpec) -> Role:
        if matches(name, self.frozen_patterns):
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
            if self._is_private(name) and name not in tuned:
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
                                f"give the base as Checkpoint(…, add_prefix='{prefix}') or the "
                                f"fine-tuned one as Checkpoint(…, strip_prefix='{prefix}')"
                            )
                break
        return ""


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a tensor's name matches one of the shell-style patterns (case matters)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
