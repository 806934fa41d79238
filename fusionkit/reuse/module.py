"""ReuseModule: one base model that becomes any task's model, and is evaluated by the Trainer."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.compress import compress
from fusionkit.checkpoints.adapters.modules import Adapters
from fusionkit.checkpoints.checkpoint import Checkpoint, find_checkpoints
from fusionkit.checkpoints.headed import Headed
from fusionkit.checkpoints.live_model import load_base, on_meta, open_for
from fusionkit.checkpoints.paths import open_path
from fusionkit.checkpoints.quantized import unquantized
from fusionkit.checkpoints.stacks import split_tensors
from fusionkit.codecs.base import DeltaCodec
from fusionkit.errors import BundleError, FusionKitError
from fusionkit.reuse.beside import made_by
from fusionkit.reuse.described import described
from fusionkit.reuse.evaluation import Evaluation, loader_of
from fusionkit.reuse.mixed_batch import MixedBatch, of_module
from fusionkit.reuse.prediction import Prediction
from fusionkit.reuse.seen import Seen
from fusionkit.reuse.sharded import ShardedBase, check_strategy, own_tensors, shard_with_base
from fusionkit.reuse.sole_switch import refuse_half_switched, sole_switch
from fusionkit.reuse.switcher import Switcher
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.processes import ALONE, Processes
from fusionkit.task_vectors.task_source import TaskSource
from fusionkit.task_vectors.workers import Progress
from fusionkit.tasks.kinds import kinds_of
from fusionkit.tasks.metrics import MetricChoice, check_choice
from fusionkit.tasks.score_file import known_scores
from fusionkit.tasks.scores import Scores
from fusionkit.tasks.zero_shot import ZeroShotModels


class ReuseModule(LightningModule):
    """A base model that `switch`es to any task of a bundle.

    The tasks come from a bundle on disk; or from checkpoints and a codec, compressed on first use
    into a temporary bundle; or from checkpoints alone, uncompressed. The base's weights are kept
    once beside the model's, so that every switch starts from them. It is for one thread at a time:
    a switch, or a call, during another thread's switch is refused.

    Args:
        model: the base model; its weights are the base's unless `base` is given. It may be on
            the meta device, to be filled from there as it is sharded.
        bundle: a bundle, or its folder. With a codec given too, the bundle must be made by it.
        codec: how the fine-tuned checkpoints are compressed; none: they are used as they are.
        finetuned: task name → fine-tuned checkpoint; or one path with a `*` that stands for the
            task's name (`models/*/model.safetensors`); or `ZeroShotModels`.
        private: patterns (`classifier.*`) of the tensors that are each task's own.
        frozen: patterns of the tensors that equal the base's in every task.
        adapters: of PEFT adapters among `finetuned`, reuse the weights that they are `merged`
            into, or the adapter `modules` themselves; see `Family`.
        base: where the base's weights are, if not in `model`; they are loaded into it.
        metric: what scores the tasks, if not what their kinds say: any of torchmetrics' by name,
            with its arguments, for all or per task; see `fusionkit.tasks.metrics.MetricChoice`.
        num_classes: classes per task, of a datamodule that does not say what its tasks are.
        finetuned_scores: task name → the fine-tuned model's own score, to which scores are
            related; or the `scores.json` of 'fusionkit test' of the fine-tuned models.
        base_scores: task name → the base's own score, which shares of metrics need that are better
            the lower they are.
        cache_bytes: keep the decoded weights of the tasks used last, up to so many bytes on the
            model's device; to switch back to one of them is a copy.
        rename: regular expression → replacement, for names in all models; see `Family`.
        ignore: patterns of tensors that no one needs, in whichever model they are.

    Raises:
        WrongBaseError: the model is not the base that the bundle was made from.
        BundleError: the bundle is damaged, or was made by another codec.
        PluginError: the bundle's codec is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        bundle: str | Path | Bundle | None = None,
        codec: DeltaCodec | None = None,
        finetuned: ZeroShotModels | dict[str, str | Checkpoint | Headed] | str | None = None,
        private: list[str] | None = None,
        frozen: list[str] | None = None,
        adapters: Adapters = "merged",
        base: str | Checkpoint | None = None,
        metric: MetricChoice = None,
        num_classes: dict[str, int] | None = None,
        finetuned_scores: dict[str, float] | str | None = None,
        base_scores: dict[str, float] | None = None,
        cache_bytes: int = 0,
        rename: dict[str, str] | None = None,
        ignore: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.codec = codec
        found = find_checkpoints(finetuned) if isinstance(finetuned, str) else finetuned
        self.finetuned: dict[str, str | Checkpoint | Headed] = dict(found or {})
        self.private = list(private or [])
        self.frozen = list(frozen or [])
        self.adapters: Adapters = adapters
        self.rename = dict(rename or {})
        self.ignore = list(ignore or [])
        self.metric = metric
        self.num_classes = num_classes
        self.finetuned_scores = finetuned_scores
        self.base_scores = base_scores
        self.bundle_path: Path | None = None
        if bundle is not None and not isinstance(bundle, Bundle):
            self.bundle_path = open_path(bundle)
        self.task: str | None = None
        self.scores: Scores | None = None
        self.evaluation: Evaluation | None = None
        self.prediction: Prediction | None = None
        self.base_source = None if base is None else unquantized(open_for(model, base))
        if self.base_source is not None:
            load_base(model, self.base_source, self.private)
        elif on_meta(model):
            raise FusionKitError("the model is on the meta device; give `base`, to fill it from")
        self._switcher = Switcher(model, cache_bytes, self.base_source)
        self._source: TaskSource | None = None
        self._mixed: MixedBatch | None = None
        if isinstance(bundle, Bundle):
            self.reuse(bundle)
        elif self.bundle_path is not None and self.bundle_path.exists():
            self.reuse(made_by(self.bundle_path, self.codec))

    def __repr__(self) -> str:
        """What it reuses, in a line; nothing is opened for it."""
        return described(self, self._source)

    @property
    def source(self) -> TaskSource:
        """Where the tasks come from; checkpoints are opened, or compressed, on first use.

        Raises:
            FusionKitError: neither a bundle nor checkpoints were given.
        """
        if self._source is None:
            if self.bundle_path is not None:
                raise BundleError(
                    f"{self.bundle_path}: no such bundle; make it with 'fusionkit compress', or "
                    "leave `bundle` out to compress on the fly"
                )
            self.reuse(self.compress() if self.codec else self.family())
        return cast(TaskSource, self._source)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return self.source.tasks

    def reuse(self, source: TaskSource) -> None:
        """Take the tasks from another bundle, or from a family uncompressed.

        Raises:
            WrongBaseError: the model is not the bundle's base.
        """
        if isinstance(source, Bundle):
            source.attach_base(self._switcher.base)  # the model itself is about to change
        if self.task is not None:  # what was frozen for one source need not be for the next
            self.switch(None)
        self._switcher.forget()
        self._source = source

    def family(self, tasks: Collection[str] | None = None) -> Family:
        """The base and its fine-tuned checkpoints.

        Args:
            tasks: of which tasks; by default of all.

        Raises:
            FamilyError: there are none, or they don't fit the base.
        """
        base = self._switcher.base if self.base_source is None else self.base_source
        settings: Any = {"rename": self.rename, "ignore": self.ignore}
        chosen = {task: self.finetuned[task] for task in tasks or self.finetuned}
        return Family(base, chosen, self.private, self.frozen, self.adapters, **settings)

    def compress(
        self,
        out: str | Path | None = None,
        overwrite: bool = False,
        progress: Progress | None = None,
        codec: DeltaCodec | None = None,
        processes: Processes = ALONE,
        device: torch.device | str | None = None,
    ) -> Bundle:
        """Compress the fine-tuned checkpoints; see `fusionkit.compress`.

        Args:
            out: the bundle's folder; by default a temporary one.
            overwrite: replace the folder if it is there.
            progress: called after each tensor of each pass.
            codec: by default the module's own.
            processes: among which the work is shared out.
            device: where to compute; by default the module's own.
        """
        codec = codec or self.codec
        if codec is None or not self.finetuned:
            raise FusionKitError(
                "compressing needs both `codec` and `finetuned`; add what is missing"
            )
        base = self._switcher.base if self.base_source is None else self.base_source
        return compress(
            base,
            self.finetuned,
            codec,
            out,
            private=self.private,
            frozen=self.frozen,
            adapters=self.adapters,
            overwrite=overwrite,
            progress=progress,
            processes=processes,
            device=device or self.device,
            rename=self.rename,
            ignore=self.ignore,
        )

    def switch(self, task: str | None) -> None:
        """Make the model a task's, in place; None makes it the base.

        The weights are rebuilt from the base: after any number of switches they are the same
        bits, and the time depends neither on how many tasks there are nor on which was active.

        Args:
            task: one of `tasks`, or None.

        Raises:
            BundleError: the bundle has no such task, a file of it was changed, or a private
                tensor has no place in the model.
            FamilyError: the tasks are uncompressed, and there is no such task.
            FusionKitError: another thread is switching it.
        """
        source = None if task is None else self.source
        with sole_switch(self.model):
            self.task = None
            self._switcher.become(task, source)
            self.task = task

    @property
    def base_weights(self) -> Mapping[str, Tensor]:
        """The base's weights, on the module's device, in their own dtype."""
        return self._switcher.base

    def base_of(self, source: TaskSource) -> Mapping[str, Tensor]:
        """The same under the names that a source has for them, stacks of experts split."""
        return split_tensors(self.seen(source).base(self._switcher.base), source.stacks)

    def seen(self, source: TaskSource) -> Seen:
        """The model's own tensors as a source has them."""
        return self._switcher.seen(source)

    def place(self, task: str, family: Family, deltas: bool = False) -> None:
        """Give the model a fine-tuned model's own tensors, as a calibration needs them.

        Args:
            task: one of the family's.
            family: where the tensors are.
            deltas: the weights that codecs compress, too; or its head and its buffers, and of
                those weights the ones after a language model's layers.
        """
        left_out = set() if deltas else self.seen(family).in_layers(family.names("delta"))
        with sole_switch(self.model):
            self.task = None
            self._switcher.become(task, family, left_out)

    def shard(self, mesh: DeviceMesh) -> None:
        """Shard the model, and the base's weights beside it, over several processes (FSDP2).

        All ranks call this, and from then on `switch` together, to the same task; tensors that
        are each task's own stay whole. A model that is sharded already stays as it is.

        Args:
            mesh: of one dimension, the ranks to shard over.

        Raises:
            FusionKitError: the model is on the meta device, and was sharded there already, or has
                a buffer that no checkpoint holds.
        """
        base = self._switcher.base
        if isinstance(base, ShardedBase):
            return
        if not on_meta(self.model):
            self.switch(None)
        own = own_tensors(self.model, self.private, self._source)
        self._switcher.base = shard_with_base(self.model, base, mesh, own, self.base_source)
        if isinstance(self._source, Family) and self._source.base is base:
            self.reuse(self.family())
        elif self._source is not None:
            self.reuse(self._source)

    def configure_model(self) -> None:
        """Shard the model, where the Trainer's strategy is ModelParallelStrategy."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            self.shard(self.trainer.strategy.device_mesh["data_parallel"])

    def forward(self, *args: Any, tasks: Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        """The active task's model, called as it is; given a task per row, see `MixedBatch`."""
        if not torch.compiler.is_compiling():
            refuse_half_switched(self.model)
        if tasks is None:
            return self.model(*args, **kwargs)
        if self.task is not None:
            self.switch(None)
        self._mixed = of_module(self.model, self.source, self._mixed)
        return self._mixed(tasks, *args, **kwargs)

    def setup(self, stage: str) -> None:
        """Check tasks and what they are, before anything runs, and make the metrics.

        Raises:
            FusionKitError: it is asked to be fitted, or can't run where the Trainer would have it.
            BundleError: there are data of a task that there is not.
            DataError: it is not known what a task is.
        """
        if stage == "fit":
            raise FusionKitError(
                "a ReuseModule has nothing to fit; learn its codec's scalars by "
                "`fusionkit.calibrate(module, datamodule)`, or fine-tune by `fusionkit.Finetune`"
            )
        check_strategy(self.trainer, self.model)
        tasks = self._evaluated()  # known before checkpoints are opened, or compressed
        if stage == "predict":
            kinds = kinds_of(self._datamodule, tasks, self.num_classes, scored=False)
            self.prediction = Prediction(kinds)
        else:
            self.evaluation = self._evaluation(stage)
        if missing := [task for task in tasks if task not in self.tasks]:
            raise BundleError(
                f"there is data for '{missing[0]}', but no such task among "
                f"{', '.join(self.tasks)}; leave its data out, or give its model"
            )
        if isinstance(self._source, Bundle):
            self._source.check(tasks)  # now, not after half of them

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Predict one batch: a mapping for each row, see `Prediction.step`."""
        return self._step(self.prediction, batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one batch, as its task says."""
        self._step(self.evaluation, batch, batch_idx, dataloader_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As `test_step`, on the validation rows."""
        self._step(self.evaluation, batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Gather the scores: per task, their mean, and as shares of the fine-tuned models'."""
        self._finish("test")

    def on_validation_epoch_end(self) -> None:
        """As `on_test_epoch_end`."""
        self._finish("val")

    @property
    def _datamodule(self) -> Any:
        return getattr(self.trainer, "datamodule", None)

    def _step(self, runs: Evaluation | Prediction | None, batch: Any, at: int, place: int) -> Any:
        task = self._evaluated()[place]
        if task != self.task:
            self.switch(task)
        assert runs is not None
        return runs.step(self.model, batch, at, place, loader_of(self.trainer, place))

    def _finish(self, stage: str) -> None:
        assert self.evaluation is not None
        self.scores = self.evaluation.finish(self, self._datamodule, stage)
        self.log_dict(self.scores.logged(stage), rank_zero_only=True)

    def _evaluation(self, stage: str) -> Evaluation:
        """What scores the tasks."""
        tasks = self._evaluated()
        own = self._source.tasks if self._source is not None else ()
        check_choice(self.metric, [*dict.fromkeys([*self.finetuned, *own, *tasks])])
        known = known_scores(self.finetuned_scores, self.base_scores)
        made = Evaluation(kinds_of(self._datamodule, tasks, self.num_classes), self.metric, known)
        made.check(self.trainer, self._datamodule, "test" if stage == "test" else "val")
        return made

    def _evaluated(self) -> list[str]:
        """The tasks in the order of the dataloaders."""
        return list(getattr(self._datamodule, "tasks", self.tasks))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ReuseModule":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # The base moves with the model but keeps its dtype: rounding it would lose the deltas.
        device = next(self.model.parameters()).device
        self._switcher.to(device)
        return self
