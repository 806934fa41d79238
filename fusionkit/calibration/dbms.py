"""Calibration of DBMS: the shift and the scale of every task."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.compress import temporary_bundle
from fusionkit.calibration.module import CalibrationModule
from fusionkit.calibration.pair_search import PROBES, PairSearch
from fusionkit.calibration.progress import Values
from fusionkit.codecs.dbms import DBMS, PLAIN, Scalars, combine, shifted
from fusionkit.codecs.payload import Payload
from fusionkit.task_vectors.vectors import TaskVectors

_LEAST_MOVE = 1e-2
"""Shifts that differ by less, in units of the task vector's length, say nothing of ∂D/∂α."""
_KEPT = 3
"""Encodings of which the newest that differs enough gives ∂D/∂α, as a secant."""


@dataclass(frozen=True)
class Directions:
    """One task's u, D = C(τ − α u) and ∂D/∂α, by tensor; None where one is zero.

    They are decoded when asked for, and not kept.
    """

    shift: Callable[[str], Tensor | None]
    delta: Callable[[str], Tensor | None]
    moved: Callable[[str], Tensor | None]


class ShiftedWeight(torch.autograd.Function):
    """One tensor of the reused model, θ₀ + α u + β D, as a function of the two scalars.

    Its derivatives are ⟨g, u + β ∂D/∂α⟩ and ⟨g, D⟩. Nothing but the result is kept for them: u and
    D are decoded again.
    """

    @staticmethod
    def forward(
        ctx: Any, scalars: Tensor, base: Tensor, name: str, of: Directions, dtype: torch.dtype
    ) -> Tensor:
        """The tensor: `dtype` `(*shape)`."""
        ctx.name, ctx.of, ctx.scale = name, of, float(scalars[1])
        delta = combine(of.shift(name), of.delta(name), float(scalars[0]), ctx.scale)
        if delta is None:
            return base.to(dtype, copy=True)
        return torch.add(base.to(torch.float32), delta).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The derivatives: float32 `(2,)`."""
        (gradient,) = (grad.to(torch.float32).reshape(-1) for grad in grads)
        along = [
            _dot(gradient, ctx.of.shift(ctx.name))
            + ctx.scale * _dot(gradient, ctx.of.moved(ctx.name)),
            _dot(gradient, ctx.of.delta(ctx.name)),
        ]
        return torch.stack(along), None, None, None, None


def shifted_weights(
    scalars: Tensor, base: Mapping[str, Tensor], like: Mapping[str, Tensor], of: Directions
) -> dict[str, Tensor]:
    """A task's weights as a differentiable function of its scalars.

    Args:
        scalars: α and β, float32 `(2,)`.
        base: the base's tensors by name.
        like: the tensors to form by name, for their dtypes.
        of: what they are formed of.
    """
    form: Any = ShiftedWeight.apply
    return {name: form(scalars, base[name], name, of, old.dtype) for name, old in like.items()}


def _dot(gradient: Tensor, other: Tensor | None) -> Tensor:
    return gradient.new_zeros(()) if other is None else torch.dot(gradient, other.reshape(-1))


class DBMSCalibration(CalibrationModule):
    """Learns DBMS's two scalars of every task: α, in units of ‖τ_t‖ / ‖u_t‖, and β.

    Args:
        reuse: its model, base and fine-tuned checkpoints are used.
        settings: how to calibrate.
        codec: what is calibrated.
    """

    codec: DBMS

    def prepare(self) -> list[Values]:
        """Encode the shift; every task starts as the wrapped codec alone."""
        settings, count = self.settings, len(self.family.tasks)
        self._searches = [
            PairSearch(settings.seed + place, settings.learning_rate) for place in range(count)
        ]
        self._deltas: list[Payload] = []
        self._past: list[list[Values]] = []
        self._shifts: list[list[float]] = []
        self._shift = Payload(self.codec.direction, self.family)
        self._units = self._lengths()
        return [PLAIN] * count

    def close(self) -> None:
        """Remove the temporary files."""
        self._shift.close()
        for payload in self._deltas:
            payload.close()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        searches = [search.told for search in self._searches]
        return {**super().state(), "past": self._past, "searches": searches}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        super().load_state(state)
        for search, told in zip(self._searches, state["searches"], strict=True):
            search.replay([(tuple(pair), value) for pair, value in told])
        for pairs in state["past"]:
            self.encode([tuple(pair) for pair in pairs])

    def stepping(self, epoch: int) -> bool:
        """Whether an epoch ends in a step of the optimiser, rather than trying a pair."""
        return self.settings.method == "gradient" and epoch >= len(PROBES)

    @property
    def waits_from(self) -> int:
        """Probes come first."""
        return len(PROBES)

    def turn(self, epoch: int, live: list[int]) -> None:
        """Set the pair to try next; or, once all probes were, start from the best of them."""
        for place in live:
            pair = cast(Scalars, self.at[place])
            self._searches[place].tell(pair, float(self.losses[place]))
        probing = epoch + 1 < len(PROBES)
        with torch.no_grad():
            for each, search in zip(self.progress, self._searches, strict=True):
                if probing or self.settings.method == "search":
                    self.parameter[each.place] = torch.tensor(search.ask())
                elif epoch + 1 == len(PROBES):
                    self.parameter[each.place] = torch.tensor(search.best)

    def shift_and_scale(self, values: list[Values]) -> list[tuple[float | None, float | None]]:
        """α and β themselves."""
        return list(self._pairs(values))

    def _pairs(self, values: list[Values]) -> list[Scalars]:
        units = self._units.tolist()
        return [(shift * unit, scale) for (shift, scale), unit in zip(values, units, strict=True)]

    def _lengths(self) -> Tensor:
        """‖τ_t‖ / ‖u_t‖: float32 `(T,)`; 1 where there is no direction."""

        def each(vectors: TaskVectors) -> Tensor:
            sums = torch.zeros(2, len(self.family.tasks), dtype=torch.float64)
            for place, vector in enumerate(vectors):
                sums[0, place] = vector.square().sum(dtype=torch.float64)
                u = self._shift.delta(place, vectors.name, vectors.shape)
                if u is not None:
                    sums[1, place] = u.square().sum(dtype=torch.float64)
            return sums

        squares = self.family.total(each)
        if squares is None:
            return torch.ones(len(self.family.tasks))
        usable = (squares > 0).all(0)
        return torch.where(usable, (squares[0] / squares[1]).sqrt(), 1.0).to(torch.float32)

    def encode(self, values: list[Values]) -> None:
        """Encode the residuals; the codes before are kept for ∂D/∂α."""
        scalars = self._pairs(values)
        payload = Payload(self.codec.codec, shifted(self.family, self._shift, scalars))
        for old in self._deltas[: 1 - _KEPT]:
            old.close()
        self._deltas = [*self._deltas[1 - _KEPT :], payload]
        self._shifts = [*self._shifts[1 - _KEPT :], [shift for shift, _ in scalars]]
        self._past = [*self._past[1 - _KEPT :], values]

    def weights(self, place: int, own: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A task's weights, differentiable in its own numbers."""
        unit = torch.stack([self._units[place].to(own.device), own.new_ones(())])
        of = self._directions(place, own.device)
        return shifted_weights(own * unit, self.reuse.base_of(self.family), like, of)

    def _directions(self, place: int, device: torch.device) -> Directions:
        def read(payload: Payload, name: str) -> Tensor | None:
            shape = torch.Size(self.family.base.specs[name].shape)
            return payload.delta(place, name, shape, device)

        *past, now = (shifts[place] for shifts in self._shifts)
        least = _LEAST_MOVE * float(self._units[place])
        far = [each for each, shift in enumerate(past) if abs(now - shift) >= least]

        def moved(name: str) -> Tensor | None:
            if not far:
                return None
            old, new = (read(self._deltas[each], name) for each in (far[-1], -1))
            if new is None:
                found = None if old is None else -old
            else:
                found = new if old is None else new - old
            return None if found is None else found / (now - past[far[-1]])

        return Directions(partial(read, self._shift), partial(read, self._deltas[-1]), moved)

    def bundle_of(self, values: list[Values]) -> Bundle:
        """A temporary bundle of what was learned."""
        scalars = dict(zip(self.family.tasks, self._pairs(values), strict=True))
        return temporary_bundle(self.family, self.codec.at(scalars))
