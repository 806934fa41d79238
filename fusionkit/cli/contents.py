"""What one task takes of a bundle: bytes, and errors of weights, by tensor, layer or kind."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.format import ADDED
from fusionkit.bundles.weight_error import WeightError, tensor_errors
from fusionkit.checkpoints.checkpoint import Checkpoint
from fusionkit.cli.table import Table
from fusionkit.codecs.base import WHOLE_MODEL
from fusionkit.errors import size
from fusionkit.task_vectors.family import Family

By = Literal["tensor", "layer", "kind"]
"""What bytes are added up by."""
WHOLE_NAME = "(whole model)"
FILE_NAME = "(names and padding)"


@dataclass(frozen=True)
class Held:
    """What a tensor, or a group of them, takes.

    Attributes:
        name: the tensor's or the group's.
        kind: of tensors whose delta is compressed what they are (`linear`, `embedding`, …; by
            shape `matrix` or `vector` where that is not known); else their role: `private`,
            `exact`, `added`.
        tensors: how many there are.
        parameters: of these.
        nbytes: bytes of the task's parts.
        error: against the fine-tuned checkpoint, of what is compressed; None: it is not at hand.
    """

    name: str
    kind: str
    tensors: int
    parameters: int
    nbytes: int
    error: WeightError | None = None

    @property
    def bits(self) -> float | None:
        """Per parameter; None where there is none."""
        return 8 * self.nbytes / self.parameters if self.parameters else None

    @property
    def relative_error(self) -> float | None:
        """‖δ̂ − δ‖² / ‖δ‖²; None where δ is zero, or not known."""
        return self.error.relative if self.error else None

    def as_json(self) -> dict[str, Any]:
        """It as JSON has it."""
        own = {key: value for key, value in asdict(self).items() if key != "error"}
        return {**own, "bits_per_parameter": self.bits, "relative_error": self.relative_error}


def contents(
    bundle: Bundle, task: str, by: By = "tensor", finetuned: str | Path | None = None
) -> list[Held]:
    """What a task takes of a bundle, largest first; of the parts that tasks share, nothing.

    Args:
        bundle: the bundle.
        task: one of its tasks.
        by: what is added up: each tensor by itself, a layer's (`encoder.layer.3`), or a kind's.
        finetuned: the task's fine-tuned checkpoint, which its weights are held against; the base
            is then needed, too, and all deltas are decoded.

    Raises:
        BundleError: there is no such task; a file was changed; the base can't be found.
        CheckpointError, FamilyError: the checkpoint can't be read, or is of another family.
    """
    errors = {} if finetuned is None else _errors(bundle, task, finetuned)
    record = bundle.manifest.base
    stored = {name: _bytes(bundle, task, name) for name in bundle.task_names(task)}
    names = dict.fromkeys([*stored, *record.names("delta")])
    found = [_held(bundle, task, name, stored.get(name, 0), errors) for name in names]
    rest = bundle.manifest.tasks[task].file.bytes - sum(stored.values())
    found = [each for each in _grouped(found, by) if each.nbytes or each.error]
    found.sort(key=lambda each: -each.nbytes)
    return [*found, Held(FILE_NAME, "file", 0, 0, rest)] if rest else found


def contents_table(bundle: Bundle, task: str, by: By, found: list[Held]) -> Table:
    """The same as a table."""
    errors = any(each.error for each in found)
    columns = (by, "kind", "tensors", "parameters", "bytes", "share", "bits/param")
    table = Table(
        f"{bundle.path}: task '{task}'", (*columns, *["error"] * errors), words=2, footer=1
    )
    whole = sum(each.nbytes for each in found)
    if errors:
        table.note = "error: ‖δ̂ − δ‖² / ‖δ‖² of the compressed tensors, against the checkpoint."
    if shared := bundle.manifest.shared:
        table.note = f"All tasks share {size(shared.bytes)} more. {table.note}".strip()
    total = sum(each.parameters for each in found)
    last = Held("together", "", sum(e.tensors for e in found), total, whole, _sum(found))
    for each in (*found, last):
        table.add(
            each.name,
            each.kind,
            f"{each.tensors:,}" if each.tensors else "",
            f"{each.parameters:,}" if each.parameters else "",
            size(each.nbytes),
            f"{100 * each.nbytes / max(whole, 1):.1f}%",
            "" if each.bits is None else f"{each.bits:.3f}",
            *[
                "" if each.relative_error is None else f"{each.relative_error:#.3g}"
                for _ in range(errors)
            ],
        )
    return table


def _errors(bundle: Bundle, task: str, finetuned: str | Path) -> Mapping[str, WeightError]:
    """Errors by tensor, of the family that the bundle was made from."""
    manifest = bundle.manifest
    bundle.check([task])
    family = Family(
        bundle.whole_base,
        {task: Checkpoint.of(str(finetuned))},
        manifest.private,
        manifest.frozen,
        "modules" if manifest.base.space else "merged",
        rename=manifest.base.rename,
        ignore=manifest.base.ignore,
    )
    return tensor_errors(bundle, family, task)


def _bytes(bundle: Bundle, task: str, name: str) -> int:
    return sum(
        part.numel() * part.element_size() for part in bundle.task_parts(task, name).values()
    )


def _held(
    bundle: Bundle, task: str, name: str, nbytes: int, errors: Mapping[str, WeightError]
) -> Held:
    """One tensor."""
    record = bundle.manifest.base
    tensor = record.tensors.get(name)
    if name == WHOLE_MODEL:
        return Held(WHOLE_NAME, "whole model", 0, 0, nbytes)
    if name.startswith(ADDED):
        rows = bundle.task_parts(task, name).values()
        count = sum(part.numel() for part in rows)
        return Held(name.removeprefix(ADDED), "added", 1, count, nbytes)
    if tensor is None or tensor.role != "delta":
        values = bundle.task_parts(task, name).values()
        role = "private" if tensor is None else tensor.role
        return Held(name, role, 1, sum(part.numel() for part in values), nbytes)
    shape = torch.Size(tensor.shape)
    kind = record.kinds.get(name) or ("matrix" if len(shape) > 1 else "vector")
    return Held(name, str(kind), 1, shape.numel(), nbytes, errors.get(name))


def _grouped(found: list[Held], by: By) -> list[Held]:
    """Tensors added up."""
    groups: dict[str, list[Held]] = {}
    for each in found:
        name = {"tensor": each.name, "kind": each.kind, "layer": layer_of(each.name)}[by]
        groups.setdefault(name, []).append(each)
    return [
        Held(
            name,
            ", ".join(dict.fromkeys(each.kind for each in own)),
            sum(each.tensors for each in own),
            sum(each.parameters for each in own),
            sum(each.nbytes for each in own),
            _sum(own),
        )
        for name, own in groups.items()
    ]


def _sum(found: list[Held]) -> WeightError | None:
    """Of all that is known."""
    known = [each.error for each in found if each.error is not None]
    sums = [(each.energy, each.error, each.product) for each in known]
    return WeightError(*map(sum, zip(*sums, strict=True))) if known else None


def layer_of(name: str) -> str:
    """A tensor's layer: its name as far as its first number, or without its last two parts."""
    numbered = re.match(r"(.*?\.\d+)(\.|$)", name)
    return numbered[1] if numbered else name.rpartition(".")[0] or name
