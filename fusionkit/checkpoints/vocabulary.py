"""Vocabularies that grew: embeddings and heads of more rows in a fine-tuned model than in its base.

The rows that both have are seen as the tensor (`CommonRows`), so that all that compares, merges
and compresses goes on as with any other; the added rows are the task's own, and stored whole.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.checkpoints.checkpoint import Checkpoint, Pieces, TensorSpec
from fusionkit.checkpoints.view import View

_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|shared|word_embeddings?|tok(en)?_embeddings?|tok(en)?_emb|embed_in"
    r"|tokens_embed)\.weight$"
)
_OTHERS = re.compile(r"pos|type|segment|relative|time|class|label", re.IGNORECASE)
"""In names of embeddings of something else than tokens."""


def axis_of(shape: Sequence[int]) -> int:
    """The axis of a vocabulary's rows: the first that has more than one entry."""
    return next((axis for axis, size in enumerate(shape) if size != 1), 0)


def rows_in(shape: Sequence[int]) -> int:
    """How many rows a tensor of this shape has."""
    return shape[axis_of(shape)] if shape else 0


def with_rows(shape: Sequence[int], rows: int) -> tuple[int, ...]:
    """A shape, but of so many rows."""
    axis = axis_of(shape)
    return (*shape[:axis], rows, *shape[axis + 1 :])


def grown(shape: Sequence[int], rows: int) -> tuple[int, ...]:
    """A shape with so many rows more."""
    return with_rows(shape, rows_in(shape) + rows) if rows else tuple(shape)


def common(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The rows of a tensor that one of this shape has, too: a contiguous view of the first ones."""
    axis = axis_of(shape)
    return tensor if tensor.shape == torch.Size(shape) else tensor.narrow(axis, 0, shape[axis])


def beyond(tensor: Tensor, rows: int) -> Tensor:
    """A tensor's last so many rows: a view."""
    axis = axis_of(tensor.shape)
    return tensor.narrow(axis, tensor.shape[axis] - rows, rows)


def extended(tensor: Tensor, rows: Tensor) -> Tensor:
    """A tensor with rows added, in its dtype; differentiable."""
    return torch.cat([tensor, rows.to(tensor)], axis_of(tensor.shape))


def resized(base: Checkpoint, tuned: Checkpoint, names: Mapping[str, str]) -> dict[str, int]:
    """The vocabulary's tensors whose number of rows a fine-tuned model changed, and nothing else.

    Which tensors are a vocabulary's is the class's word; of a class that is not known, embeddings
    under well-known names. With them go all tensors that had as many rows, and have as many now:
    heads, their biases.

    Args:
        base: the base.
        tuned: the fine-tuned model.
        names: name in the base → name in the fine-tuned model.

    Returns:
        name in the base → number of rows added; negative: taken away.
    """
    changes: dict[str, tuple[int, int]] = {}
    for name, there in names.items():
        before, now = base.specs[name].shape, tuned.specs[there].shape
        if before != now and len(before) == len(now) and before:
            rows = now[axis_of(before)]
            if with_rows(before, rows) == now:
                changes[name] = rows_in(before), rows
    certain = {change for name, change in changes.items() if _is_vocabulary(base, name)}
    return {name: now - old for name, (old, now) in changes.items() if (old, now) in certain}


def left_behind(
    base: Checkpoint, tuned: Checkpoint, names: Mapping[str, str], added: Mapping[str, int]
) -> dict[str, str]:
    """What an adapter lacks: of a vocabulary that grew, tensors that it has no rows of.

    Args:
        base: the base.
        tuned: the base with the adapter merged in.
        names: name in the base → name there.
        added: name in the base → number of rows added.

    Returns:
        name in the base → one of the same vocabulary that did grow.
    """
    if tuned.stored is tuned:
        return {}
    sizes = {rows_in(base.specs[name].shape): name for name in added}
    return {
        name: sizes[rows_in(base.specs[name].shape)]
        for name, there in names.items()
        if name not in added and not tuned.touches(there) and _is_vocabulary(base, name)
        if rows_in(base.specs[name].shape) in sizes
    }


def common_rows(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    """See, of tensors that grew, the rows that others have, too.

    Args:
        checkpoint: the checkpoint.
        shapes: name → shape to be seen, that of the first rows.
    """
    return CommonRows(checkpoint, shapes) if shapes else checkpoint


class CommonRows(View):
    """A checkpoint of whose grown tensors the first rows are seen; what is not given is as below.

    Args:
        below: the checkpoint.
        shapes: name → shape to be seen.
    """

    def __init__(self, below: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(below)
        self._shapes = dict(shapes)
        seen = {n: TensorSpec(shape, below.specs[n].dtype) for n, shape in shapes.items()}
        self.specs = {**self.specs, **seen}

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor, or its first rows."""
        if name not in self._shapes:
            return super().__getitem__(name)
        spec = self.specs[name]
        return self.pieces(name)(slice(0, spec.numel)).view(spec.shape)

    def added(self, name: str) -> Tensor:
        """Read the rows that are not seen of a tensor that grew; nothing else is read."""
        spec, whole = self.specs[name], self._below.specs[name]
        shape = with_rows(spec.shape, rows_in(whole.shape) - rows_in(spec.shape))
        return self.pieces(name)(slice(spec.numel, whole.numel)).view(shape)

    def pieces(self, name: str) -> Pieces:
        """Read one tensor piece by piece, as below: what is seen comes first there."""
        return self._below.pieces(name)

    def delta(self, name: str) -> Tensor | None:
        """As below; of what grew, nobody knows it."""
        return None if name in self._shapes else super().delta(name)

    def low_rank(self, name: str) -> LowRank | None:
        """As below; of what grew, nobody knows it."""
        return None if name in self._shapes else super().low_rank(name)

    def row_delta(self, name: str, index: int) -> Tensor | None:
        """As below; of what grew, nobody knows it."""
        return None if name in self._shapes else super().row_delta(name, index)

    def row_low_rank(self, name: str, index: int) -> LowRank | None:
        """As below; of what grew, nobody knows it."""
        return None if name in self._shapes else super().row_low_rank(name, index)

    def in_memory(self, device: torch.device | None = None) -> Checkpoint:
        """A copy of what is below, seen likewise."""
        return CommonRows(self._below.in_memory(device), self._shapes)

    def _over(self, below: Checkpoint, names: Mapping[str, str]) -> View:
        seen = super()._over(below, names)
        return CommonRows(seen, {n: shape for n, shape in self._shapes.items() if n in seen})


def _is_vocabulary(base: Checkpoint, name: str) -> bool:
    known = base.architecture
    if known is None:
        return _EMBEDDING.search(name) is not None
    if name in known.vocabulary:
        return True
    if known.kinds.get(name) != "embedding":
        return False
    return bool(_EMBEDDING.search(name) or not (known.vocabulary or _OTHERS.search(name)))
