"""Rows of a comparison that an interrupted run measured, from which the next one goes on."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from fusionkit.calibration.data import CalibrationData
from fusionkit.calibration.settings import Calibration
from fusionkit.checkpoints.checkpoint import Checkpoint
from fusionkit.cli import report
from fusionkit.cli.comparison import Comparison
from fusionkit.codecs.base import DeltaCodec
from fusionkit.registry import to_config
from fusionkit.reuse.module import ReuseModule
from fusionkit.task_vectors.family import Family
from fusionkit.tasks.facts import Facts
from fusionkit.tasks.limits import limit_of
from fusionkit.tasks.scores import Measured, Scores

FOLDER = "rows"
"""Where they are, a file each, beside the tables."""


class KeptRows:
    """What was measured of the same inputs: checkpoints, model, rows, metrics, codec, version.

    Args:
        folder: where results are written; None: nothing is kept.
        inputs: what all rows have in common, as JSON.
        trainer: has connected the processes, of which the first one reads for all.
    """

    def __init__(self, folder: Path | None, inputs: Any, trainer: Trainer) -> None:
        self._folder = None if folder is None else folder / FOLDER
        self._inputs = inputs
        found = {} if self._folder is None else _read(self._folder)
        self._found: Mapping[str, Any] = trainer.strategy.broadcast(found)

    @property
    def keeps(self) -> bool:
        """Whether rows are kept at all."""
        return self._folder is not None

    def key(self, what: Any) -> str:
        """What tells a row from others.

        Args:
            what: is measured, as JSON: a codec, and how it is calibrated.
        """
        text = json.dumps([self._inputs, what], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def get(self, key: str) -> Comparison | None:
        """The row of a key, if an earlier run measured it."""
        return None if key not in self._found else _row(self._found[key])

    def keep(self, key: str, row: Comparison) -> None:
        """Write a row down."""
        if self._folder is not None:
            content = json.dumps(_content(row)) + "\n"
            report.replace_file(self._folder / f"{key}.json", content.encode())


def inputs_of(module: ReuseModule, family: Family, datamodule: Any, trainer: Trainer) -> Any:
    """What all rows of a comparison have in common, as JSON; the test rows are read once.

    Args:
        module: is scored.
        family: base and fine-tuned models.
        datamodule: the tasks' test rows.
        trainer: evaluates.
    """
    digest = _RowsDigest()
    trainer.test(digest, datamodule=datamodule, verbose=False)
    checkpoints = {"": family.base, **family.finetuned}
    patterns = [family.private_patterns, family.frozen_patterns, bool(family.space)]
    scored = [module.metric, module.num_classes, getattr(datamodule, "kinds", None)]
    return [
        version("fusionkit"),
        {task: _identity(checkpoint) for task, checkpoint in checkpoints.items()},
        [*patterns, family.rename, list(family.ignore)],
        [str(module.model), _text(scored)],
        [digest.found(), limit_of(trainer, datamodule), trainer.precision],
    ]


def codec_inputs(codec: DeltaCodec) -> Any:
    """What a codec is, as JSON."""
    return [to_config(codec), repr(codec)]  # which shows what is no setting, too


def calibration_inputs(
    settings: Calibration, seeds: Sequence[int], datamodule: Any, trainer: Trainer
) -> Any:
    """How codecs are calibrated, as JSON; the rows are read once.

    Args:
        settings: of calibration.
        seeds: to calibrate with.
        datamodule: the tasks' training rows.
        trainer: one that would calibrate.
    """
    datamodule.setup("fit")
    digests = []
    for seed in seeds or [settings.seed]:
        digest = hashlib.sha256()
        loaders = CalibrationData(datamodule, settings.rows, seed).train_dataloader()
        for task, loader in loaders.items():
            digest.update(task.encode())
            for batch in loader:
                _add(digest, batch)
        digests.append(digest.hexdigest())
    steps = [trainer.max_epochs, trainer.max_steps, trainer.limit_train_batches, trainer.precision]
    return [asdict(settings), list(seeds), digests, steps]


class _RowsDigest(LightningModule):
    """Takes in the rows of an evaluation as the Trainer gives them, and tells them from others."""

    def __init__(self) -> None:
        super().__init__()
        self._digest = hashlib.sha256()

    def configure_model(self) -> None:
        """There is no model to shard."""

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take in a batch."""
        self._digest.update(f"{dataloader_idx} {batch_idx}".encode())
        _add(self._digest, batch)

    def found(self) -> list[str]:
        """A digest of each process's rows."""
        own = self._digest.hexdigest()
        if self.trainer.world_size == 1:
            return [own]
        digests: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(digests, own)
        return digests


def _add(digest: Any, value: Any) -> None:
    """Take a batch into a digest: its tensors' bytes, and what else is in it as text."""
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        for key, each in value.items():
            digest.update(str(key).encode())
            _add(digest, each)
    elif isinstance(value, list | tuple):
        digest.update(str(len(value)).encode())
        for each in value:
            _add(digest, each)
    else:
        digest.update(_text(value).encode())


def _text(value: Any) -> str:
    """An object as text, without where in memory it is."""
    return re.sub(r" at 0x\w+", "", repr(value))


def _identity(checkpoint: Checkpoint) -> Any:
    """What tells a checkpoint from another: its files, or all its values where it has none."""
    if checkpoint.files:
        stats = [(path, path.stat()) for path in dict.fromkeys(checkpoint.files)]
        files = [[str(path.absolute()), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
        return [checkpoint.strip_prefix, checkpoint.add_prefix, files]
    digest = hashlib.sha256()
    for name in sorted(checkpoint):
        digest.update(name.encode())
        _add(digest, checkpoint[name])
    return digest.hexdigest()


def _read(folder: Path) -> dict[str, Any]:
    """All rows of a folder by key; files that can't be read are none."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.stem] = json.loads(path.read_text())
        except (OSError, ValueError):  # half written, or somebody's own
            continue
    return found


def _content(row: Comparison) -> dict[str, Any]:
    """A row as JSON."""
    own = {key: value for key, value in vars(row).items() if key != "scores"}
    scores = row.scores
    tasks = {}
    for task, value in scores.values.items():
        measured = scores.of(task)
        rows = None if measured.row_scores is None else measured.row_scores.tolist()
        facts = asdict(measured.facts)
        others = dict(measured.others)
        tasks[task] = {"value": value, "facts": facts, "rows": measured.rows, "others": others}
        tasks[task]["row_scores"] = rows
    return {**own, "limit": scores.limit, "tasks": tasks}


def _row(content: Mapping[str, Any]) -> Comparison:
    """The inverse."""
    own = dict(content)
    limit, tasks = own.pop("limit"), own.pop("tasks")
    measured = {}
    for task, each in tasks.items():
        rows = None if each["row_scores"] is None else torch.tensor(each["row_scores"])
        measured[task] = Measured(Facts(**each["facts"]), each["rows"], each["others"], rows)
    values = {task: cast(float, each["value"]) for task, each in tasks.items()}
    return Comparison(scores=Scores(values, measured=measured, limit=limit), **own)


def related(
    row: Comparison, finetuned: Mapping[str, float], base: Mapping[str, float]
) -> Comparison:
    """A row whose scores are related to the fine-tuned models' and the base's.

    Args:
        row: measured now or earlier.
        finetuned: task → score.
        base: task → score.
    """
    return replace(row, scores=replace(row.scores, finetuned=dict(finetuned), base=dict(base)))
