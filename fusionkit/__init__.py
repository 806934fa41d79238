"""FusionKit: many fine-tuned models of one base, as the base and a small delta per task."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fusionkit.bundles.add_tasks import add_tasks as add_tasks
from fusionkit.bundles.bundle import Bundle as Bundle
from fusionkit.bundles.compress import compress as compress
from fusionkit.bundles.export_model import export_task as export_task
from fusionkit.bundles.export_peft import export_adapter as export_adapter
from fusionkit.checkpoints.adapters.lowrank import LowRank as LowRank
from fusionkit.checkpoints.checkpoint import Checkpoint as Checkpoint
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
from fusionkit.task_vectors.family import Family as Family
from fusionkit.task_vectors.vectors import TaskVectors as TaskVectors

if TYPE_CHECKING:
    from fusionkit.calibration.calibrate import calibrate as calibrate
    from fusionkit.calibration.settings import Calibration as Calibration
    from fusionkit.cli.compare import compare as compare
    from fusionkit.cli.fuse import fuse as fuse
    from fusionkit.cli.sweep import sweep as sweep
    from fusionkit.reuse.module import ReuseModule as ReuseModule
    from fusionkit.tasks.classification import Classification as Classification
    from fusionkit.tasks.data_of import data_of as data_of
    from fusionkit.tasks.finetune import Finetune as Finetune
    from fusionkit.tasks.only import only as only
    from fusionkit.tasks.regression import Regression as Regression
    from fusionkit.tasks.task import Task as Task

_LIGHTNING = {
    "calibrate": "fusionkit.calibration.calibrate",
    "Calibration": "fusionkit.calibration.settings",
    "compare": "fusionkit.cli.compare",
    "fuse": "fusionkit.cli.fuse",
    "sweep": "fusionkit.cli.sweep",
    "Classification": "fusionkit.tasks.classification",
    "data_of": "fusionkit.tasks.data_of",
    "Finetune": "fusionkit.tasks.finetune",
    "Regression": "fusionkit.tasks.regression",
    "ReuseModule": "fusionkit.reuse.module",
    "Task": "fusionkit.tasks.task",
    "only": "fusionkit.tasks.only",
}


def __getattr__(name: str) -> Any:
    """Import what needs Lightning when it is first asked for: that takes seconds."""
    if name in _LIGHTNING:
        return getattr(import_module(_LIGHTNING[name]), name)
    raise AttributeError(f"module 'fusionkit' has no attribute '{name}'")
