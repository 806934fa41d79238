"""BitDelta: the sign of every weight's delta, and one scale per matrix (Liu et al., 2402.10193)."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fusionkit import Parts, TensorCodec
from fusionkit.codecs.decomposition import matrix_of
from fusionkit.codecs.layout import Layout, PartSpec
from fusionkit.codecs.operands import Signs
from fusionkit.codecs.packing import bits_spec, pack_bits, unpack_bits
from fusionkit.codecs.values import ValueDtype, pack_values, unpack_values, values_layout
from fusionkit.errors import CodecError


@dataclass(frozen=True)
class BitDelta(TensorCodec):
    """Keep a sign per weight and a scale per matrix: θ̂_t = θ₀ + a sgn(τ_t), a = mean|τ_t|.

    The scale is the one of least weight error; `fusionkit calibrate` learns it further, from the
    fine-tuned model's outputs (the paper's scale distillation). A delta of exactly 0 counts as
    positive. Of n weights the squared error is ‖τ_t‖² − n a². Vectors, and matrices that match
    `keep`, are kept whole.

    Args:
        keep: patterns of the matrices that are kept whole; the paper's are all but the linear
            layers of attention and MLP.
        dtype: how the values that are kept whole are stored.
        scales: a scale for every `matrix`, in fp32, as in the paper; or for every `row` or
            `column`, the mean of |τ_t| over it, in bf16: 16 bits more for each. A tensor of more
            than two axes counts as the matrix (first axis) × (all others).

    Raises:
        CodecError: `scales` is none of these.
    """

    id: ClassVar[str] = "bitdelta"
    learned: ClassVar[tuple[str, ...]] = ("scale",)
    keep: tuple[str, ...] = ("*embed*", "*lm_head*")
    dtype: ValueDtype = "fp16"
    scales: Literal["matrix", "row", "column"] = "matrix"

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(self.keep))
        if self.scales not in ("matrix", "row", "column"):
            raise CodecError(
                f"expected BitDelta's scales to be matrix, row or column, got '{self.scales}'"
            )

    def encode_tensor(self, delta: Tensor, name: str) -> Parts:
        """Signs, one bit each, and the scales, `(1,)`, `(rows,)` or `(columns,)`; or the values."""
        if not delta.any():
            return {}
        if delta.ndim < 2 or any(fnmatchcase(name, pattern) for pattern in self.keep):
            return pack_values(delta.reshape(-1), self.dtype)
        magnitudes = delta.abs().reshape(matrix_of(delta.shape))
        if self.scales == "matrix":
            scale = magnitudes.mean().view(1)
        else:
            scale = magnitudes.mean(1 if self.scales == "row" else 0).to(torch.bfloat16)
        return {"signs": pack_bits(delta >= 0), "scale": scale}

    def layout(self, shape: torch.Size) -> Layout:
        """Signs and scales, or the values."""
        rows, columns = matrix_of(shape) if len(shape) > 1 else (1, shape.numel())
        scale = PartSpec(torch.bfloat16, (rows if self.scales == "row" else columns,))
        return {
            **values_layout((shape.numel(),), self.dtype),
            "signs": bits_spec(shape.numel()),
            "scale": PartSpec(torch.float32, (1,)) if self.scales == "matrix" else scale,
        }

    def decode(self, parts: Parts, shape: torch.Size) -> Tensor:
        """A sgn(τ_t); differentiable in a."""
        if "values" in parts:
            return unpack_values(parts, shape.numel(), self.dtype).view(shape)
        signs = unpack_bits(parts["signs"], shape.numel()).to(torch.float32).mul_(2).sub_(1)
        scale = parts["scale"].to(torch.float32)
        if self.scales == "row":
            scale = scale[:, None]
        return (signs.view(matrix_of(shape)) * scale).view(shape)

    def operand(self, parts: Parts, shape: torch.Size) -> Signs | None:
        """The signs and their scales; None of a tensor that was kept whole."""
        if "values" in parts:
            return None
        scale = parts["scale"]
        return Signs(parts["signs"], scale[:, None] if self.scales == "row" else scale)
