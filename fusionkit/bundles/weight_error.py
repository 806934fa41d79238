"""How far off the weights are that a bundle gives back: what needs neither data nor a model."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fusionkit.bundles.bundle import Bundle
from fusionkit.codecs.decomposition import matrix_of
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.vectors import BLOCK, difference


@dataclass(frozen=True)
class WeightError:
    """A tensor that was compressed, or all of a task's, against the fine-tuned, before rounding.

    Attributes:
        energy: ‖δ‖², of the task vector.
        error: ‖δ̂ − δ‖², of what is wrong with the decoded one.
        product: ⟨δ̂, δ⟩.
    """

    energy: float
    error: float
    product: float

    @property
    def relative(self) -> float | None:
        """‖δ̂ − δ‖² / ‖δ‖²; None of a task that is the base itself."""
        return self.error / self.energy if self.energy else None

    @property
    def projection(self) -> float | None:
        """⟨δ̂, δ⟩ / ‖δ‖²: 1 where δ̂ is as long as δ in δ's own direction; None as above."""
        return self.product / self.energy if self.energy else None


def weight_error(bundle: Bundle, family: Family, task: str) -> WeightError:
    """How far off a task's weights are, over all its deltas; see `tensor_errors`."""
    found = [*tensor_errors(bundle, family, task).values()]
    return WeightError(
        sum(each.energy for each in found),
        sum(each.error for each in found),
        sum(each.product for each in found),
    )


def tensor_errors(bundle: Bundle, family: Family, task: str) -> dict[str, WeightError]:
    """Decode all of a task's deltas, and hold them against the family's, tensor by tensor.

    Args:
        bundle: compressed from the family.
        family: the fine-tuned models.
        task: one of its tasks.

    Raises:
        BundleError: the bundle has no such task, or can't be decoded.
        CheckpointError, FamilyError: a checkpoint can't be read.
    """
    place = family.tasks.index(task)

    def sums(name: str) -> Tensor:
        delta = family.vectors(name)[place]
        decoded = _decoded(bundle, family, task, name)
        found = torch.zeros(3, dtype=torch.float64)
        for start in range(0, delta.numel(), BLOCK):
            own = _block(delta, start)
            other = torch.zeros_like(own) if decoded is None else _block(decoded, start)
            error = other - own
            found += torch.stack([own @ own, error @ error, other @ own]).cpu()
        return found

    # By one task after the other, as a bundle has one task's files at hand.
    run = family.workers.run(sums, {n: 2 * size for n, size in family.sizes.items()}, counted=False)
    return {name: WeightError(*found.tolist()) for name, found in run}


def base_energy(family: Family) -> float:
    """‖θ₀‖² over the matrices that are compressed, which noise in the weights is held against."""

    def energy(name: str) -> float:
        if min(matrix_of(torch.Size(family.base.specs[name].shape))) < 2:
            return 0.0
        base = family.base[name].to(family.device)
        return sum(
            float(block @ block)
            for start in range(0, base.numel(), BLOCK)
            for block in [_block(base, start)]
        )

    return sum(found for _, found in family.workers.run(energy, family.sizes, counted=False))


def _decoded(bundle: Bundle, family: Family, task: str, name: str) -> Tensor | None:
    if not bundle.codec.restores:
        return bundle.delta(task, name, family.device)
    base = family.base[name].to(family.device)  # the bundle would check its own, each time
    whole = bundle.tensor(task, name, base)
    return None if whole is None else difference(whole, base)


def _block(values: Tensor, start: int) -> Tensor:
    return values.reshape(-1)[start : start + BLOCK].to(torch.float64)
