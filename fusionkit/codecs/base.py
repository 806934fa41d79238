"""The extension point: a `DeltaCodec` turns a family's task vectors into payload tensors and back.

The contract, in the order of the data:

1. `prepare(family)` takes what must be known of the whole family before any tensor can be
   encoded (a threshold, say), by passes over it: `family.each` and `family.total` share such a
   pass out among threads and processes.
2. The `Encoder` that it returns encodes one tensor at a time into an `Encoded`: what all tasks
   share, and what each task owns. It is called in several threads, on some tensors only, in any
   order, so that it keeps nothing between two calls. Numbers that must be summed over the whole
   model go into `Encoded.sums`; `Encoder.finish` makes of their sum what belongs to no tensor in
   particular, under the name `WHOLE_MODEL`.
3. `decode(parts, shape)` gives back one task's delta of one tensor from its parts: the tensor's
   shared ones, the task's own, and the whole-model ones, by name. It is called only where there
   is a part of the tensor itself; a tensor of which nothing was encoded decodes to zero.
   `restore(parts, base)` gives back the tensor: base plus delta.

A codec is a frozen dataclass; its fields are its settings, kept in the bundle's manifest as JSON.
One that handles each tensor of each task alone derives from `TensorCodec` and writes two methods;
one whose tensors come back as they were, rather than as base plus delta, from `RestoringCodec`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.codecs.operands import Operand
from fusionkit.errors import CodecError
from fusionkit.registry import Plugin
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.vectors import TaskVectors

Parts = Mapping[str, Tensor]
"""Payload tensors by name."""

SharedParts = Callable[[str], Parts]
"""A tensor's name → its shared parts, as a bundle holds them."""

WHOLE_MODEL = ""
"""The name under which a codec yields what belongs to no tensor in particular."""

WHOLE = "tensor"
"""No codec's part may be called so: it is the tensor itself, as a task has it, stored whole."""


@dataclass(frozen=True)
class Encoded:
    """One tensor's payload.

    Attributes:
        name: the tensor's name, or `WHOLE_MODEL`.
        shared: parts that all tasks share, stored once.
        tasks: per task, in the family's order, the parts it owns; empty: none for any task.
        sums: what `Encoder.finish` needs of this tensor, of the same small shape for all; all
            tensors' are added up, in the base's order.
    """

    name: str
    shared: Parts = field(default_factory=dict)
    tasks: Sequence[Parts] = ()
    sums: Tensor | None = None


@dataclass(frozen=True)
class Encoder:
    """Encodes the tensors of one family, each by itself.

    Attributes:
        encode: encodes one tensor's task vectors; called by several threads, in any order.
        finish: makes the whole model's parts from the sum of all `Encoded.sums` (None if there
            are none); None: the codec has no such parts.
        close: called when no more is encoded; lets go of temporary files, say.
    """

    encode: Callable[[TaskVectors], Encoded]
    finish: Callable[[Tensor | None], Encoded | None] | None = None
    close: Callable[[], None] = lambda: None


class DeltaCodec(Plugin, ABC):
    """Base class of codecs; a subclass is a frozen dataclass that sets `id`."""

    cost: ClassVar[str] = ""
    """What a task takes, in bits, as a formula that 'fusionkit codecs ID' shows."""
    group: ClassVar[str] = "fusionkit.codecs"
    usual: ClassVar[dict[str, Any]] = {}
    """Settings that a list of codecs (`--codecs svd,emr`) gives it, where it can't do without."""
    unscalable: ClassVar[str | None] = None
    """Why decoded deltas may not be scaled or added to others', where they may not."""
    restores: ClassVar[bool] = False
    """Whether tensors come back by `restore` alone, in the dtype that it gives them; else they
    are base plus `decode`, rounded to the dtype of the model that they go into."""
    learned: ClassVar[tuple[str, ...]] = ()
    """Names of a task's parts that `fusionkit calibrate` may learn: floats in which `decode` is
    differentiable."""

    @property
    def packs(self) -> bool:
        """Whether a file's small parts are packed: for codecs whose parts are a few bytes each.

        They take less, but no other reader of safetensors finds them.
        """
        return False

    @property
    def uses_sensitivities(self) -> bool:
        """Whether `prepare` looks at `family.sensitivities`, which calibration then measures."""
        return False

    @property
    def uses_moments(self) -> bool:
        """Whether `prepare` looks at `family.moments`, and at the sensitivities beside them."""
        return False

    def likely_bytes(self, shapes: Mapping[str, Sequence[int]], tasks: int) -> int | None:
        """About how many bytes the payload takes. Overriding is optional.

        Who writes a bundle to a disk with less room is warned before the work.

        Args:
            shapes: of the tensors that are compressed, by name.
            tasks: how many there are.

        Returns:
            of all tasks, and what they share; None: it can't be told from this.
        """
        return None

    @abstractmethod
    def prepare(self, family: Family, shared: SharedParts | None = None) -> Encoder:
        """Take what must be known of the whole family, and return what encodes its tensors.

        Args:
            family: whose task vectors to compress.
            shared: given when tasks are added to a bundle: its shared parts, to encode against
                as they are. Codecs without shared parts don't use it.
        """

    @abstractmethod
    def decode(self, parts: Parts, shape: torch.Size) -> Tensor:
        """Rebuild one task's delta of one tensor.

        Args:
            parts: the tensor's shared parts and the task's own, and the whole-model ones.
            shape: the tensor's shape.

        Returns:
            float32 `(*shape)`, on the parts' device.
        """

    def restore(self, parts: Parts, base: Tensor) -> Tensor:
        """Rebuild one task's tensor: base plus delta, unless the codec `restores`.

        Args:
            parts: as for `decode`.
            base: the base's tensor `(*shape)`, in its own dtype, on the parts' device; not to be
                changed.

        Returns:
            float32 `(*shape)`, not rounded: that is for whoever writes it.
        """
        return self.added(parts, base)

    def added(self, parts: Parts, base: Tensor, out: Tensor | None = None) -> Tensor:
        """Base plus delta. Overriding is optional: for a sum without a pass over memory for each.

        Args:
            parts: as for `decode`.
            base: the base's tensor `(*shape)`, in its own dtype, on the parts' device; not to be
                changed.
            out: float32 `(*shape)`, on the same device, to form the sum in; not the base.

        Returns:
            float32 `(*shape)`: `out`, or a new tensor.
        """
        delta = self.decode(parts, base.shape)
        if delta.shape != base.shape:
            return delta  # never spread over the base: its shape is what is wrong with it
        return torch.add(base.to(torch.float32), delta, out=out)

    def factors(self, parts: Parts, shape: torch.Size) -> LowRank | None:
        """One task's delta of one matrix as a product, where the codec has it as one.

        Such deltas can be exported as a LoRA. Overriding is optional.

        Args:
            parts: as for `decode`.
            shape: the tensor's shape.

        Returns:
            float32 factors, or None.
        """
        return None

    def operand(self, parts: Parts, shape: torch.Size) -> Operand | None:
        """One task's delta of one tensor in a form that is used without decoding it whole.

        In a batch of many tasks it is what is in memory of the task. Overriding is optional.

        Args:
            parts: as for `decode`.
            shape: the tensor's shape.

        Returns:
            what `decode` gives, but for rounding, as a product, by masks, signs or positions (see
            `fusionkit.codecs.operands`); None where it has to be decoded. By default the `factors`.
        """
        return self.factors(parts, shape)


class TensorCodec(DeltaCodec):
    """Base of codecs that handle each tensor of each task alone."""

    @abstractmethod
    def encode_tensor(self, delta: Tensor, name: str) -> Parts:
        """Compress one delta.

        Args:
            delta: float32 `(*shape)`.
            name: the tensor's name.

        Returns:
            payload tensors by name; none at all if the delta may come back as zero.
        """

    def prepare(self, family: Family, shared: SharedParts | None = None) -> Encoder:
        """Nothing to prepare: tensor by tensor, task by task."""
        return Encoder(
            lambda vectors: Encoded(
                vectors.name,
                tasks=[self.encode_tensor(vectors[t], vectors.name) for t in range(len(vectors))],
            )
        )


class RestoringCodec(DeltaCodec):
    """Base of codecs that give back each tensor of each task itself, in its own dtype.

    Base plus a float32 delta, rounded, is not always the fine-tuned tensor to the bit; what such
    a codec restores is.
    """

    restores: ClassVar[bool] = True
    unscalable: ClassVar[str | None] = (
        "it gives back whole tensors, to the bit, where scaled deltas would have to be added"
    )

    @abstractmethod
    def encode_restorable(self, tuned: Tensor, base: Tensor) -> Parts:
        """Compress one fine-tuned tensor, given the base's.

        Args:
            tuned: the fine-tuned tensor, `(*shape)`, in its own floating dtype.
            base: the base's, `(*shape)`, in its own floating dtype.

        Returns:
            payload tensors by name; none at all where the base's comes back instead.
        """

    @abstractmethod
    def restore(self, parts: Parts, base: Tensor) -> Tensor:
        """Give back one fine-tuned tensor.

        Args:
            parts: as for `decode`.
            base: the base's tensor, in its own dtype, on the parts' device; not to be changed.

        Returns:
            `(*shape)`, in the dtype it is to have.
        """

    def prepare(self, family: Family, shared: SharedParts | None = None) -> Encoder:
        """Nothing to prepare: tensor by tensor, task by task."""
        return Encoder(
            lambda vectors: Encoded(
                vectors.name,
                tasks=[
                    self.encode_restorable(vectors.tuned(task), vectors.base)
                    for task in range(len(vectors))
                ],
            )
        )

    def decode(self, parts: Parts, shape: torch.Size) -> Tensor:
        """Not without the base: `Bundle.delta` takes the difference."""
        raise CodecError(f"{type(self).__name__} restores tensors, and only beside the base")
