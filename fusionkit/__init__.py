"""FusionKit: many fine-tuned models of one base, as the base and a small delta per task."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusionkit.bundles.add_tasks import add_tasks as add_tasks
    from fusionkit.bundles.bundle import Bundle as Bundle
    from fusionkit.bundles.compress import compress as compress
    from fusionkit.bundles.export_model import export_task as export_task
    from fusionkit.bundles.export_peft import export_adapter as export_adapter
    from fusionkit.bundles.sign_bundle import sign_bundle as sign_bundle
    from fusionkit.calibration.calibrate import calibrate as calibrate
    from fusionkit.calibration.recalibrate import recalibrate as recalibrate
    from fusionkit.calibration.settings import Calibration as Calibration
    from fusionkit.checkpoints.adapters.lowrank import LowRank as LowRank
    from fusionkit.checkpoints.checkpoint import Checkpoint as Checkpoint
    from fusionkit.cli.compare import compare as compare
    from fusionkit.cli.fuse import fuse as fuse
    from fusionkit.cli.predict import predict as predict
    from fusionkit.cli.sweep import sweep as sweep
    from fusionkit.codecs.base import WHOLE_MODEL as WHOLE_MODEL
    from fusionkit.codecs.base import DeltaCodec as DeltaCodec
    from fusionkit.codecs.base import Encoded as Encoded
    from fusionkit.codecs.base import Encoder as Encoder
    from fusionkit.codecs.base import Parts as Parts
    from fusionkit.codecs.base import RestoringCodec as RestoringCodec
    from fusionkit.codecs.base import SharedParts as SharedParts
    from fusionkit.codecs.base import TensorCodec as TensorCodec
    from fusionkit.codecs.dbms import DBMS as DBMS
    from fusionkit.codecs.dense import Dense as Dense
    from fusionkit.codecs.emr import EMR as EMR
    from fusionkit.codecs.linearized_lora import LinearizedLoRA as LinearizedLoRA
    from fusionkit.codecs.magnitude_prune import MagnitudePrune as MagnitudePrune
    from fusionkit.codecs.merged import Merged as Merged
    from fusionkit.codecs.sketch import Sketch as Sketch
    from fusionkit.codecs.svd import SVD as SVD
    from fusionkit.merges.base import Merge as Merge
    from fusionkit.merges.base import MergeTensor as MergeTensor
    from fusionkit.merges.base import TensorMerge as TensorMerge
    from fusionkit.merges.base import in_blocks as in_blocks
    from fusionkit.merges.elect import Elect as Elect
    from fusionkit.merges.mean import Mean as Mean
    from fusionkit.merges.normalized import Normalized as Normalized
    from fusionkit.merges.task_arithmetic import TaskArithmetic as TaskArithmetic
    from fusionkit.merges.ties import TIES as TIES
    from fusionkit.merges.weighted import Weighted as Weighted
    from fusionkit.reuse.beside import processor as processor
    from fusionkit.reuse.beside import tokenizer as tokenizer
    from fusionkit.reuse.loaded import load as load
    from fusionkit.reuse.loaded import switch as switch
    from fusionkit.reuse.module import ReuseModule as ReuseModule
    from fusionkit.task_vectors.family import Family as Family
    from fusionkit.task_vectors.vectors import TaskVectors as TaskVectors
    from fusionkit.tasks.classification import Classification as Classification
    from fusionkit.tasks.data_of import data_of as data_of
    from fusionkit.tasks.finetune import Finetune as Finetune
    from fusionkit.tasks.only import only as only
    from fusionkit.tasks.regression import Regression as Regression
    from fusionkit.tasks.task import Task as Task

_PLACES = {
    "add_tasks": "fusionkit.bundles.add_tasks",
    "Bundle": "fusionkit.bundles.bundle",
    "calibrate": "fusionkit.calibration.calibrate",
    "Calibration": "fusionkit.calibration.settings",
    "Checkpoint": "fusionkit.checkpoints.checkpoint",
    "Classification": "fusionkit.tasks.classification",
    "compare": "fusionkit.cli.compare",
    "compress": "fusionkit.bundles.compress",
    "data_of": "fusionkit.tasks.data_of",
    "DBMS": "fusionkit.codecs.dbms",
    "DeltaCodec": "fusionkit.codecs.base",
    "Dense": "fusionkit.codecs.dense",
    "Elect": "fusionkit.merges.elect",
    "EMR": "fusionkit.codecs.emr",
    "Encoded": "fusionkit.codecs.base",
    "Encoder": "fusionkit.codecs.base",
    "export_adapter": "fusionkit.bundles.export_peft",
    "export_task": "fusionkit.bundles.export_model",
    "Family": "fusionkit.task_vectors.family",
    "Finetune": "fusionkit.tasks.finetune",
    "fuse": "fusionkit.cli.fuse",
    "in_blocks": "fusionkit.merges.base",
    "LinearizedLoRA": "fusionkit.codecs.linearized_lora",
    "load": "fusionkit.reuse.loaded",
    "LowRank": "fusionkit.checkpoints.adapters.lowrank",
    "MagnitudePrune": "fusionkit.codecs.magnitude_prune",
    "Mean": "fusionkit.merges.mean",
    "Merge": "fusionkit.merges.base",
    "Merged": "fusionkit.codecs.merged",
    "MergeTensor": "fusionkit.merges.base",
    "Normalized": "fusionkit.merges.normalized",
    "only": "fusionkit.tasks.only",
    "Parts": "fusionkit.codecs.base",
    "processor": "fusionkit.reuse.beside",
    "predict": "fusionkit.cli.predict",
    "recalibrate": "fusionkit.calibration.recalibrate",
    "Regression": "fusionkit.tasks.regression",
    "RestoringCodec": "fusionkit.codecs.base",
    "ReuseModule": "fusionkit.reuse.module",
    "SharedParts": "fusionkit.codecs.base",
    "sign_bundle": "fusionkit.bundles.sign_bundle",
    "Sketch": "fusionkit.codecs.sketch",
    "SVD": "fusionkit.codecs.svd",
    "sweep": "fusionkit.cli.sweep",
    "switch": "fusionkit.reuse.loaded",
    "Task": "fusionkit.tasks.task",
    "TaskArithmetic": "fusionkit.merges.task_arithmetic",
    "TaskVectors": "fusionkit.task_vectors.vectors",
    "TensorCodec": "fusionkit.codecs.base",
    "TensorMerge": "fusionkit.merges.base",
    "TIES": "fusionkit.merges.ties",
    "tokenizer": "fusionkit.reuse.beside",
    "Weighted": "fusionkit.merges.weighted",
    "WHOLE_MODEL": "fusionkit.codecs.base",
}
"""A public name → the module that has it, imported when the name is first asked for: PyTorch takes
seconds, Lightning as many, and the command line's help needs neither."""

__all__ = ["__version__", *_PLACES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Import what is first asked for."""
    if name == "__version__":
        return import_module("importlib.metadata").version("fusionkit")
    if name not in _PLACES:
        meant = import_module("fusionkit.errors").meant(name, __all__)
        raise AttributeError(f"module 'fusionkit' has no attribute '{name}'{meant}")
    found = globals()[name] = getattr(import_module(_PLACES[name]), name)
    return found


def __dir__() -> list[str]:
    """All public names, imported or not."""
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__})
