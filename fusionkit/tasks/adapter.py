"""An adapter put into a model by PEFT, and written as PEFT reads it."""

import dataclasses
import json
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fusionkit.checkpoints.adapters.adapter import CONFIG, LINEARIZED
from fusionkit.checkpoints.adapters.folder import RECORD, TENSORS, AdapterFolder
from fusionkit.checkpoints.adapters.start import Seeded, digest
from fusionkit.checkpoints.checkpoint import Checkpoint
from fusionkit.errors import FusionKitError
from fusionkit.tasks.linearize import linearize

START_BUFFER = ".initial_lora_"
"""What names of a linearized LoRA's start have in them."""
_START_TENSORS = "initial.safetensors"
_ALL = "all-linear"
"""PEFT's name for every linear layer but the one that the outputs come from."""


@dataclass(frozen=True)
class Adapter:
    """What is put into a model.

    Args:
        kind: a LoRA, a LoRA linearized around its start, or (IA)³ vectors.
        target_modules: names, or ends of names, of the modules to adapt. None: PEFT's own for the
            architecture; a LoRA of a language model that PEFT does not know: all linear layers.
        feedforward_modules: those of them whose inputs (IA)³ scales.
        rank: a LoRA's.
        alpha: its scaling is alpha over the rank.
        dropout: on its input.
        seed: draws its start.
    """

    kind: Literal["lora", "linearized_lora", "ia3"]
    target_modules: list[str] | None
    feedforward_modules: list[str] | None
    rank: int
    alpha: int
    dropout: float
    seed: int

    def put_into(self, model: nn.Module, heads: list[str]) -> tuple[nn.Module, dict[str, Tensor]]:
        """Put it into a model.

        Args:
            model: the base; its modules are replaced.
            heads: names of the modules that are trained whole.

        Returns:
            PEFT's model around it, and the tensors that a LoRA started from, by the names that
            they have in a file.

        Raises:
            FusionKitError: PEFT can't adapt the model.
        """
        from peft import get_peft_model
        from peft.utils import ModulesToSaveWrapper

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            try:
                adapted = get_peft_model(cast(Any, model), self._config(model, heads))
            except ValueError as error:
                raise FusionKitError(f"PEFT can't adapt {type(model).__name__}: {error}") from error
        for name, module in list(adapted.named_modules()):
            # PEFT goes by the ends of names: a head `classifier` is `pre_classifier`, too.
            if isinstance(module, ModulesToSaveWrapper) and _plain(name) not in heads:
                adapted.set_submodule(name, module.original_module)
        start = {
            _plain(name): parameter.detach().clone()
            for name, parameter in adapted.named_parameters()
            if ".lora_" in name
        }
        if self.kind == "linearized_lora":
            linearize(adapted)
        return adapted, start

    def write(self, adapted: nn.Module, start: Mapping[str, Tensor], folder: Path) -> None:
        """Write PEFT's files, and where a LoRA started.

        Args:
            adapted: PEFT's model.
            start: what the adapter started from.
            folder: is there.
        """
        from peft import get_peft_model_state_dict

        model = cast(Any, adapted)
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        state = {
            name: tensor.cpu().contiguous()
            for name, tensor in state.items()
            if START_BUFFER not in name  # the start, which is on record by itself
        }
        save_file(state, folder / TENSORS[0], metadata={"format": "pt"})
        settings = copy(model.peft_config["default"])
        settings.inference_mode = True
        settings.save_pretrained(str(folder))
        if self.kind == "linearized_lora":
            config = json.loads((folder / CONFIG).read_text())
            (folder / CONFIG).write_text(json.dumps({**config, "peft_type": LINEARIZED}, indent=1))
        if self.kind != "ia3":
            self._record_start(adapted, start, folder)

    def _config(self, model: nn.Module, heads: list[str]) -> Any:
        from peft import IA3Config, LoraConfig

        common: dict[str, Any] = {
            "task_type": _task_type(model),
            "modules_to_save": heads or None,
        }
        if self.kind == "ia3":
            return IA3Config(
                target_modules=self.target_modules,
                feedforward_modules=self.feedforward_modules,
                **common,
            )
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules or _unknown_targets(model),
            **common,
        )

    def _record_start(self, adapted: nn.Module, begun: Mapping[str, Tensor], folder: Path) -> None:
        """Write where the adapter started: the seed if it replays exactly, else the tensors."""
        order = list(dict.fromkeys(name.rpartition(".lora_")[0] for name in begun))
        start = {name: tensor.cpu() for name, tensor in begun.items()}
        seeded = Seeded(self.seed, init=True, order=order, sha256=digest(start))
        layout = AdapterFolder(folder).layout(Checkpoint.of(_below(adapted)))
        shapes = {name: tuple(tensor.shape) for name, tensor in start.items()}
        record: Mapping[str, Any] = dataclasses.asdict(seeded)
        if seeded.replay(layout, shapes) is None:
            save_file(start, folder / _START_TENSORS)
            record = {"file": _START_TENSORS}
        (folder / RECORD).write_text(json.dumps({"start": record}, indent=1))


def generates(model: nn.Module) -> bool:
    """Whether it is one of transformers' language models that write."""
    found = getattr(model, "can_generate", None)
    return hasattr(model, "config") and callable(found) and bool(found())


def _task_type(model: nn.Module) -> str | None:
    """What PEFT calls a language model's task; None of any other."""
    if not generates(model):
        return None
    decodes = getattr(model.config, "is_encoder_decoder", False)
    return "SEQ_2_SEQ_LM" if decodes else "CAUSAL_LM"


def _unknown_targets(model: nn.Module) -> str | None:
    """What a LoRA adapts of a language model that PEFT has no modules of; else None."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    kind = getattr(getattr(model, "config", None), "model_type", None)
    return _ALL if generates(model) and kind not in KNOWN else None


def _plain(name: str) -> str:
    """A parameter's name in PEFT's model → in an adapter's file, as the base would name it."""
    return name.removeprefix("base_model.model.").replace(".default", "")


def _below(model: nn.Module) -> dict[str, Tensor]:
    """The base's weights inside a PEFT model, by the base's own names."""
    state = model.state_dict()
    return {
        _plain(name).replace(".base_layer.", "."): tensor
        for name, tensor in state.items()
        if ".lora_" not in name and ".modules_to_save." not in name
    }
