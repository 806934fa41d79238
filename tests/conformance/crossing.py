"""The crossing: from every kind of source, through a codec, to every sink.

Each kind of base meets each kind of fine-tune once, and each codec meets each of both once (a
Latin square); every bundle is read as a state dict, and the other sinks are dealt out so that each
meets folders and live models.
"""

import copy
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import peft
import torch
from conformance import models
from conformance.row import ModelFamily
from torch import Tensor, nn

import fusionkit
from fusionkit.bundles.export_model import export_task
from fusionkit.bundles.export_peft import export_adapter
from fusionkit.codecs.base import DeltaCodec
from fusionkit.errors import FusionKitError

CODECS: Mapping[str, DeltaCodec] = {
    "Dense": fusionkit.Dense("fp32"),
    "SVD": fusionkit.SVD(rank=2, dtype="fp32"),
    "EMR": fusionkit.EMR(dtype="fp32"),  # of one task alone: its own vector, masked nowhere
}
CROSSING = (
    ("folder", "folder", "Dense", ("state_dict", "switch", "model")),
    ("folder", "live", "SVD", ("state_dict", "peft")),
    ("folder", "LoRA", "EMR", ("state_dict", "switch", "model")),
    ("sharded", "folder", "SVD", ("state_dict", "switch")),
    ("sharded", "live", "EMR", ("state_dict", "model")),
    ("sharded", "LoRA", "Dense", ("state_dict", "switch")),
    ("live", "folder", "EMR", ("state_dict", "switch")),
    ("live", "live", "Dense", ("state_dict", "switch", "model")),
    ("live", "LoRA", "SVD", ("state_dict", "switch", "peft")),
)
"""Kind of base, kind of fine-tune, codec, sinks."""

WEIGHTS, OUTPUTS = 1e-6, 2e-5
"""Largest difference, as a share of the largest entry of a tensor, and of the outputs.

A float32 sum is rounded to 6e-8 of it; a product of factors and base + delta are a few such, which
the layers of these models raise to 2e-6 at most. Whichever tensor alone is left at the base's moves
the outputs by more than 2e-5, but for what they don't depend on (the bias of attention's keys,
layers that are not read): there it is the weights that tell.
"""


@dataclass
class Wanted:
    """What a fine-tune is: its outputs, and its weights by the class's names."""

    outputs: Tensor
    weights: Mapping[str, Tensor]

    def difference(self, outputs: Tensor, weights: Mapping[str, Tensor] | None = None) -> str:
        """What is wrong with a model; nothing where it is the fine-tune to rounding."""
        if weights is not None:
            if weights.keys() != self.weights.keys():
                return f"other names: {sorted(weights.keys() ^ self.weights.keys())[:4]}"
            for name, wanted in self.weights.items():
                if (share := _share(weights[name], wanted)) > WEIGHTS:
                    return f"'{name}' is off by {share:.1e}"
        share = _share(outputs, self.outputs)
        return f"outputs are off by {share:.1e}" if share > OUTPUTS else ""


@dataclass
class Sources:
    """One family's base and fine-tunes, each in all of its kinds."""

    row: ModelFamily
    base: nn.Module
    folder: Path
    bases: Mapping[str, Any]
    tuned: Mapping[str, Any]
    wanted: Mapping[str, Wanted]

    @classmethod
    def of(cls, row: ModelFamily, folder: Path) -> "Sources":
        """Build and save them."""
        base = models.build(row)
        tuned, adapted = models.finetuned(row, base), models.adapted(row, base)
        adapted.save_pretrained(folder / "lora", save_embedding_layers=False)
        full = Wanted(models.outputs(row, tuned), tuned.state_dict())
        outputs = models.outputs(row, adapted)
        lora = Wanted(outputs, adapted.merge_and_unload().state_dict())
        for wanted in (full, lora):
            assert _share(models.outputs(row, base), wanted.outputs) > 100 * OUTPUTS
        return cls(
            row,
            base,
            folder,
            bases={
                "folder": str(models.save(row, base, folder / "base")),
                "sharded": str(models.save(row, base, folder / "sharded", sharded=True)),
                "live": base,
            },
            tuned={
                "folder": str(models.save(row, tuned, folder / "tuned")),
                "live": tuned,
                "LoRA": str(folder / "lora"),
            },
            wanted={"folder": full, "live": full, "LoRA": lora},
        )


Sink = Callable[[Sources, fusionkit.Bundle, Wanted, Path], str]


def read(sources: Sources, bundle: fusionkit.Bundle, wanted: Wanted, folder: Path) -> str:
    """Load the bundle's state dict into the class; what the class never saves may be absent."""
    model = copy.deepcopy(sources.base)
    keys = model.load_state_dict(bundle.state_dict("task"), strict=False)
    unsaved = getattr(model, "_keys_to_ignore_on_save", None) or set()
    if wrong := [*keys.unexpected_keys, *(k for k in keys.missing_keys if k not in unsaved)]:
        return f"other names: {wrong[:4]}"
    return wanted.difference(models.outputs(sources.row, model), model.state_dict())


def switch(sources: Sources, bundle: fusionkit.Bundle, wanted: Wanted, folder: Path) -> str:
    """Switch a live model to the task, and back."""
    module = fusionkit.ReuseModule(copy.deepcopy(sources.base), bundle)
    module.switch("task")
    outputs = models.outputs(sources.row, module.model)
    difference = wanted.difference(outputs, module.model.state_dict())
    module.switch(None)
    back = module.model.state_dict()
    moved = [n for n, t in sources.base.state_dict().items() if not torch.equal(t, back[n])]
    return difference or (f"switched back, '{moved[0]}' is not the base's" if moved else "")


def export_model(sources: Sources, bundle: fusionkit.Bundle, wanted: Wanted, folder: Path) -> str:
    """Export a folder that the family's library loads; of a live model of timm, its file."""
    if sources.row.library == "timm" and not bundle.base.files:  # which has no configuration
        folder.mkdir()
        shutil.copy(sources.folder / "base" / "config.json", folder)
        export_task(bundle, "task", folder / "model.safetensors")
    else:
        export_task(bundle, "task", folder, max_shard_size="50KB")
    model = models.load(sources.row, folder)
    return wanted.difference(models.outputs(sources.row, model), model.state_dict())


def export_peft(sources: Sources, bundle: fusionkit.Bundle, wanted: Wanted, folder: Path) -> str:
    """Export an adapter that plain PEFT loads over the base."""
    export_adapter(bundle, "task", folder, dtype="fp32")
    model = peft.PeftModel.from_pretrained(copy.deepcopy(sources.base), folder)
    return wanted.difference(models.outputs(sources.row, model.eval()))


SINKS: Mapping[str, Sink] = {
    "state_dict": read,
    "switch": switch,
    "model": export_model,
    "peft": export_peft,
}


def cross(row: ModelFamily, folder: Path) -> dict[str, str]:
    """Take a family through the crossing.

    Args:
        row: the family.
        folder: an empty one, for its files.

    Returns:
        crossing (`folder × LoRA → EMR → switch`) → what is wrong with it; nothing where the
        fine-tuned model came back, or was refused as the row says.
    """
    sources = Sources.of(row, folder)
    found = {}
    for place, (base, tuned, codec, sinks) in enumerate(CROSSING):
        bundle: fusionkit.Bundle | None = None
        for sink in sinks:
            name = f"{base} × {tuned} → {codec} → {sink}"
            expected = next((m for p, m in row.refused.items() if fnmatchcase(name, p)), None)
            try:
                if bundle is None:
                    finetuned = {"task": sources.tuned[tuned]}
                    bundle = fusionkit.compress(sources.bases[base], finetuned, CODECS[codec])
                wrong = SINKS[sink](
                    sources, bundle, sources.wanted[tuned], folder / f"{place}{sink}"
                )
            except FusionKitError as error:
                wrong = "" if expected and expected in str(error) else f"refused: {error}"
            except Exception as error:  # none of FusionKit's, so no refusal
                wrong = f"{type(error).__name__}: {error}"
            else:
                if expected and not wrong:
                    wrong = f"is not refused any more: {expected}"
            found[name] = wrong
    return found


def _share(found: Tensor, wanted: Tensor) -> float:
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(found, wanted) else 1.0
    largest = wanted.abs().max().clamp(min=1e-30)
    return float((found - wanted).abs().max() / largest)
