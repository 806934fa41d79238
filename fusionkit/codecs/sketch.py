"""Sketch: strong directions, coarsely quantised, and an unbiased sketch of all the rest."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.codecs import mixing, sketch_codes
from fusionkit.codecs.allocation import Share
from fusionkit.codecs.base import WHOLE_MODEL, DeltaCodec, Encoded, Encoder, Parts, SharedParts
from fusionkit.codecs.kept import Kept
from fusionkit.codecs.layout import Layout, PartSpec
from fusionkit.codecs.operands import Operand
from fusionkit.codecs.rotation import rotate, rotate_sparse
from fusionkit.codecs.sketch_codes import Codes
from fusionkit.codecs.sketch_encoder import How, encode_tensor, measure, sides
from fusionkit.codecs.sketch_plan import Target, layout_of, metrics_of, plans_of
from fusionkit.codecs.whitening import ALIKE
from fusionkit.errors import CodecError
from fusionkit.registry import to_config
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.vectors import TaskVectors

_CODES, _GAINS = "codes", "gains"
_SMALL = 1 << 14
"""Bytes of codes that are kept, once they are read, at most."""


@dataclass(frozen=True)
class Sketch(DeltaCodec):
    """Keep strong singular directions, and sketch the rest without bias: a tenth of a bit.

    δ ≈ Σ g_i a_i b_iᵀ + X̂. The directions that are worth their bits are rounded to small integers.
    What they leave, X, is mixed and coded by a `trellis`, which comes near the least noise that so
    many bits allow; above 1.5 bits an entry, or where it is tiny, it is rotated and rounded to
    integers. X̂ is scaled so that ⟨X̂, X⟩ = ‖X‖²: the sketch is noisy, but shrinks nothing, unless
    its noise is felt (see `allocation`). What comes back is for use: it has more energy than δ, as
    noise that the model hardly feels.

    Exactly one of bits, bytes and noise is given. Of bits and bytes no more is ever taken; where
    the headers alone take more, all deltas come back as zero, with a warning. A tensor that is
    not worth its entry in a header comes back as zero as well. A task whose error is felt, as its
    delta is large for its bits, is named in a warning, with the bits that it would take.

    Two gains a matrix, of its directions and of its sketch, are 1; `fusionkit calibrate` learns
    them, and gives more bits to the matrices that the outputs feel more (`family.sensitivities`).
    Without a sketch it goes further: the directions that are kept, and how finely, are those of
    √w Lᵀ δ R, where L and R are factors of the second moments of what each linear layer sees
    (`family.moments`; K-FAC's metric). A task has as many bytes as it has without data.

    Args:
        bits: per compressed parameter, all that `Bundle.bits_per_parameter` counts: codes, headers
            and the manifest, but not private tensors. Of small models, whose manifest takes more
            than a tenth of that, what is beyond it is not counted.
        bytes: of the whole bundle, private tensors included.
        noise: each task's error energy over the base's energy; below 0.01 it is hardly felt.
        share: bits go to the tasks by their deltas' `energy` to the power ⅓, and more where so few
            are felt, or to all `equal`.
        sketch: whether there is a sketch; without one the directions alone are kept, scaled up for
            what was left out, and can be exported as a LoRA. Then noise is not to be given.
        seed: of what is random in it.

    Raises:
        CodecError: not exactly one of bits, bytes and noise is given, or it is not positive.
    """

    id: ClassVar[str] = "sketch"
    cost: ClassVar[str] = "bits × P of all compressed parameters P, as asked for"
    usual: ClassVar[dict[str, Any]] = {"bits": 0.1}
    learned: ClassVar[tuple[str, ...]] = (_GAINS,)
    bits: float | None = None
    bytes: int | None = None
    noise: float | None = None
    share: Share = "energy"
    sketch: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        settings = {name: getattr(self, name) for name in ("bits", "bytes", "noise")}
        given = {name: value for name, value in settings.items() if value is not None}
        if len(given) != 1:
            raise CodecError(
                f"expected exactly one of Sketch's bits, bytes, noise; got {given or 'none'}"
            )
        [(name, value)] = given.items()
        if not 0 < value < math.inf:
            raise CodecError(f"expected Sketch's {name} to be more than 0, got {value}")
        if self.noise is not None and not self.sketch:
            raise CodecError("Sketch's noise is the sketch's own; without one, give bits or bytes")

    def likely_bytes(self, shapes: Mapping[str, Sequence[int]], tasks: int) -> int | None:
        """What was asked for."""
        if self.bits is None:
            return self.bytes
        return round(self.bits / 8 * tasks * sum(map(math.prod, shapes.values())))

    @property
    def packs(self) -> bool:
        """A small matrix takes as many bytes as its entry in a header would."""
        return True

    @property
    def uses_sensitivities(self) -> bool:
        """A sketch has its bits where they are felt."""
        return self.sketch

    @property
    def uses_moments(self) -> bool:
        """Directions alone are those that are felt most."""
        return not self.sketch

    def prepare(self, family: Family, shared: SharedParts | None = None) -> Encoder:
        """A pass for all singular values, from which every tensor's bytes follow; two with data."""
        how = How.sketched() if self.sketch else How.directions_alone()
        layout = layout_of(family)
        target = Target(self.bits, self.bytes, self.noise, self.share)
        metrics = None if self.sketch else metrics_of(family, layout)
        felt = family.each(partial(measure, metrics=metrics)) if metrics else None
        plans = plans_of(family, layout, family.each(measure), target, how, to_config(self), felt)

        def encode(vectors: TaskVectors) -> Encoded:
            at, place = layout.names[vectors.name], layout.matrices.get(vectors.name, 0)
            own: list[Parts] = []
            for task, plan in enumerate(plans):
                allowed = plan.of(at)
                codes = None
                if allowed.nbytes:
                    metric = metrics(task, vectors.name) if metrics else ALIKE
                    codes = encode_tensor(vectors, task, allowed, place, self._seed, how, metric)
                own.append({} if codes is None else {_CODES: codes})
            return Encoded(vectors.name, tasks=own)

        def finish(total: Tensor | None) -> Encoded | None:
            if not layout.matrices:
                return None
            gains = torch.ones(len(layout.matrices), 2, dtype=torch.float16)
            own = [{_GAINS: gains} if plan.nbytes.any() else {} for plan in plans]
            return Encoded(WHOLE_MODEL, tasks=own)

        return Encoder(encode, finish)

    def layout(self, shape: torch.Size) -> Layout:
        """The codes, and the gains of all matrices."""
        return {
            _CODES: PartSpec(torch.uint8, (None,)),
            _GAINS: PartSpec(torch.float16, (None, 2)),
        }

    def decode(self, parts: Parts, shape: torch.Size) -> Tensor:
        """The directions' product and the sketch; differentiable in the gains."""
        read, device = _Read.of(parts, shape), parts[_CODES].device
        gains = _gains(parts, read.codes)
        if not gains.requires_grad:
            return self._sum(read, gains, shape, device)
        of_factors, of_sketch = gains.to(torch.float32)
        whole = torch.zeros(shape, device=device)
        if read.product is not None:
            left, right = read.product
            whole = whole + (left * of_factors @ right.mT).view(shape)
        if read.codes.form != sketch_codes.NOTHING:
            only = read._replace(product=None)
            whole = whole + self._sum(only, torch.ones(2), shape, device) * of_sketch
        return whole

    def added(self, parts: Parts, base: Tensor, out: Tensor | None = None) -> Tensor:
        """Base plus delta, with no pass over memory for either sum."""
        read, device = _Read.of(parts, base.shape), parts[_CODES].device
        gains, start = _gains(parts, read.codes), base.to(torch.float32)
        if out is None or out.is_contiguous():
            return self._sum(read, gains, base.shape, device, start, out)
        return out.copy_(self._sum(read, gains, base.shape, device, start))

    def factors(self, parts: Parts, shape: torch.Size) -> LowRank | None:
        """The directions, where there is no sketch beside them."""
        read = _Read.of(parts, shape)
        if read.codes.form != sketch_codes.NOTHING or read.product is None:
            return None
        left, right = read.product
        gain = parts[_GAINS][read.codes.place, 0].to(torch.float32)
        return LowRank(left * gain, right.clone())

    def operand(self, parts: Parts, shape: torch.Size) -> Operand | None:
        """The directions, where there never is a sketch; that has to be decoded."""
        return None if self.sketch else self.factors(parts, shape)

    def _sum(
        self,
        read: "_Read",
        gains: Tensor,
        shape: torch.Size,
        device: torch.device,
        base: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Directions, sketch and base: float32 `(*shape)`, in `out` if there is one."""
        of_factors, of_sketch = gains.tolist()
        matrix, codes, product = sides(shape), read.codes, read.times(of_factors)
        start = None if base is None else base.reshape(matrix)
        target = torch.empty(matrix, device=device) if out is None else out.view(matrix)
        seed, place, scale = self._seed, codes.place, codes.scale * of_sketch
        if codes.mixed is not None:
            coded = codes.mixed._replace(stream=codes.mixed.stream.to(device))
            mixing.rebuild(
                coded, matrix, seed, scale, place=place, product=product, base=start, out=target
            )
            return target.view(shape)
        if codes.sketch is None or codes.form == sketch_codes.PLAIN:
            _plain(codes, product, start, target)
            return target.view(shape)
        symbols = codes.sketch.to(device)
        if codes.positions is not None:
            at = codes.positions.to(device)
            rotate_sparse(
                at,
                symbols,
                matrix,
                seed,
                scale,
                place=place,
                product=product,
                base=start,
                out=target,
            )
        else:
            values = symbols.to(torch.float32).mul_(scale).view(matrix)
            rotate(values, seed, True, place=place, product=product, base=start, out=target)
        return target.view(shape)

    @property
    def _seed(self) -> int:
        """The seed, as what draws takes it."""
        return self.seed % 2**64


class _Read(NamedTuple):
    """A tensor's codes, but for its directions, and their product at a gain of 1."""

    codes: Codes
    product: LowRank | None

    @classmethod
    def of(cls, parts: Parts, shape: torch.Size) -> "_Read":
        """As stored; what is small is kept, so that a task that comes back is not read again."""
        stored, (rows, columns) = parts[_CODES], sides(shape)
        if len(stored) > _SMALL or stored.device.type != "cpu":
            return cls._new(stored, rows, columns)
        key = stored.numpy().tobytes(), stored.dtype, rows, columns
        return _KEPT.get(key, lambda: cls._new(stored, rows, columns))

    @classmethod
    def _new(cls, stored: Tensor, rows: int, columns: int) -> "_Read":
        with torch.inference_mode(False):  # what is kept may be learned from later on
            codes = sketch_codes.read(stored.cpu(), rows, columns)
            if codes.factors is None:
                return cls(codes, None)
            left, right = codes.factors.to(stored.device).product()
            product = LowRank(left.contiguous(), right.mT.contiguous().mT)
            return cls(codes._replace(factors=None), product)

    def times(self, gain: float) -> LowRank | None:
        """The product at a gain."""
        if self.product is None or gain == 1:
            return self.product
        return LowRank(self.product.left * gain, self.product.right)

    @property
    def nbytes(self) -> int:
        """About, in memory; with the codes, which are what it is kept by."""
        codes, product = self
        known = [codes.sketch, codes.positions, *(product or ()), *(codes.mixed or ())]
        return _SMALL // 4 + sum(getattr(part, "nbytes", 0) for part in known)


_KEPT: Kept[_Read] = Kept(1 << 26, lambda read: read.nbytes)
"""Of all bundles of a process, 64 MiB."""


def _gains(parts: Parts, codes: Codes) -> Tensor:
    """A matrix's gains, float `(2,)`; what is no matrix has none: ones."""
    if codes.form == sketch_codes.PLAIN:
        return torch.ones(2)
    return parts[_GAINS][codes.place]


def _plain(codes: Codes, product: LowRank | None, base: Tensor | None, out: Tensor) -> None:
    """What is neither mixed nor rotated, and the base, into `out`."""
    start = out.zero_() if base is None else base
    if product is not None:
        start = torch.addmm(start, product.left, product.right.mT, out=out)
    if codes.sketch is not None:
        values = codes.sketch.to(out.device, torch.float32).view(out.shape)
        torch.add(start, values, alpha=codes.scale, out=out)
    elif product is None:
        out.copy_(start)
