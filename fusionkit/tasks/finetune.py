"""Fine-tuning one task: in full, or by a LoRA, a linearized LoRA (L-LoRA) or an (IA)³ adapter."""

import math
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import STEP_OUTPUT
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics import Metric

from fusionkit.checkpoints.adapters.adapter import CONFIG
from fusionkit.checkpoints.adapters.start import digest
from fusionkit.checkpoints.checkpoint import Checkpoint, matches
from fusionkit.checkpoints.live_model import load_base
from fusionkit.checkpoints.output_folder import new_folder
from fusionkit.checkpoints.paths import open_path
from fusionkit.errors import DataError, FusionKitError
from fusionkit.tasks.adapter import START_BUFFER, Adapter
from fusionkit.tasks.kinds import kinds_of
from fusionkit.tasks.metrics import MetricChoice, check_choice, metric_of, update
from fusionkit.tasks.only import only
from fusionkit.tasks.task import Task

Method = Literal["full", "lora", "linearized_lora", "ia3"]
WEIGHTS = "model.safetensors"
KINDS = (WEIGHTS, CONFIG)
"""A fine-tune's folder has one of these files."""


class Finetune(LightningModule):
    """One task's fine-tuning: its own loss, AdamW, a linear warm-up and decay of the rate.

    Everything else of training is the Trainer's: epochs, devices, precision, early stopping
    (`val/loss` and `val/score` are logged), checkpoints and loggers. A checkpoint holds what is
    trained and nothing else.

    Args:
        model: the base model; its head is fitted to the task: to its number of classes, say.
        task: one of the datamodule's tasks; may be left out if that has only one.
        method: what is trained: every weight (`full`), a LoRA (2106.09685), a LoRA linearized
            around its start (`linearized_lora`: L-LoRA, 2310.04742), or (IA)³ vectors (2205.05638).
            The head is trained too, always.
        base: where the base's weights are, if not in `model`.
        private: patterns (`classifier.*`) of the head's tensors.
        frozen: patterns of the tensors that full fine-tuning leaves as they are.
        target_modules: names, or ends of names, of the modules to adapt; by default PEFT's own
            for an architecture that it knows; a LoRA's of a language model that it doesn't: all
            linear layers but the head.
        feedforward_modules: those of them whose inputs (IA)³ scales, rather than their outputs.
        rank: the LoRA's rank.
        alpha: its scaling is alpha over the rank.
        dropout: on the adapter's input.
        seed: draws the adapter's start, and the head's; adapters that are to be fused need one
            and the same.
        learning_rate: at its highest.
        weight_decay: AdamW's.
        warmup: share of the steps over which the rate rises.
        metric: what scores the validation rows, if not what the task's kind says: see
            `fusionkit.tasks.metrics.MetricChoice`.

    Raises:
        FusionKitError: the base does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        task: str | None = None,
        method: Method = "lora",
        base: str | Checkpoint | None = None,
        private: list[str] | None = None,
        frozen: list[str] | None = None,
        target_modules: list[str] | None = None,
        feedforward_modules: list[str] | None = None,
        rank: int = 16,
        alpha: int = 32,
        dropout: float = 0.1,
        seed: int = 0,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.06,
        metric: MetricChoice = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.method = method
        self.private = list(private or [])
        self.frozen = list(frozen or [])
        self.target_modules = target_modules
        self.feedforward_modules = feedforward_modules
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.seed = seed
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.metric_choice = metric
        self.metric: Metric | None = None
        self._kind: Task | None = None
        self.strict_loading = False  # checkpoints hold what is trained only
        self._adapter: Adapter | None = None
        self._start: dict[str, Tensor] = {}
        if base is not None:
            load_base(model, Checkpoint.of(base), self.private)

    def configure_model(self) -> None:
        """The Trainer's call of `prepare`."""
        self.prepare(getattr(self.trainer, "datamodule", None))

    def prepare(self, datamodule: Any) -> None:
        """The first time, fit the head and put the adapters in.

        Raises:
            DataError: the datamodule is not of one task alone, that which is trained.
            FusionKitError: what is to be adapted or frozen, or the head, is not in the model.
        """
        own = self.data_of(datamodule)
        assert self.task is not None
        if own is not datamodule:
            raise DataError(
                f"the datamodule has {len(datamodule.tasks)} tasks, and one is trained: give "
                f"`fusionkit.only(datamodule, ['{self.task}'])` to the Trainer"
            )
        if self._kind is not None:
            return
        self._check_names()
        kind = kinds_of(datamodule, [self.task])[self.task]
        if kind.head_size is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                self._fit_head(kind.head_size)
        if self.method == "full":
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(not matches(name, self.frozen))
        else:
            self._adapt(self.method)
        self.train()
        self.metric = metric_of(self.metric_choice, self.task, kind)
        self._kind = kind

    def data_of(self, datamodule: Any) -> Any:
        """The trained task's data alone; where there is one task only, it is the one.

        Raises:
            DataError: there is no such task, or it was not said which.
        """
        tasks = list(getattr(datamodule, "tasks", []))
        if self.task is None and len(tasks) == 1:
            self.task = tasks[0]
        if self.task is None and tasks:
            raise DataError(f"which task? give `task`, one of {', '.join(tasks)}")
        if len(tasks) > 1:  # else those that the metrics are of may be another datamodule's
            check_choice(self.metric_choice, tasks)
        return only(datamodule, [self.task or ""])

    def train(self, mode: bool = True) -> "Finetune":
        """Set the mode; but running statistics that are not trained stay as they are."""
        super().train(mode)
        for name, module in self.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.train(mode and self._keeps(f"{name}.running_mean"))
        return self

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The task's loss of one batch of its only dataloader."""
        kind = self._trained_kind
        loss = kind.loss(kind.predict(self.model, batch[0]), batch[0])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> STEP_OUTPUT:
        """Loss and score of one batch."""
        kind = self._trained_kind
        outputs = kind.predict(self.model, batch)
        loss = kind.loss(outputs, batch)
        self.log("val/loss", loss, batch_size=kind.count(batch), prog_bar=True, sync_dist=True)
        assert self.metric is not None
        update(self.metric, str(self.task), kind, kind.answers(self.model, batch, outputs), batch)
        self.log("val/score", self.metric, prog_bar=True)
        return None

    def configure_optimizers(self) -> Any:
        """AdamW on what is trained; the rate rises, then falls to 0, linearly."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=self.learning_rate, weight_decay=self.weight_decay
        )
        if self.trainer.estimated_stepping_batches == math.inf:
            raise FusionKitError("for how long? give the Trainer max_epochs or max_steps")
        steps = int(self.trainer.estimated_stepping_batches)
        rise = max(round(self.warmup * steps), 1)

        def rate(step: int) -> float:
            return min((step + 1) / rise, max(steps - step, 0) / max(steps - rise, 1))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what the base has anyway."""
        kept = {n for n, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}
        kept |= {n for n, _ in self.named_buffers() if self._keeps(n.removeprefix("model."))}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {n: t for n, t in state.items() if n in kept}
        checkpoint["finetune"] = self._identity()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See that it is this fine-tuning's: its weights mean nothing to another.

        Raises:
            FusionKitError: it is of another task, method or start.
        """
        saved = checkpoint.get("finetune", {})
        for key, value in self._identity().items():
            if saved.get(key) != value:
                raise FusionKitError(
                    f"the checkpoint is of another fine-tuning, of {key} {saved.get(key)}, where "
                    f"this one has {value}; give the settings that it began with"
                )

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write the fine-tuned model as other tools read it; it appears whole or not at all.

        Args:
            folder: a PEFT adapter's folder; or the file's, `model.safetensors`, of a full
                fine-tune (without frozen tensors). `from_pretrained` loads the folder of one of
                transformers' models of which nothing is frozen.
            overwrite: replace one that is there.

        Returns:
            the path to give as a fine-tuned checkpoint.

        Raises:
            BundleError: it exists, or can't be written.
        """
        folder = open_path(folder)
        known_by = next((file for file in KINDS if (folder / file).is_file()), WEIGHTS)
        with new_folder(folder, overwrite, known_by=known_by) as new:
            if self._adapter is None:
                self._write_whole(new)
            else:
                self._adapter.write(self.model, self._start, new)
        return folder / WEIGHTS if self._adapter is None else folder

    @property
    def _trained_kind(self) -> Task:
        assert self._kind is not None
        return self._kind

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree in, to be gone on from."""
        start = {name: tensor.cpu() for name, tensor in self._start.items()}
        return {"task": self.task, "method": self.method, "start": digest(start)}

    def _keeps(self, buffer: str) -> bool:
        """Whether a buffer of the model is the fine-tuned model's own."""
        if self.method == "full":
            return not matches(buffer, self.frozen)
        return ".modules_to_save." in buffer or START_BUFFER in buffer

    def _check_names(self) -> None:
        """Refuse patterns and modules that the model does not have."""
        kind, names = type(self.model).__name__, list(self.model.state_dict())
        for pattern in (*self.private, *self.frozen):
            if not any(matches(name, [pattern]) for name in names):
                raise FusionKitError(
                    f"'{pattern}' matches no tensor of {kind}; the names end like '{names[-1]}'"
                )
        modules = [f".{name}" for name, _ in self.model.named_modules()]
        for target in [] if self.method == "full" else self.target_modules or []:
            if not any(name.endswith(f".{target}") for name in modules):
                linear = {
                    name.rpartition(".")[2]
                    for name, module in self.model.named_modules()
                    if isinstance(module, nn.Linear)
                }
                raise FusionKitError(
                    f"{kind} has no module '{target}' to adapt; its linear ones are called "
                    f"{', '.join(sorted(linear))}"
                )

    def _fit_head(self, size: int) -> None:
        heads = [
            (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and matches(f"{name}.weight", self.private)
        ]
        # A head of several layers ends in the one that has the outputs.
        for name, head in heads[-1:]:
            if head.out_features != size:
                fresh = nn.Linear(head.in_features, size, head.bias is not None)
                self.model.set_submodule(name, fresh)
                config: Any = getattr(self.model, "config", None)
                if hasattr(config, "num_labels"):
                    config.num_labels = size  # as the folder that is saved says, too

    def _adapt(self, kind: Literal["lora", "linearized_lora", "ia3"]) -> None:
        heads = [
            name
            for name, module in self.model.named_modules()
            if name and any(matches(f"{name}.{own}", self.private) for own in module._parameters)
        ]
        self._adapter = Adapter(
            kind,
            self.target_modules,
            self.feedforward_modules,
            self.rank,
            self.alpha,
            self.dropout,
            self.seed,
        )
        self.model, self._start = self._adapter.put_into(self.model, heads)

    def _write_whole(self, folder: Path) -> None:
        """Write a full fine-tune: as transformers does it, where it is a whole model of its."""
        transformers = sys.modules.get("transformers")
        if (
            transformers
            and isinstance(self.model, transformers.PreTrainedModel)
            and not self.frozen
        ):
            # One file, whatever its size: it is the fine-tuned checkpoint.
            self.model.save_pretrained(folder, max_shard_size=sys.maxsize)
            return
        tied = Checkpoint.of(self.model).aliases
        state = {
            name: tensor.cpu().contiguous()
            for name, tensor in self.model.state_dict().items()
            if name not in tied and not matches(name, self.frozen)
        }
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
