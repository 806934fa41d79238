"""One tensor's codes, as `Sketch` stores them: a head, the directions' settings, one coded stream.

    head        15 bytes: form, place, rank, count or model, σ; see `_HEAD`
    step        float32, where there are directions
    directions  4 bytes each: models of left and right, step, gain; see `quantized_factors`
    stream      coded by `entropy`: each direction's left and right, then the sketch

A model is a byte: a scale, and 64 where it is a Laplace distribution's.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusionkit.codecs import entropy
from fusionkit.codecs.entropy import Bits, Gaps, Gaussian, Laplace, Model
from fusionkit.codecs.quantized_factors import HEADER, QuantizedFactors
from fusionkit.codecs.sign_sketch import Sketched

NOTHING, SIGNS, INTEGERS, PLAIN = range(4)
"""Forms: directions alone; rotated, as signs, as integers; integers, not rotated."""

_HEAD = np.dtype(
    [("form", "u1"), ("place", "<u4"), ("rank", "<u2"), ("count", "<u4"), ("scale", "<f4")]
)
_LAPLACE = 64

FIXED_BYTES = _HEAD.itemsize + 4 + 6
"""Bytes of a tensor's codes that are not for a direction, nor a symbol's: the stream's own too."""


class Codes(NamedTuple):
    """What is stored of one tensor.

    Attributes:
        form: see above.
        place: the tensor's place among its task's gains.
        factors: the directions that are kept; None: none are.
        sketch: int32 symbols: signs of 1 and -1; integers; None of form `NOTHING`.
        positions: int64, of the signs.
        scale: σ.
    """

    form: int
    place: int
    factors: QuantizedFactors | None
    sketch: Tensor | None
    positions: Tensor | None
    scale: float


def write(
    form: int, place: int, factors: QuantizedFactors | None, sketched: Sketched | None
) -> Tensor:
    """The codes of one tensor: uint8 `(bytes,)`."""
    rank = factors.left.shape[1] if factors else 0
    count, scale = (sketched.kept, sketched.scale) if sketched else (0, 0.0)
    runs = list(sketched.runs) if sketched else []
    if form in (INTEGERS, PLAIN):
        count = _byte(runs[0][1])
    head = np.array([(form, place, rank, count, scale)], _HEAD).tobytes()
    if factors:
        of_factors = runs_of(factors)
        models = np.array([_byte(model) for _, model in of_factors], np.uint8).reshape(rank, 2)
        settings = np.column_stack([models, factors.steps.cpu(), factors.gains.cpu()])
        head += np.float32(factors.step).tobytes() + settings.astype(np.uint8).tobytes()
        runs = of_factors + runs
    stream = entropy.encode(runs)
    return torch.cat([torch.frombuffer(bytearray(head), dtype=torch.uint8), stream])


def read(codes: Tensor, rows: int, columns: int) -> Codes:
    """Read the codes of one tensor back.

    Args:
        codes: uint8 `(bytes,)`, on the CPU.
        rows: of the matrix that the tensor counts as.
        columns: likewise.

    Raises:
        ValueError: the bytes are not such codes.
    """
    data = codes.numpy()
    form, place, rank, count, scale = np.frombuffer(data, _HEAD, 1)[0].item()
    total, at = rows * columns, _HEAD.itemsize
    if form > PLAIN or rank > min(rows, columns) or not np.isfinite(scale):
        raise ValueError(f"no codes of a {rows} × {columns} matrix")
    step, settings = 0.0, np.empty((0, HEADER), np.uint8)
    if rank:
        step = float(np.frombuffer(data, "<f4", 1, at)[0])
        at += 4
        settings = np.frombuffer(data, np.uint8, HEADER * rank, at).reshape(rank, HEADER)
        at += HEADER * rank
        if not np.isfinite(step):
            raise ValueError("the step of the factors is not finite")
    runs: list[tuple[int, Model]] = []
    for left, right in settings[:, :2].tolist():
        runs += [(rows, _model(left)), (columns, _model(right))]
    if form == SIGNS:
        runs += [(count, Gaps(count, total)), (count, Bits())]
    elif form:
        runs += [(total, _model(count))]
    symbols = entropy.decode(codes[at:], runs)
    factors = None
    if rank:
        left, right = (torch.stack(symbols[side : 2 * rank : 2], 1) for side in (0, 1))
        steps, gains = (torch.from_numpy(settings[:, i].copy()) for i in (2, 3))
        factors = QuantizedFactors(left, right, step, steps, gains)
    sketch = symbols[-1] if form else None
    positions = None
    if form == SIGNS:
        positions = (symbols[-2].to(torch.int64) + 1).cumsum(0) - 1
        sketch = 2 * symbols[-1] - 1
        if count and int(positions[-1]) >= total:
            raise ValueError(f"a position lies outside the {total} entries")
    return Codes(form, place, factors, sketch, positions, scale)


def runs_of(factors: QuantizedFactors) -> list[tuple[Tensor, Gaussian | Laplace]]:
    """The factors' columns, left and right in turn, each with its model."""
    columns = [
        column.cpu().contiguous()
        for pair in zip(factors.left.unbind(1), factors.right.unbind(1), strict=True)
        for column in pair
    ]
    return [(column, entropy.best(column)) for column in columns]


def _byte(model: Model) -> int:
    assert isinstance(model, Gaussian | Laplace)
    return model.scale + _LAPLACE * isinstance(model, Laplace)


def _model(byte: int) -> Gaussian | Laplace:
    return Laplace(byte - _LAPLACE) if byte >= _LAPLACE else Gaussian(byte)
