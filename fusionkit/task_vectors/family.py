"""A family: one base model and the models fine-tuned from it, read as a stream of task vectors.

What base and fine-tuned checkpoints must agree in is in `checks`; what each tensor of the base is,
its role, in `roles`.

Tensors declared *private* (a task's own head) belong to their task alone: stored whole, never
compressed or merged, and free to differ in shape or to be absent from the base. So do the rows that
a task added to the base's vocabulary, in embeddings and heads; the rows before them have a role.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from typing import Self, TypeVar

import torch
from torch import Tensor

from fusionkit.checkpoints.adapters.modules import Adapters
from fusionkit.checkpoints.checkpoint import Checkpoint, Source, matches
from fusionkit.checkpoints.stacks import split
from fusionkit.checkpoints.vocabulary import CommonRows, common_rows, resized
from fusionkit.errors import CheckpointError, FamilyError, in_line, lacks, listing
from fusionkit.task_vectors.checks import check_fit, check_patterns, warn_of_settings
from fusionkit.task_vectors.moments import Moments
from fusionkit.task_vectors.opened import open_models
from fusionkit.task_vectors.roles import Role, Roles, stacks_of, ties_of, touches
from fusionkit.task_vectors.vectors import Change, ChangedVectors, Located, TaskVectors
from fusionkit.task_vectors.workers import Workers, total

Result = TypeVar("Result")


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
        workers: who does the passes over it; by default some threads of this process.
        device: where task vectors are formed, and so encoded.

    Attributes:
        base: the base's checkpoint.
        finetuned: task name → checkpoint.
        tasks: the tasks' names.
        roles: base tensor's name → role; private tensors and tied names are not in it.
        private: task name → names of its private tensors.
        vocabulary: task name → name of a tensor that it added rows to → how many.
        tied: name → name of the tensor of the base that it shares, in every task.
        stacks: name of a stack of experts → how many matrices it is split into, `name[0]`, ….
        space: how adapters' own tensors make the base's weights; None where they are merged.
        sizes: name of a tensor to compress (of role delta) → its number of entries.
        parameters: number of compressible parameters of one task.
        workers: see above; one tensor at a time where the base is read by several processes.
        device: see above.
        sensitivities: task → tensor's name → how much the task's outputs feel noise in an entry
            of it; empty, but where data have told: then codecs may give more bits to such.
        moments: task → matrix's name → the same by directions; empty as well.
        beside: task → key → bytes of what a bundle keeps of it beside its tensors, whole: rows that
            it added, files beside its weights. Filled by who writes a bundle.
        version: always the same, as its tasks are.

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
        workers: Workers | None = None,
        device: torch.device | str = "cpu",
        rename: Mapping[str, str] | None = None,
        ignore: Sequence[str] = (),
    ) -> None:
        if not finetuned:
            raise FamilyError("expected at least one fine-tuned checkpoint, got none")
        self.rename, self.ignore = dict(rename or {}), tuple(ignore)
        opened = open_models(base, finetuned, adapters, self.rename, self.ignore)
        self.private_patterns, self.frozen_patterns = tuple(private), tuple(frozen)
        check_patterns(opened.base, opened.finetuned, private, frozen)
        self.space = opened.space
        models = opened.base, [*opened.finetuned.values()]
        self.stacks = {} if self.space else stacks_of(*models, self._is_private)
        self.base = split(opened.base, self.stacks)
        self.finetuned = {task: split(each, self.stacks) for task, each in opened.finetuned.items()}
        self.tasks = tuple(self.finetuned)
        seen = self.base, [*self.finetuned.values()]
        self.tied = ties_of(*seen, self._is_private)
        rules = Roles(*seen, self.frozen_patterns, self.stacks, self.space)
        self.roles = {
            name: rules.of(name)
            for name in self.base
            if name not in self.tied and not self._is_private(name)
        }
        self._known_as: dict[str, list[str]] = {name: [name] for name in self.roles}
        for alias, name in self.base.aliases.items():
            if alias in self.tied:
                self._known_as.setdefault(name, [name]).append(alias)
            elif alias in self._known_as:  # apart in another task
                self._known_as[alias].append(name)
        self.private = {
            task: sorted(name for name in checkpoint if self._is_private(name))
            for task, checkpoint in self.finetuned.items()
        }
        self.vocabulary = {task: self._added(tuned) for task, tuned in self.finetuned.items()}
        self.finetuned = {task: self._common(task) for task in self.tasks}
        wanted = [] if self.space else [name for name in self.base if self._is_private(name)]
        vocabulary = self.vocabulary
        check_fit(
            self.base, self.finetuned, self.roles, self._known_as, self.private, wanted, vocabulary
        )
        warn_of_settings(self.base, self.finetuned)
        self._changes: tuple[Callable[[TaskVectors], Sequence[Change | None]], ...] = ()
        self.device = torch.device(device)
        self.sensitivities: Mapping[str, Mapping[str, float]] = {}
        self.moments: Mapping[str, Mapping[str, Moments]] = {}
        self.beside: Mapping[str, Mapping[str, int]] = {}
        workers = workers or Workers()
        self.workers = workers.one_by_one() if self.base.serial else workers
        self.sizes = {name: self.base.specs[name].numel for name in self.names("delta")}
        self.parameters = sum(self.sizes.values())

    def __repr__(self) -> str:
        tasks = f"{len(self.tasks)} tasks ({in_line(self.tasks)})"
        roles = Counter(self.roles.values())
        counts = ", ".join(f"{count} {role}" for role, count in sorted(roles.items()))
        private = len({name for names in self.private.values() for name in names})
        return f"Family({self.base.label!r}, {tasks}, tensors: {counts}, {private} private)"

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"the family of {self.base.label}"

    @property
    def bits_per_parameter(self) -> float:
        """Bits per compressible parameter in the fine-tuned checkpoints, over all tasks."""
        bits = 0
        for checkpoint in self.finetuned.values():
            own = checkpoint.stored
            if own is checkpoint:
                names = [known for n in self.names("delta") if (known := self._known(own, n))]
            else:
                names = [name for name in own if not self._is_private(name)]
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
        tuned = {
            task: Located(checkpoint, self._name_in(checkpoint, name))
            for task, checkpoint in self.finetuned.items()
        }
        vectors = TaskVectors(Located(self.base, name), tuned, self.device)
        for changes in self._changes:
            vectors = ChangedVectors(vectors, changes(vectors))
        return vectors

    def exact(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """A task's exact tensors that differ from the base's, in their own dtype.

        Raises:
            FamilyError: there is no such task.
        """
        for name in self.names("exact"):
            tuned = self._tuned(task, name)
            base = self.base[name]
            if tuned.dtype != base.dtype or not torch.equal(tuned, base):
                yield name, tuned

    def private_tensors(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """A task's private tensors, whole, in their own dtype.

        Raises:
            FamilyError: there is no such task.
        """
        checkpoint = self._checkpoint(task)
        for name in self.private[task]:
            yield name, checkpoint[name]

    def added(self, task: str) -> dict[str, int]:
        """The tensors that a task added rows to → how many.

        Raises:
            FamilyError: there is no such task.
        """
        self._checkpoint(task)
        return self.vocabulary[task]

    def added_rows(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """The rows that a task added to the vocabulary, by tensor, in their own dtype.

        Raises:
            FamilyError: there is no such task.
        """
        checkpoint = self._checkpoint(task)
        for name in self.vocabulary[task]:
            assert isinstance(checkpoint, CommonRows)
            yield name, checkpoint.added(self._name_in(checkpoint, name))

    def unfrozen(self) -> list[str]:
        """Frozen tensors that differ from the base's, with the file and task that has them."""
        findings = []
        for task in self.tasks:
            for name in self.names("frozen"):
                known = self._known(self.finetuned[task], name)
                if known is None or not touches(self.finetuned[task], name, self.space):
                    continue
                tuned = self.finetuned[task][known]
                if not _equal(self.base[name].to(tuned.dtype), tuned):
                    findings.append(f"{self.finetuned[task].label}: '{known}' (task '{task}')")
        return findings

    def check_frozen(self) -> None:
        """Check that frozen tensors, where present, do equal the base's.

        Raises:
            FamilyError: one differs.
        """
        if findings := self.unfrozen():
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
        """One of a task's tensors, uncompressed, in its own dtype; see `TaskSource`.

        Raises:
            FamilyError: there is no such task.
        """
        return self._tuned(task, name).to(base.device)

    def _prefetch(self, name: str) -> None:
        self.base.prefetch(name)
        for checkpoint in self.finetuned.values():
            checkpoint.prefetch(self._name_in(checkpoint, name))

    def _added(self, tuned: Checkpoint) -> dict[str, int]:
        names = {name: known for name in self.roles if (known := self._known(tuned, name))}
        return {name: rows for name, rows in resized(self.base, tuned, names).items() if rows > 0}

    def _common(self, task: str) -> Checkpoint:
        """A fine-tuned checkpoint with as many rows of the vocabulary as the base has."""
        tuned = self.finetuned[task]
        shapes = {n: self.base.specs[n].shape for n in self.vocabulary[task]}
        return common_rows(tuned, {self._name_in(tuned, n): each for n, each in shapes.items()})

    def _checkpoint(self, task: str) -> Checkpoint:
        if task not in self.finetuned:
            raise FamilyError(lacks(self.label, task, self.tasks))
        return self.finetuned[task]

    def _tuned(self, task: str, name: str) -> Tensor:
        checkpoint = self._checkpoint(task)
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


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and dtype are the same, NaN being the same as NaN."""
    return torch.equal(one, other) or bool((one.isclose(other, 0, 0, equal_nan=True)).all())
