"""Calibration of a codec's own scales: parts of its payload that it says can be learned."""

from collections.abc import Mapping
from functools import partial

import torch
from msgspec.structs import replace
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.compress import temporary_bundle
from fusionkit.bundles.format import task_file
from fusionkit.bundles.part_writer import Part, PartWriter
from fusionkit.bundles.small_parts import Names
from fusionkit.calibration.module import CalibrationModule
from fusionkit.calibration.progress import Values
from fusionkit.calibration.settings import Calibration
from fusionkit.codecs.base import WHOLE_MODEL, DeltaCodec, Parts
from fusionkit.errors import FusionKitError
from fusionkit.reuse.module import ReuseModule
from fusionkit.task_vectors.workers import full_precision

_UNIT = 0.1
"""A learned entry is its encoded value times exp(_UNIT · x); the optimiser steps x, from 0."""


class PartsCalibration(CalibrationModule):
    """Learns the parts that a codec names as `learned`; all else stays as it was encoded.

    Every entry of such a part is learned as a factor of what it was, so that signs and zeros stay.
    The payload is encoded once. On the way back a tensor is decoded again, rather than kept.

    Args:
        reuse: its model, base and fine-tuned checkpoints are used.
        settings: how to calibrate.
        codec: has `learned` parts.

    Raises:
        FusionKitError: the settings ask for a search, which is for two numbers, not for many.
    """

    def __init__(self, reuse: ReuseModule, settings: Calibration, codec: DeltaCodec) -> None:
        if settings.method == "search":
            raise FusionKitError(
                f"{type(codec).__name__} has too many scales to search; learn them by "
                "--calibration.method gradient"
            )
        super().__init__(reuse, settings, codec)

    def prepare(self) -> list[Values]:
        """Encode; every factor starts at 1."""
        self.family.device = self.device
        self._encoded = temporary_bundle(self.family, self.codec)
        names = [WHOLE_MODEL, *self._encoded.manifest.base.names("delta")]
        self._of: list[dict[str, list[tuple[str, slice]]]] = []
        start: list[Values] = []
        for task in self._encoded.tasks:
            count = 0
            of_task: dict[str, list[tuple[str, slice]]] = {}
            for name in names:
                for part, tensor in self._encoded.task_parts(task, name).items():
                    if part in self._encoded.codec.learned:
                        own = slice(count, count + tensor.numel())
                        of_task.setdefault(name, []).append((part, own))
                        count = own.stop
            self._of.append(of_task)
            start.append((0.0,) * count)
        return start

    def close(self) -> None:
        """Nothing: the payload's folder goes with the bundle."""

    def encode(self, values: list[Values]) -> None:
        """Nothing: what is learned does not change the codes."""

    def turn(self, epoch: int, live: list[int]) -> None:
        """Nothing: the optimiser steps in every epoch."""

    def _scaled(self, place: int, name: str, parts: Parts, own: Tensor) -> dict[str, Tensor]:
        """A tensor's parts, the learned ones as they are by now."""
        scaled = dict(parts)
        for part, at in self._of[place].get(name, []):
            factors = (_UNIT * own[at]).exp().view(parts[part].shape)
            scaled[part] = parts[part] * factors
        return scaled

    def weights(self, place: int, own: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A task's weights, differentiable in its own numbers."""
        bundle, task, device = self._encoded, self.family.tasks[place], own.device
        of_model = bundle.task_parts(task, WHOLE_MODEL, device)

        def decode(name: str, own: Tensor) -> Tensor:
            shape = torch.Size(bundle.manifest.base.tensors[name].shape)
            parts = {
                **bundle.shared_parts(WHOLE_MODEL, device),
                **self._scaled(place, WHOLE_MODEL, of_model, own),
                **bundle.shared_parts(name, device),
                **self._scaled(place, name, bundle.task_parts(task, name, device), own),
            }
            with full_precision():
                return bundle.codec.decode(parts, shape)

        weights, start = {}, self.reuse.base_of(self.family)
        for name, old in like.items():
            base = start[name]
            if bundle.task_parts(task, name) or bundle.shared_parts(name):
                again = partial(decode, name)
                delta = checkpoint(again, own, use_reentrant=False, preserve_rng_state=False)
                weights[name] = torch.add(base.to(torch.float32), delta).to(old.dtype)
            else:
                weights[name] = base.to(old.dtype)
        return weights

    def bundle_of(self, values: list[Values]) -> Bundle:
        """A temporary bundle of what was learned."""
        bundle = self._encoded
        records, names = dict(bundle.manifest.tasks), Names(bundle.manifest.base.tensors)
        for place, task in enumerate(self.family.tasks):
            own = torch.tensor(values[place], dtype=torch.float32)
            path = bundle.path / task_file(task)
            learned = path.with_name("learned")  # a name that is short, whatever the task's is
            writer = PartWriter(learned, packed=names if bundle.codec.packs else None)
            for name in bundle.task_names(task):
                parts = bundle.task_parts(task, name)
                for part, tensor in self._scaled(place, name, parts, own).items():
                    writer.add(Part.of(f"{name}/{part}", tensor.to(parts[part].dtype)))
            record = writer.finish()
            learned.rename(path)
            records[task] = replace(records[task], file=record)
        bundle.update(replace(bundle.manifest, tasks=records))
        return bundle
