"""One tensor's codes, as `Sketch` stores them: a head, the directions' settings, one coded stream.

    head        15 bytes: form, place, rank, count, steps or model, σ; see `_HEAD`
    step        float32, where there are directions
    directions  4 bytes each: models of left and right, step, gain; see `quantized_factors`
    model       a byte, of a trellis: its levels'
    stream      coded by `entropy`: each direction's left and right, then the sketch, or its levels
    trellis     its bits, where there is one; see `trellis` and `mixing`

A model is a byte: a scale, and 64 where it is a Laplace distribution's. Signs are no longer
written: where the largest entries of a matrix that was rotated are, and whether they are positive.
"""

import math
from struct import Struct
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusionkit.codecs import entropy, mixing, trellis
from fusionkit.codecs.entropy import Bits, Gaps, Gaussian, Laplace, Model
from fusionkit.codecs.layout import PartSpec
from fusionkit.codecs.quantized_factors import HEADER, QuantizedFactors
from fusionkit.codecs.rounded_sketch import Sketched

NOTHING, SIGNS, INTEGERS, PLAIN, TRELLIS = range(5)
"""Forms: directions alone; rotated, as signs, as integers; integers, not rotated; a trellis."""

_HEAD = Struct("<BIHIf")
"""Form, place, rank, count, σ."""
_STEP = Struct("<f")
_LAPLACE = 64

FIXED_BYTES = _HEAD.size + _STEP.size + 7
"""Bytes of a tensor's codes that are not for a direction, nor a symbol's: the stream's own too."""


class Codes(NamedTuple):
    """What is stored of one tensor.

    Attributes:
        form: see above.
        place: the tensor's place among its task's gains.
        factors: the directions that are kept; None: none are.
        sketch: int32 symbols: signs of 1 and -1; integers; None of the other forms.
        positions: int64, of the signs.
        scale: σ.
        mixed: of form `TRELLIS`.
    """

    form: int
    place: int
    factors: QuantizedFactors | None
    sketch: Tensor | None
    positions: Tensor | None
    scale: float
    mixed: mixing.Coded | None = None


def write(
    form: int, place: int, factors: QuantizedFactors | None, sketched: Sketched | None
) -> Tensor:
    """The codes of one tensor: uint8 `(bytes,)`."""
    rank = factors.left.shape[1] if factors else 0
    count, scale = (sketched.steps, sketched.scale) if sketched else (0, 0.0)
    runs = list(sketched.runs) if sketched else []
    model = bytes([_byte(runs[0][1])]) if runs else b""
    if form in (INTEGERS, PLAIN):
        count = model[0]
    head = _HEAD.pack(form, place, rank, count, scale)
    if factors:
        of_factors = runs_of(factors)
        models = np.array([_byte(model) for _, model in of_factors], np.uint8).reshape(rank, 2)
        settings = np.column_stack([models, factors.steps.cpu(), factors.gains.cpu()])
        head += _STEP.pack(factors.step) + settings.astype(np.uint8).tobytes()
        runs = of_factors + runs
    if form == TRELLIS:
        head += model
    parts = [torch.frombuffer(bytearray(head), dtype=torch.uint8), entropy.encode(runs)]
    if sketched and sketched.stream is not None:
        parts.append(sketched.stream)
    return torch.cat(parts)


def read(codes: Tensor, rows: int, columns: int) -> Codes:
    """Read the codes of one tensor back.

    Args:
        codes: uint8 `(bytes,)`, on the CPU.
        rows: of the matrix that the tensor counts as.
        columns: likewise.

    Raises:
        ValueError: the bytes are not such codes.
    """
    if codes.dtype != torch.uint8 or codes.ndim != 1:
        raise ValueError(f"expected bytes of codes, got {PartSpec.of(codes)}")
    data = codes.numpy().tobytes()
    head = _Head.of(data, rows, columns)
    form, count, at, end = head.form, head.number, head.end, len(data)
    runs: list[tuple[int, Model]] = []
    for start in range(0, len(head.settings), HEADER):
        of_left, of_right = map(_model, head.settings[start : start + 2])
        runs += [(rows, of_left), (columns, of_right)]
    if form == SIGNS:
        runs += [(count, Gaps(count, rows * columns)), (count, Bits())]
    elif form == TRELLIS:
        end -= trellis.size_of(count)
        if at >= end:
            raise ValueError(f"{len(data)} bytes are too few for a trellis of {count} steps")
        runs += [(mixing.groups_of(rows, columns), _model(data[at]))]
        at += 1
    elif form:
        runs += [(rows * columns, _model(count))]
    symbols = entropy.decode(codes[at:end], runs)
    found = Codes(form, head.place, head.factors(symbols), None, None, head.scale)
    if form == TRELLIS:
        # Not the caller's memory, as what is read may be kept.
        mixed = mixing.read(symbols[-1], count, codes[end:].clone(), rows, columns)
        return found._replace(mixed=mixed)
    if form == SIGNS:
        positions = symbols[-2].cumsum(0).add_(torch.arange(count))
        if count and int(positions[-1]) >= rows * columns:
            raise ValueError(f"a position lies outside the {rows * columns} entries")
        return found._replace(sketch=symbols[-1].mul_(2).sub_(1), positions=positions)
    return found._replace(sketch=symbols[-1]) if form else found


class _Head(NamedTuple):
    """What stands before the stream, and where that ends."""

    form: int
    place: int
    number: int
    scale: float
    step: float
    settings: bytes
    end: int

    @classmethod
    def of(cls, data: bytes, rows: int, columns: int) -> "_Head":
        at = _HEAD.size
        if len(data) < at:
            raise ValueError(f"{len(data)} bytes are too few for the head of a tensor's codes")
        form, place, rank, count, scale = _HEAD.unpack_from(data)
        most = min(rows, columns)
        if form > TRELLIS or not most or rank > most or not math.isfinite(scale):
            raise ValueError(f"no codes of a {rows} × {columns} matrix")
        step, settings = 0.0, b""
        if rank:
            settings = data[at + _STEP.size : at + _STEP.size + HEADER * rank]
            if len(settings) < HEADER * rank:
                raise ValueError(f"{len(data)} bytes are too few for {rank} directions")
            [step] = _STEP.unpack_from(data, at)
            at += _STEP.size + len(settings)
            if not math.isfinite(step):
                raise ValueError("the step of the factors is not finite")
        return cls(form, place, count, scale, step, settings, at)

    def factors(self, symbols: list[Tensor]) -> QuantizedFactors | None:
        """The directions, of which symbols come first."""
        rank = len(self.settings) // HEADER
        if not rank:
            return None
        left, right = (torch.stack(symbols[side : 2 * rank : 2]).mT for side in (0, 1))
        steps, gains = (
            torch.tensor(list(self.settings[i::HEADER]), dtype=torch.uint8) for i in (2, 3)
        )
        return QuantizedFactors(left, right, self.step, steps, gains)


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
