"""BatchNorm's running statistics, re-estimated for weights that are not those they were taken of.

A fine-tuned model's statistics come back exactly, whatever the codec. Where its weights do not, as
in a merge, layers see other activations than the statistics tell of, and the model may fail though
its weights are good. No label is needed to mend that: a few rows of the task, and forward passes.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.compress import compress
from fusionkit.bundles.format import MANIFEST
from fusionkit.calibration.data import CalibrationData
from fusionkit.checkpoints.adapters.with_start import WithStart
from fusionkit.checkpoints.output_folder import check_replaceable
from fusionkit.codecs.base import DeltaCodec
from fusionkit.errors import FusionKitError
from fusionkit.reuse.module import ReuseModule
from fusionkit.tasks.kinds import kinds_of
from fusionkit.tasks.task import Task

STALE = (
    "the model has BatchNorm, and its running statistics are those of the fine-tuned models, not "
    "of the merged weights: scores may be far too low; `recalibrate: true` re-estimates them on "
    "unlabelled rows"
)
"""What is to be known of a merge of such models."""


def recalibrate(
    module: ReuseModule,
    datamodule: Any,
    out: str | Path | None = None,
    *,
    codec: DeltaCodec | None = None,
    rows: int = 256,
    seed: int = 0,
    trainer: Trainer | None = None,
    overwrite: bool = False,
) -> Bundle:
    """Compress a module's family, with BatchNorm's statistics of what comes back.

    Each task's statistics are the means over batches of its own rows, without labels, as
    `torch.optim.swa_utils.update_bn` has them. The module then reuses the bundle.

    Args:
        module: its base and fine-tuned checkpoints are used.
        datamodule: of the family's tasks; see `CalibrationData`.
        out: the bundle's folder; by default a temporary one.
        codec: by default the module's own.
        rows: rows per task.
        seed: draws them.
        trainer: runs them; by default a plain one.
        overwrite: replace the folder if it is there.

    Returns:
        the bundle, with the statistics as each task's exact tensors.

    Raises:
        BundleError: `out` exists, or can't be written.
        DataError: a task has no rows.
        FusionKitError: the model has no such statistics, or there are several processes.
    """
    if out is not None:
        check_replaceable(out, overwrite, known_by=MANIFEST)
    if not has_statistics(module.model):
        raise FusionKitError(
            f"{type(module.model).__name__} has no running statistics (BatchNorm), and nothing to "
            "re-estimate; leave `recalibrate` out"
        )
    quiet: Any = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary"), False)
    trainer = trainer or Trainer(devices=1, enable_progress_bar=False, **quiet)
    if trainer.world_size > 1:
        raise FusionKitError(
            "statistics are re-estimated by one process, of all rows: --trainer.devices 1"
        )
    compressed = module.compress(codec=codec)
    module.reuse(compressed)
    found = _estimated(module, CalibrationData(datamodule, rows, seed), trainer)
    family = module.family()
    told = {task: WithStart(family.finetuned[task], own) for task, own in found.items()}
    bundle = compress(
        module.base_source or module.base_weights,
        {**family.finetuned, **told},
        compressed.codec,
        private=module.private,
        frozen=module.frozen,
        rename=module.rename,
        ignore=module.ignore,
        device=module.device,
    )
    if out is not None:
        bundle.save(out, overwrite)
        bundle = Bundle(out, family.base, key="")
    module.reuse(bundle)
    return bundle


def has_statistics(model: nn.Module) -> bool:
    """Whether a model has running statistics."""
    return any(True for _ in _layers(model))


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that have running statistics, by name."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.running_mean is not None:
            yield name, layer


class _Estimation(LightningModule):
    """Lets a module's tasks see their rows, one after the other, and takes statistics."""

    def __init__(self, reuse: ReuseModule, kinds: Mapping[str, Task]) -> None:
        super().__init__()
        self.reuse = reuse
        self._kinds = kinds
        self.found: dict[str, dict[str, Tensor]] = {}

    def configure_model(self) -> None:
        """The module's own."""

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """One batch of one task: statistics are means over its batches."""
        task = list(self._kinds)[dataloader_idx]
        model = self.reuse.model
        if self.reuse.task != task or batch_idx == 0:
            self.reuse.switch(task)
            for _, layer in _layers(model):
                layer.reset_running_stats()
        with _watching(model):
            self._kinds[task].predict(model, batch)
        self.found[task] = {
            f"{name}.{buffer}": tensor.detach().cpu().clone()
            for name, layer in _layers(model)
            for buffer, tensor in layer.named_buffers(recurse=False)
        }


@contextmanager
def _watching(model: nn.Module) -> Iterator[None]:
    """Layers with statistics take them, as means over all that they see; nothing else changes."""
    layers = [(layer, layer.momentum, layer.training) for _, layer in _layers(model)]
    for layer, *_ in layers:
        layer.momentum = None
        layer.train()
    try:
        yield
    finally:
        for layer, momentum, training in layers:
            layer.momentum = momentum
            layer.train(training)


def _estimated(
    module: ReuseModule, data: CalibrationData, trainer: Trainer
) -> dict[str, dict[str, Tensor]]:
    """Task → its statistics by name."""
    data.prepare_data()
    data.setup("fit")
    loaders = data.train_dataloader()
    kinds = kinds_of(data.datamodule, list(loaders), module.num_classes, scored=False)
    estimation = _Estimation(module, kinds)
    with torch.no_grad():
        trainer.test(estimation, dataloaders=list(loaders.values()), verbose=False)
    module.switch(None)
    return estimation.found
