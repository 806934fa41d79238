"""DBMS: shift the base towards the task, compress the delta from there, scale it (2505.11344)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.codecs.base import WHOLE_MODEL, DeltaCodec, Encoded, Encoder, Parts, SharedParts
from fusionkit.codecs.decomposition import SMALL, energy
from fusionkit.codecs.layout import Layout, PartSpec
from fusionkit.codecs.merged import Merged
from fusionkit.codecs.operands import Operand, Sum, scaled
from fusionkit.codecs.payload import Payload
from fusionkit.errors import CodecError
from fusionkit.merges.normalized import Normalized
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.vectors import Change, ChangedVectors, TaskVectors

Scalars = tuple[float, float]
"""One task's α, the magnitude of its base's shift, and β, the scale of its delta."""

PLAIN: Scalars = (0.0, 1.0)
"""No shift, no scale: the wrapped codec, as it is."""

_SCALARS = "scalars"
_KINDS, _OF_TENSOR, _OF_MODEL = ("shift", "delta"), ".", ":"
"""After one of the kinds in a part's name: whether it is of the tensor or of the whole model."""


@dataclass(frozen=True)
class DBMS(DeltaCodec):
    """Compress against a shifted base: θ̂_t = θ₀ + α_t u_t + β_t C(τ_t − α_t u_t).

    u_t, the shift's direction, is itself a decoded delta, so that it costs what it says: of a
    codec whose tasks share everything (`Merged`), one vector for all of them, the *shared shift*;
    of any other, the task's own compressed delta, the *own shift*. Two scalars a task are kept
    beside the payloads of C and u.

    Compressing alone takes for them what is best in weight error: of a few shifts, given as
    multiples of the projection ⟨τ_t, u_t⟩ / ‖u_t‖², with β = ⟨δ, C(δ)⟩ / ‖C(δ)‖², that which leaves
    the least ‖δ − β C(δ)‖. With 0 among them, and where C takes each task by itself, that is
    never worse than C at its best scale. `fusionkit calibrate` learns them on data instead.

    What is known of the paper is its idea; the formulas are one reading of it. PERU-FFT is the
    shared shift by task arithmetic with α = β = 1 and magnitude pruning.

    Args:
        codec: C, any codec.
        shift: the codec whose decoded deltas are the directions u_t; none: one vector for all
            tasks, in int4: their mean, in which those that moved far weigh more, but do not rule.
        grid: the shifts that are tried; none: no shift and no scale.

    Raises:
        CodecError: the codec's or the shift's decoded deltas can't be scaled.
    """

    id: ClassVar[str] = "dbms"
    cost: ClassVar[str] = (
        "what its codec takes, and two scalars; of the shift, shared by all: 4.1 P"
    )
    codec: DeltaCodec
    shift: DeltaCodec | None = None
    grid: tuple[float, ...] = (0.0, 1.0, 2.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))
        # Not the field's default, whose settings a recipe's parser would mix into another shift's.
        object.__setattr__(self, "shift", self.shift or Merged(Normalized(power=0.5), "int4"))
        for part, codec in (("codec", self.codec), ("shift", self.direction)):
            if codec.unscalable:
                raise CodecError(
                    f"DBMS can't have {type(codec).__name__} as its {part}: {codec.unscalable}"
                )

    @property
    def direction(self) -> DeltaCodec:
        """The codec of the directions u_t: `shift`, or what it is by default."""
        assert self.shift is not None  # once constructed
        return self.shift

    @property
    def uses_sensitivities(self) -> bool:
        """As what encodes the shift and the residuals."""
        return self.codec.uses_sensitivities or self.direction.uses_sensitivities

    @property
    def uses_moments(self) -> bool:
        """Likewise."""
        return self.codec.uses_moments or self.direction.uses_moments

    def at(self, scalars: Mapping[str, Scalars]) -> DeltaCodec:
        """What encodes at scalars that are known; they are no setting, and it is recorded as this.

        Args:
            scalars: task → (α, β); tasks that are not in it are searched for.
        """
        return _AtScalars(self, dict(scalars))

    def likely_bytes(self, shapes: Mapping[str, Sequence[int]], tasks: int) -> int | None:
        """Of the codec within, and of the shift."""
        found = [each.likely_bytes(shapes, tasks) for each in (self.codec, self.direction)]
        return None if None in found else sum(each or 0 for each in found)

    @property
    def packs(self) -> bool:
        """As the codec within does."""
        return self.codec.packs

    def prepare(self, family: Family, shared: SharedParts | None = None) -> Encoder:
        """Encode the shift; search the scalars, once per try; then what the codec prepares."""
        return self.prepare_at({}, family, shared)

    def prepare_at(
        self, known: Mapping[str, Scalars], family: Family, shared: SharedParts | None = None
    ) -> Encoder:
        """The same, where some tasks' scalars are known.

        Args:
            known: task → (α, β); of the other tasks they are searched for.
            family: as for `prepare`.
            shared: as for `prepare`.
        """
        of_codec = _view(shared, "delta")
        with ExitStack() as opened:
            shift = opened.enter_context(Payload(self.direction, family, _view(shared, "shift")))
            scalars = dict(known) if self.grid else {**dict.fromkeys(family.tasks, PLAIN), **known}
            if not scalars.keys() >= set(family.tasks):
                scalars = {**self._search(family, shift, of_codec), **scalars}
            each = [scalars[task] for task in family.tasks]
            inner = self.codec.prepare(shifted(family, shift, each), of_codec)
            opened.callback(inner.close)
            close = opened.pop_all().close

        def encode(vectors: TaskVectors) -> Encoded:
            residuals = ChangedVectors(vectors, _changes(vectors, shift, each))
            encoded = inner.encode(residuals)
            return _together(shift.encoded(vectors.name), encoded, _OF_TENSOR)

        def finish(total: Tensor | None) -> Encoded:
            whole = inner.finish(total) if inner.finish else None
            whole = whole or Encoded(WHOLE_MODEL, tasks=[{}] * len(each))
            both = _together(shift.encoded(WHOLE_MODEL), whole, _OF_MODEL)
            pairs = [torch.tensor(pair, dtype=torch.float32) for pair in each]
            tasks = [
                {**parts, _SCALARS: pair} for parts, pair in zip(both.tasks, pairs, strict=True)
            ]
            return Encoded(WHOLE_MODEL, both.shared, tasks)

        return Encoder(encode, finish, close)

    def layout(self, shape: torch.Size) -> Layout:
        """The scalars; and what shift and codec say, of the tensor and of the whole model."""
        found = {_SCALARS: PartSpec(torch.float32, (2,))}
        for kind, codec in zip(_KINDS, (self.direction, self.codec), strict=True):
            for name, spec in codec.layout(shape).items():
                found |= {kind + level + name: spec for level in (_OF_TENSOR, _OF_MODEL)}
        return found

    def decode(self, parts: Parts, shape: torch.Size) -> Tensor:
        """α u + β C(τ − α u)."""
        shift, scale = parts[_SCALARS].tolist()
        delta = combine(*self.directions(parts, shape), shift, scale)
        # −0, not 0: added to any weight, it leaves the weight's very bits.
        return torch.full(shape, -0.0, device=parts[_SCALARS].device) if delta is None else delta

    def directions(self, parts: Parts, shape: torch.Size) -> tuple[Tensor | None, Tensor | None]:
        """The directions u and C(τ − α u) of one tensor, not to be changed; None where one is zero.

        Args:
            parts: as for `decode`.
            shape: the tensor's shape.
        """
        shift, delta = _wrapped(parts)
        direction = self.direction.decode(shift, shape) if shift else None
        return direction, self.codec.decode(delta, shape) if delta else None

    def factors(self, parts: Parts, shape: torch.Size) -> LowRank | None:
        """The wrapped codec's factors, scaled, where the base is not shifted.

        A shift by another product only adds its factors.
        """
        lefts, rights = [], []
        for codec, own, factor in self._terms(parts):
            product = codec.factors(own, shape)
            if product is None:
                return None
            lefts.append(product.left * factor)
            rights.append(product.right)
        return LowRank(torch.cat(lefts, 1), torch.cat(rights, 1)) if lefts else None

    def operand(self, parts: Parts, shape: torch.Size) -> Operand | None:
        """The shift's and the wrapped codec's, scaled; None where one of them has to be decoded."""
        terms = []
        for codec, own, factor in self._terms(parts):
            found = codec.operand(own, shape)
            if found is None:
                return None
            terms.append(scaled(found, factor))
        return Sum(tuple(terms)) if len(terms) > 1 else next(iter(terms), None)

    def _terms(self, parts: Parts) -> Iterator[tuple[DeltaCodec, Parts, float]]:
        """Of shift and delta what is not zero: codec, its parts, and what it is multiplied by."""
        codecs, scalars = (self.direction, self.codec), parts[_SCALARS].tolist()
        for codec, own, factor in zip(codecs, _wrapped(parts), scalars, strict=True):
            if own and factor:
                yield codec, own, factor

    def _search(
        self, family: Family, shift: Payload, shared: SharedParts | None
    ) -> dict[str, Scalars]:
        """Per task the shift and scale of the least weight error."""
        count = len(family.tasks)

        def project(vectors: TaskVectors) -> Tensor:
            sums = torch.zeros(2, count, dtype=torch.float64)
            for task in range(count):
                u = shift.delta(task, vectors.name, vectors.shape, vectors.device)
                if u is not None:
                    sums[:, task] += _dots(vectors[task], u)
            return sums

        projected = family.total(project)
        if projected is None:
            return dict.fromkeys(family.tasks, PLAIN)
        unit = torch.where(projected[1] > 0, projected[0] / projected[1], 0.0)
        found: list[tuple[float, Scalars]] = [(torch.inf, PLAIN)] * count
        for multiple in self.grid:
            shifts = (multiple * unit).tolist()
            each = [(alpha, 1.0) for alpha in shifts]
            for task, (error, scale) in enumerate(self._errors(family, shift, each, shared)):
                if error < found[task][0]:
                    found[task] = error, (shifts[task], scale)
        return {task: best for task, (_, best) in zip(family.tasks, found, strict=True)}

    def _errors(
        self,
        family: Family,
        shift: Payload,
        scalars: Sequence[Scalars],
        shared: SharedParts | None,
    ) -> list[tuple[float, float]]:
        """Per task ‖δ − β C(δ)‖² at the best β, and that β."""
        residuals = shifted(family, shift, scalars)
        with Payload(self.codec, residuals, shared) as deltas:

            def dots(vectors: TaskVectors) -> Tensor:
                sums = torch.zeros(3, len(scalars), dtype=torch.float64)
                for task, delta in enumerate(vectors):
                    sums[2, task] += energy(delta)
                    coded = deltas.delta(task, vectors.name, vectors.shape, vectors.device)
                    if coded is not None:
                        sums[:2, task] += _dots(delta, coded)
                return sums

            sums = residuals.total(dots)
        assert sums is not None
        dot, square, whole = sums
        scale = torch.where(square > 0, dot / square, 1.0)
        return list(zip((whole - scale * dot).tolist(), scale.tolist(), strict=True))


@dataclass(frozen=True)
class _AtScalars(DeltaCodec):
    """A DBMS that encodes at known scalars.

    Attributes:
        codec: the DBMS, which is recorded, and decodes.
        scalars: task → (α, β).
    """

    id: ClassVar[str] = DBMS.id
    codec: DBMS
    scalars: Mapping[str, Scalars]

    def __repr__(self) -> str:
        return f"{self.codec!r}.at({dict(self.scalars)!r})"

    @property
    def recorded(self) -> DBMS:
        """The DBMS."""
        return self.codec

    @property
    def packs(self) -> bool:
        """As the codec within does."""
        return self.codec.packs

    def prepare(self, family: Family, shared: SharedParts | None = None) -> Encoder:
        """As the DBMS; only scalars that are not known are searched for."""
        return self.codec.prepare_at(self.scalars, family, shared)

    def layout(self, shape: torch.Size) -> Layout:
        """As the DBMS."""
        return self.codec.layout(shape)

    def decode(self, parts: Parts, shape: torch.Size) -> Tensor:
        """As the DBMS."""
        return self.codec.decode(parts, shape)

    def factors(self, parts: Parts, shape: torch.Size) -> LowRank | None:
        """As the DBMS."""
        return self.codec.factors(parts, shape)

    def operand(self, parts: Parts, shape: torch.Size) -> Operand | None:
        """As the DBMS."""
        return self.codec.operand(parts, shape)


def combine(
    direction: Tensor | None, delta: Tensor | None, shift: float, scale: float
) -> Tensor | None:
    """α u + β D: float32, None where both are zero; D itself if there is no shift or scale."""
    if delta is not None and scale != 1:
        delta = delta * scale
    if direction is None or shift == 0:
        return delta
    return direction * shift if delta is None else torch.add(delta, direction, alpha=shift)


def shifted(family: Family, shift: Payload, scalars: Sequence[Scalars]) -> Family:
    """The family's task vectors from the shifted bases: τ_t − α_t u_t."""
    return family.changed(lambda vectors: _changes(vectors, shift, scalars))


def _changes(
    vectors: TaskVectors, shift: Payload, scalars: Sequence[Scalars]
) -> list[Change | None]:
    return [
        _Shift(shift, vectors, task, alpha) if alpha else None
        for task, (alpha, _) in enumerate(scalars)
    ]


class _Shift:
    """Takes α u off one task's vector of one tensor; u is decoded when first needed."""

    def __init__(self, shift: Payload, vectors: TaskVectors, task: int, alpha: float) -> None:
        self._shift, self._vectors, self._task, self._alpha = shift, vectors, task, alpha
        self._decoded: list[Tensor | None] = []

    def __call__(self, values: Tensor, place: slice) -> None:
        if not self._decoded:
            name, shape = self._vectors.name, self._vectors.shape
            self._decoded.append(self._shift.delta(self._task, name, shape, values.device))
        direction = self._decoded[0]
        if direction is not None:
            values.sub_(direction.reshape(-1)[place], alpha=self._alpha)


def _dots(one: Tensor, other: Tensor) -> Tensor:
    """⟨x, y⟩ and ⟨y, y⟩: float64 `(2,)`."""
    one, other = one.reshape(-1), other.reshape(-1)
    dots = torch.stack([torch.dot(one, other), torch.dot(other, other)])
    if not SMALL < float(dots[1]) < torch.inf or not dots.isfinite().all():
        one, other = one.to(torch.float64), other.to(torch.float64)
        dots = torch.stack([torch.dot(one, other), torch.dot(other, other)])
    return dots.to(torch.float64).cpu()


def _together(shift: Encoded, delta: Encoded, level: str) -> Encoded:
    """Both payloads under one name."""
    count = max(len(shift.tasks), len(delta.tasks))
    own = [
        {**_over(of_shift, "shift" + level), **_over(of_delta, "delta" + level)}
        for of_shift, of_delta in zip(
            shift.tasks or [{}] * count, delta.tasks or [{}] * count, strict=True
        )
    ]
    shared = {**_over(shift.shared, "shift" + level), **_over(delta.shared, "delta" + level)}
    return Encoded(delta.name, shared, own, delta.sums)


def _view(shared: SharedParts | None, kind: str) -> SharedParts | None:
    """The shared parts of one of the two payloads."""
    if shared is None:
        return None
    return lambda name: _under(shared(name), kind + (_OF_TENSOR if name else _OF_MODEL))


def _over(parts: Parts, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in parts.items()}


def _wrapped(parts: Parts) -> list[Parts]:
    """The parts of shift and delta, as their codecs know them; empty where a tensor has none."""
    found = [(_under(parts, k + _OF_MODEL), _under(parts, k + _OF_TENSOR)) for k in _KINDS]
    return [{**whole, **own} if own else {} for whole, own in found]


def _under(parts: Parts, prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in parts.items()
        if name.startswith(prefix)
    }
