"""A seeded orthogonal rotation of a matrix on both sides, after which its entries look Gaussian.

`X = R_m A R_nᵀ` for `A` of shape (m, n). `R_m` and `R_n` are orthogonal, and follow from the seed,
the matrix's place, the side and the size alone, in exact integer arithmetic, so that all machines
make the same. Each is applied in O(n log n) steps and never formed. For a vector x of n entries,
with p the largest power of two that is at most n:

    R = W(s₃, s₄) P W(s₁, s₂) D
    W(s, s′) x: x ← s ∘ x;  x[:p] ← H x[:p];  and if p < n:  x ← s′ ∘ x;  x[n−p:] ← H x[n−p:]

`H` is the orthonormal Walsh-Hadamard matrix, in natural order: (−1)^popcount(i & j) / √p at i, j.
If n is a power of two, that is `H S₃ P H S₁`; else the two windows overlap, as p > n / 2, and hold
all entries between them, so that R mixes all. Between the windows there must be signs: H of a part
of H is nearly a single entry without.

Signs and permutation are read from n words of 64 bits, `w[i] = mix(k + iγ)`, with (modulo 2⁶⁴)

    γ = 0x9E3779B97F4A7C15
    mix(z): z += γ;  z = (z ^ z >> 30) · 0xBF58476D1CE4E5B9;
            z = (z ^ z >> 27) · 0x94D049BB133111EB;  z ^ z >> 31        (SplitMix64)
    k = mix(mix(mix(seed) ^ side) ^ n), where side is 0 for R_m and 1 for R_n

`s₁` to `s₄` at i are −1 where bit 0 to 3 of `w[i]` is set, else 1; `(P x)[i] = x[order[i]]`, where
`order` sorts the words, the earlier first of equal ones. `D` is −1 at i where bit `i mod 64` of
`mix(mix(mix(k) ^ place) + (i div 64) γ)` is set, else 1. So all but D is drawn once for a size; by
D, directions that matrices have in common, as all layers of a model may, are rotated another way in
each, and errors don't add up over the layers. The two sides differ even if m = n; with the same R
on both, a multiple of the identity would stay one.

A rank-1 matrix stays one, whatever is done on its sides: its entries become products of two
Gaussian numbers. All other matrices come as near to Gaussian as their spectrum is flat.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.codecs.rotation_sides import Side, side_of
from fusionkit.codecs.threads import CACHED, over, panels, scratch

if TYPE_CHECKING:
    from fusionkit.codecs.rotation_kernels import Addend


def rotate(
    matrix: Tensor,
    seed: int,
    inverse: bool = False,
    *,
    place: int = 0,
    product: LowRank | None = None,
    base: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`R_m A R_nᵀ`, or from that `A` again: see the module's docstring; and what is added to it.

    On the CPU, as many threads work as `torch.get_num_threads()` says; the result doesn't depend
    on how many. What is added costs no pass over memory of its own.

    Args:
        matrix: float32 `(m, n)`.
        seed: at least 0 and less than 2⁶⁴.
        inverse: undo it: `R_mᵀ A R_n`.
        place: of the matrix among those that are rotated, from 0 on.
        product: `left @ right.T` is added.
        base: float32 `(m, n)`, on the same device; is added, last.
        out: contiguous float32 `(m, n)` on the same device, to write to; may be `matrix`, not
            `base`.

    Returns:
        float32 `(m, n)`, contiguous, on the same device: `out`, or a new tensor.

    Raises:
        ValueError: the matrix, what is added, `out` or the seed is not such.
    """
    if matrix.ndim != 2 or matrix.dtype != torch.float32:
        raise ValueError(f"expected a float32 matrix, got {matrix.dtype} {tuple(matrix.shape)}")
    source, target = matrix.detach(), target_of(matrix.shape, matrix.device, out)
    left, right = _sides(matrix.shape, seed, inverse, place)
    added = Added.of(target, product, base)
    if not target.numel():
        return target
    if target.device.type != "cpu":
        return added.write(target, _on_device(source, left, right))
    from fusionkit.codecs import rotation_kernels as kernels

    flat, between = flat_of(source), _between(target)
    width = kernels.width(target.shape[1])

    def columns(begin: int, end: int) -> None:
        work = panels(len(left.order) * width)
        kernels.rotate_columns(flat, between, work, left.steps(), begin, end)

    over(target.shape[1], width, target.numel(), columns)
    _rotate_rows(between, target, right, added)
    return target


def rotate_sparse(
    positions: Tensor,
    values: Tensor,
    shape: tuple[int, int] | torch.Size,
    seed: int,
    scale: float,
    *,
    place: int = 0,
    product: LowRank | None = None,
    base: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Undo the rotation of a matrix that is zero but for a few entries: `R_mᵀ X R_n`.

    Args:
        positions: int32 or int64 `(count,)`, strictly increasing: where X, flat, is not zero.
        values: `(count,)`, of any real dtype, on the same device: signs, say.
        shape: `(m, n)`.
        seed: see `rotate`.
        scale: what the values are multiplied by.
        place: see `rotate`.
        product: see `rotate`.
        base: see `rotate`.
        out: see `rotate`.

    Returns:
        float32 `(m, n)`, contiguous, on the positions' device: `out`, or a new tensor.

    Raises:
        ValueError: the positions are not increasing, or not within the shape; there are not as
            many values; what is added, `out` or the seed is not what it should be.
    """
    target = target_of(torch.Size(shape), positions.device, out)
    left, right = _sides(target.shape, seed, True, place)
    _check_positions(positions, values, target.numel())
    added = Added.of(target, product, base)
    if not target.numel():
        return target
    if target.device.type != "cpu":
        target.zero_().view(-1)[positions.long()] = values.to(torch.float32) * scale
        return added.write(target, _on_device(target, left, right))
    from fusionkit.codecs import rotation_kernels as kernels

    (m, n), between = target.shape, _between(target)
    places, numbers = positions.long().numpy(), (values.to(torch.float32) * scale).numpy()
    width = kernels.width(n)
    by_panel = kernels.panels(places, numbers, n, width)

    def columns(begin: int, end: int) -> None:
        work = panels(m * width)
        kernels.rotate_sparse_columns(by_panel, between, work, left.steps(), begin, end)

    over(n, width, target.numel(), columns)
    _rotate_rows(between, target, right, added)
    return target


class Added(NamedTuple):
    """What is added to a rotated matrix: `left @ right`, and a base."""

    left: Tensor
    right: Tensor
    base: Tensor | None

    @classmethod
    def of(cls, target: Tensor, product: LowRank | None, base: Tensor | None) -> "Added":
        """What is given, checked to fit a target.

        Raises:
            ValueError: it doesn't.
        """
        m, n = target.shape
        left, right = product or LowRank(target.new_empty(m, 0), target.new_empty(n, 0))
        rank = left.shape[-1]
        for given, shape in (left, (m, rank)), (right, (n, rank)), (base, (m, n)):
            if given is None:
                continue
            if given.shape != shape or given.dtype != torch.float32:
                raise ValueError(
                    f"expected float32 {shape} to be added, got {given.dtype} {tuple(given.shape)}"
                )
        return cls(left.detach(), right.detach().mT, base)

    def flat(self, target: Tensor) -> "Addend":
        """As the compiled loops take it."""
        base = target.new_empty(0) if self.base is None else self.base
        return flat_of(self.left), flat_of(self.right), self.left.shape[1], flat_of(base)

    def write(self, target: Tensor, rotated: Tensor) -> Tensor:
        """The sum, in PyTorch."""
        delta = torch.addmm(rotated, self.left, self.right)
        return target.copy_(delta if self.base is None else self.base + delta)


def _rotate_rows(between: NDArray[np.float32], matrix: Tensor, side: Side, added: Added) -> None:
    from fusionkit.codecs import rotation_kernels as kernels

    flat, addend, height = flat_of(matrix), added.flat(matrix), kernels.HEIGHT

    def rows(begin: int, end: int) -> None:
        work = panels(len(side.order) * height)
        kernels.rotate_rows(between, flat, work, side.steps(), addend, begin, end)

    over(matrix.shape[0], height, matrix.numel(), rows)


def flat_of(matrix: Tensor) -> NDArray[np.float32]:
    """A matrix's memory, row by row, or that of a copy, as the compiled loops take it."""
    return matrix.detach().contiguous().view(-1).numpy()


def _between(target: Tensor) -> NDArray[np.float32]:
    """Where columns are written to, for the rows to be read from: memory in the cache, if it fits.

    Columns are written a line of the cache at a time, which is slow in memory that is not there.
    """
    if target.numel() > CACHED:
        return flat_of(target)
    return scratch("between", target.numel())


def target_of(shape: torch.Size, device: torch.device, out: Tensor | None) -> Tensor:
    """What a matrix is written to: `out`, or a new tensor.

    Raises:
        ValueError: `out` is not contiguous float32 of this shape, on this device.
    """
    if len(shape) != 2 or min(shape) < 0:
        raise ValueError(f"expected the shape of a matrix, got {tuple(shape)}")
    if out is None:
        return torch.empty(shape, device=device)
    fits = out.shape == shape and out.dtype == torch.float32 and out.device == device
    if not fits or not out.is_contiguous():
        raise ValueError(
            f"expected out to be contiguous float32 {tuple(shape)} on {device}, got "
            f"{out.dtype} {tuple(out.shape)} on {out.device}, strides {out.stride()}"
        )
    return out


def _check_positions(positions: Tensor, values: Tensor, total: int) -> None:
    if positions.ndim != 1 or positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"expected int32 or int64 positions in one dimension, got {positions.dtype} "
            f"{tuple(positions.shape)}"
        )
    if values.shape != positions.shape:
        raise ValueError(f"expected {len(positions)} values, got shape {tuple(values.shape)}")
    if not len(positions):
        return
    if int(positions[0]) < 0 or int(positions[-1]) >= total:
        raise ValueError(f"a position lies outside the {total} entries")
    if not bool((positions[1:] > positions[:-1]).all()):
        raise ValueError("expected positions that increase strictly")


def _sides(shape: torch.Size, seed: int, inverse: bool, place: int = 0) -> tuple[Side, Side]:
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"expected a seed from 0 to 2**64 - 1, got {seed}")
    m, n = shape
    return side_of(seed, 0, m, inverse, place), side_of(seed, 1, n, inverse, place)


def _on_device(matrix: Tensor, left: Side, right: Side) -> Tensor:
    """The same in PyTorch."""
    m, n = matrix.shape
    turned = _turned(matrix.reshape(1, m, n), left).view(m, n, 1)
    return _turned(turned, right).view(m, n)


def _turned(vectors: Tensor, side: Side) -> Tensor:
    """Each `(n,)` of `(outer, n, inner)` rotated."""
    factors = torch.from_numpy(side.factors).to(vectors.device)[:, :, None]
    order = torch.from_numpy(side.order).to(vectors.device)
    one = side.windows[0] == side.windows[1]
    now = vectors * factors[0]
    for half in (0, 1):
        if half:
            now = now[:, order].mul_(factors[2])
        for window, start in enumerate(side.windows[:1] if one else side.windows):
            if window:
                now.mul_(factors[2 * half + 1])
            part = now[:, start : start + side.power]
            part.copy_(hadamard(part))
    return now.mul_(factors[4])


def hadamard(vectors: Tensor) -> Tensor:
    """Each `(p,)` of `(outer, p, inner)` times the matrix of ±1."""
    shape, stride = vectors.shape, 1
    while stride < shape[1]:
        pairs = vectors.reshape(shape[0], -1, 2, stride * shape[2])
        a, b = pairs.unbind(2)
        vectors = torch.stack((a + b, a - b), 2)
        stride *= 2
    return vectors.reshape(shape)
