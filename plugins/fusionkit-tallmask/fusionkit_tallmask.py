"""TALL-masks and consensus merging: where tasks live in a merged vector (2405.07813)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fusionkit import (
    DeltaCodec,
    Encoded,
    Encoder,
    Family,
    Merge,
    MergeTensor,
    Parts,
    SharedParts,
    TaskArithmetic,
    TaskVectors,
)
from fusionkit.codecs.layout import Layout
from fusionkit.codecs.merged import SharedVector, decode_shared, shared_layout, shared_operand
from fusionkit.codecs.operands import Masked
from fusionkit.codecs.packing import bits_spec, pack_bits, unpack_bits
from fusionkit.codecs.values import ValueDtype
from fusionkit.errors import CodecError

if TYPE_CHECKING:
    from fusionkit import ReuseModule

Threshold = float | dict[str, float]
"""λ; or λ per task."""

GRID = (0.2, 0.3, 0.4, 0.5, 0.6)
"""The paper's values of λ."""


def tall_mask(vector: Tensor, merged: Tensor, threshold: float | Tensor) -> Tensor:
    """Where a task's own vector explains the merged one: |τ_t| ≥ λ |τ* − τ_t|, as bool.

    Args:
        vector: τ_t, float32 `(*shape)`, or `(T, *shape)`.
        merged: τ*, float32 `(*shape)`.
        threshold: λ; larger keeps less.
    """
    return vector.abs() >= threshold * (merged - vector).abs()


@dataclass(frozen=True)
class TALLMask(DeltaCodec):
    """Mask a merged vector by task: θ̂_t = θ₀ + M_t ⊙ τ*, M_t = 1 where |τ_t| ≥ λ |τ* − τ_t|.

    One vector is shared by all tasks; a task owns one bit per parameter. Where it is set τ* comes
    back as it is stored, else 0.

    Args:
        threshold: λ, or task → λ; the paper chooses each of {0.2, …, 0.6} on validation data, as
            `choose_thresholds` does.
        merge: how the shared vector is computed; none: the sum of the task vectors, the paper's.
        dtype: how its values are stored.

    Raises:
        CodecError: a threshold is negative.
    """

    id: ClassVar[str] = "tall_mask"
    threshold: Threshold = 0.4
    merge: Merge | None = None
    dtype: ValueDtype = "fp16"

    def __post_init__(self) -> None:
        object.__setattr__(self, "merge", self.merge or TaskArithmetic(1.0))
        _check(self.threshold, "TALLMask")

    def prepare(self, family: Family, shared: SharedParts | None = None) -> Encoder:
        """What the merge itself needs.

        Raises:
            CodecError: a task has no threshold.
        """
        thresholds = _per_task(self.threshold, family.tasks, "TALLMask")
        vector = SharedVector(self.merge, self.dtype, family, shared)

        def encode(vectors: TaskVectors) -> Encoded:
            merged = vector.of(vectors)
            if merged.values is None:
                return Encoded(vectors.name)
            masks = [
                {"mask": pack_bits(tall_mask(vectors[task], merged.values, threshold))}
                for task, threshold in enumerate(thresholds)
            ]
            return Encoded(vectors.name, merged.parts, masks)

        return Encoder(encode)

    def layout(self, shape: torch.Size) -> Layout:
        """The merged vector, and the mask."""
        return {**shared_layout(shape, self.dtype), "mask": bits_spec(shape.numel())}

    def decode(self, parts: Parts, shape: torch.Size) -> Tensor:
        """M_t ⊙ τ*."""
        merged = decode_shared(parts, shape, self.dtype)
        return merged.mul_(unpack_bits(parts["mask"], shape.numel()).view(shape))

    def operand(self, parts: Parts, shape: torch.Size) -> Masked | None:
        """The mask over the shared vector."""
        shared = shared_operand(parts, shape, self.dtype)
        return None if shared is None else Masked(shared.values, parts["mask"])


@dataclass(frozen=True)
class Consensus(Merge):
    """Keep what several tasks use: τ = s [Σ_t M_t ≥ k] ⊙ τ*, M_t the tasks' TALL-masks.

    Entries that one task alone uses, or none, only disturb the others.

    Args:
        merge: how τ* is computed; none: the sum of the task vectors, the paper's.
        threshold: λ of the masks, or task → λ.
        agree: k, the number of tasks that must use an entry.
        scale: s, on the result.

    Raises:
        CodecError: a threshold is negative, or `agree` is.
    """

    id: ClassVar[str] = "consensus"
    merge: Merge | None = None
    threshold: Threshold = 0.4
    agree: int = 2
    scale: float = 0.3

    def __post_init__(self) -> None:
        object.__setattr__(self, "merge", self.merge or TaskArithmetic(1.0))
        _check(self.threshold, "Consensus")
        if self.agree < 0:
            raise CodecError(f"expected Consensus's agree to be at least 0, got {self.agree}")

    def prepare(self, family: Family) -> MergeTensor:
        """What the merge prepares.

        Raises:
            CodecError: a task has no threshold.
        """
        limits = torch.tensor(_per_task(self.threshold, family.tasks, "Consensus"))
        assert self.merge is not None  # once constructed
        merge_tensor = self.merge.prepare(family)

        def merge(vectors: TaskVectors) -> Tensor:
            merged = merge_tensor(vectors)
            own = limits.to(vectors.device)[:, None]
            for place, block in vectors.blocks():
                entries = merged.view(-1)[place]
                used = tall_mask(block, entries, own).sum(0)
                entries.mul_(self.scale).mul_(used >= self.agree)
            return merged

        return merge


def choose_thresholds(
    module: "ReuseModule",
    datamodule: Any,
    trainer: Any,
    codec: TALLMask | None = None,
    grid: Sequence[float] = GRID,
) -> TALLMask:
    """Choose each task's λ by its score on validation rows, as the paper does.

    Args:
        module: its base and fine-tuned checkpoints.
        datamodule: of the family's tasks, with validation dataloaders.
        trainer: evaluates.
        codec: its other settings.
        grid: the values of λ to try; of equal scores the first wins.

    Returns:
        the codec with the thresholds found.
    """
    codec = codec or TALLMask()
    best: dict[str, tuple[float, float]] = {}
    for threshold in grid:
        module.reuse(module.compress(codec=replace(codec, threshold=threshold)))
        trainer.validate(module, datamodule=datamodule, verbose=False)
        assert module.scores is not None
        for task, score in module.scores.values.items():
            if task not in best or score > best[task][0]:
                best[task] = score, threshold
    return replace(codec, threshold={task: threshold for task, (_, threshold) in best.items()})


def _check(threshold: Threshold, what: str) -> None:
    values = threshold.values() if isinstance(threshold, Mapping) else [threshold]
    if bad := [value for value in values if not value >= 0]:
        raise CodecError(f"expected {what}'s threshold to be at least 0, got {bad[0]}")


def _per_task(threshold: Threshold, tasks: Sequence[str], what: str) -> list[float]:
    if not isinstance(threshold, Mapping):
        return [threshold] * len(tasks)
    if missing := [task for task in tasks if task not in threshold]:
        raise CodecError(f"{what} has no threshold of task '{missing[0]}'; add it to `threshold`")
    return [threshold[task] for task in tasks]
