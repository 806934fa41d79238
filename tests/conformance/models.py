"""Tiny models of a row: built, fine-tuned, saved, loaded and called."""

import copy
from pathlib import Path
from typing import Any

import peft
import torch
from conformance.row import ModelFamily
from torch import Tensor, nn

_SHARD = "20KB"
_OUTPUTS = ("logits", "logits_per_image", "sample", "last_hidden_state")


def build(row: ModelFamily) -> nn.Module:
    """The base: float32, in evaluation; no bias is zero, no norm's weight one."""
    torch.manual_seed(0)
    if row.library == "timm":
        import timm

        made: nn.Module = timm.create_model(row.built, **row.config)
    elif row.library == "diffusers":
        made = _class(row)(**row.config)
    else:
        kind = _class(row)
        made = kind(kind.config_class(**row.config))
    with torch.no_grad():
        for parameter in _trained(made):
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return made.eval()


@torch.no_grad()
def finetuned(row: ModelFamily, base: nn.Module) -> nn.Module:
    """A copy of the base of which all that is trained has moved, and BatchNorm's statistics.

    Matrices move by rank 2, so that SVD is exact. A tensor of more than two axes is the matrix
    (first axis) × (all others), but for a stack of experts, of which each is one.
    """
    torch.manual_seed(1)
    tuned = copy.deepcopy(base)
    for parameter in _trained(tuned):
        stacked = parameter.ndim == 3 and row.kind == "mixture of experts"
        parameter.add_(0.05 * _change(parameter.shape, 1 if stacked else 0))
    for name, buffer in tuned.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.add_(0.1 * torch.rand(buffer.shape))
        elif name.endswith("num_batches_tracked"):
            buffer.add_(3)
    return tuned


def adapted(row: ModelFamily, base: nn.Module) -> Any:
    """PEFT's model over a copy of the base: a LoRA of rank 2 that does something."""
    torch.manual_seed(2)
    config = peft.LoraConfig(r=2, target_modules=list(row.lora), init_lora_weights=False)
    return peft.get_peft_model(copy.deepcopy(base), config).eval()


def save(row: ModelFamily, model: Any, folder: Path, sharded: bool = False) -> Path:
    """Save a model as its library does, in one file or several."""
    if row.library == "timm":
        _save_timm(row, model, folder, sharded)
    else:
        model.save_pretrained(folder, **({"max_shard_size": _SHARD} if sharded else {}))
    return folder


def load(row: ModelFamily, folder: Path) -> nn.Module:
    """Load a folder as its library does."""
    if row.library == "timm":
        import timm

        made: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    else:
        made = _class(row).from_pretrained(folder)
    return made.eval()


@torch.no_grad()
def outputs(row: ModelFamily, model: Any) -> Tensor:
    """Logits, or the last hidden state where there are none."""
    found = model(**row.inputs())
    if isinstance(found, Tensor):
        return found
    return next(found[name] for name in _OUTPUTS if name in found)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    """All but what the class keeps as it is: sinusoidal positions."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _change(shape: torch.Size, stacked: int) -> Tensor:
    if len(shape) < 2:
        return torch.randn(shape)
    rows = shape[: stacked + 1]
    columns = shape[stacked + 1 :].numel()
    return (torch.randn(*rows, 2) @ torch.randn(*rows[:stacked], 2, columns)).view(shape)


def _class(row: ModelFamily) -> Any:
    if row.library == "diffusers":
        import diffusers

        return getattr(diffusers, row.built)
    import transformers

    return getattr(transformers, row.built)


def _save_timm(row: ModelFamily, model: nn.Module, folder: Path, sharded: bool) -> None:
    import timm
    from huggingface_hub import save_torch_state_dict

    timm.models.save_for_hf(model, folder, model_args=dict(row.config), safe_serialization=True)
    if sharded:
        (folder / "model.safetensors").unlink()
        save_torch_state_dict(model.state_dict(), folder, max_shard_size=_SHARD)
