"""A task's model as transformers has it, without Lightning: loaded once, and switched in place."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.export_model import DTYPES
from fusionkit.checkpoints.architecture import is_transformers, unsaved
from fusionkit.checkpoints.checkpoint import Checkpoint, Source
from fusionkit.checkpoints.from_config import model_of
from fusionkit.checkpoints.in_memory import owner_of
from fusionkit.errors import BundleError, listing
from fusionkit.reuse.beside import config_for, opened, tell
from fusionkit.reuse.in_place import become

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    bundle: str | Path | Bundle,
    task: str | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    base: Source | Checkpoint | None = None,
    attn_implementation: str | None = None,
) -> "PreTrainedModel":
    """A task's model, as `from_pretrained` would load it from an exported folder.

    The class is built from the task's configuration, or the base's, without weights; those are
    written tensor by tensor, so that memory is the model and a few tensors. `fusionkit.switch`
    makes it another task's.

    Args:
        bundle: a bundle, its folder, or its name on the Hugging Face Hub.
        task: one of its tasks; None loads the base.
        device: where to; by default the CPU.
        dtype: of floating-point weights, `torch.bfloat16` or `bf16`; by default what most of the
            base's weights have. What the class keeps in float32, stays so.
        base: the base model, where it is not where the bundle says.
        attn_implementation: as of transformers' `from_pretrained`.

    Returns:
        the model, in evaluation mode; of timm or diffusers, if the base is of these.

    Raises:
        BundleError: the bundle has no such task, its base can't be found, its class is not known,
            or has weights that neither the base nor the task has; or a value is too large for the
            dtype.
        CheckpointError: the class can't be built here.
        WrongBaseError: the base at hand is another model.
    """
    source = opened(bundle, base)
    if task is not None:
        source.check([task])
    model: Any = unfilled(source, task, device, dtype, attn_implementation)
    lacking = [name for name in become(model, source, task) if not _is_buffer(model, name)]
    if lacking:
        raise BundleError(
            f"{source.path}: {type(model).__name__} has weights that neither its base nor task "
            f"'{task}' has:{listing([repr(each) for each in lacking])}\nname the right class under "
            "`architectures` in the base's config.json"
        )
    tell(model, source, task)
    return model.eval()


def unfilled(
    bundle: Bundle,
    task: str | None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
) -> nn.Module:
    """A model of a task's class, or the base's, whose weights are any; arguments as of `load`.

    Raises:
        BundleError: the class is not known.
        CheckpointError: it can't be built here.
    """
    config = config_for(bundle, task)
    wanted = _dtype(dtype, bundle)
    settings: dict[str, Any] = {}
    if config.get("model_type"):
        settings["dtype"] = wanted
        if attn_implementation is not None:
            settings["attn_implementation"] = attn_implementation
    with _without_weights(wanted):
        model = model_of(config, f"{bundle.path}: {task or 'base'}", **settings)
    _give_memory(model, torch.device(device or "cpu"), wanted)
    return model


def switch(
    model: nn.Module,
    bundle: str | Path | Bundle,
    task: str | None,
    *,
    base: Source | Checkpoint | None = None,
) -> None:
    """Make a model another task's, in place; None makes it the base.

    Weights are rebuilt from the base, read from where it is: after any number of switches, and
    whatever was done to them between, they are the same bits. They are written into the memory
    that they have, so that `torch.compile`d code and CUDA graphs stay valid; but for a task whose
    head or vocabulary has another size. With the base in memory a switch is faster:
    `Bundle(path, Checkpoint.of(base).in_memory("cuda"))`.

    Args:
        model: from `load`, or any model of the base's class; compiled, too.
        bundle: as of `load`; opened once, its base is read and checked once.
        task: one of its tasks, or None.
        base: as of `load`.

    Raises:
        BundleError: the bundle has no such task, or a tensor of it has no place in the model, or is
            too large for the model's dtype; the model is then the base.
        WrongBaseError: the base at hand is another model.
        FusionKitError: another thread is switching the model. That one calls it meanwhile is not
            noticed, and gives a mixture: hold a lock around a switch and what needs the task.
    """
    source = opened(bundle, base)
    become(model, source, task)
    tell(model, source, task)


def _dtype(dtype: torch.dtype | str | None, bundle: Bundle) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype in (None, "auto"):
        sizes: dict[torch.dtype, int] = {}
        for name, spec in bundle.whole_base.specs.items():
            if spec.dtype.is_floating_point and name not in bundle.whole_base.aliases:
                sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
        return max(sizes, key=lambda each: sizes[each]) if sizes else torch.float32
    found = DTYPES.get(str(dtype)) or getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise BundleError(
            f"unknown dtype '{dtype}'; expected {', '.join(DTYPES)}, or a torch.dtype"
        )
    return found


@contextmanager
def _without_weights(dtype: torch.dtype) -> Iterator[None]:
    """A context in which modules are built with parameters on the meta device, buffers in memory.

    Buffers that no checkpoint holds (rotary frequencies) have their values from the class itself.
    """
    from accelerate import init_empty_weights

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights(include_buffers=False):
            yield
    finally:
        torch.set_default_dtype(before)


def _give_memory(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give parameters on the meta device memory of their own, or that of those they are tied to."""
    if is_transformers(model):
        model.tie_weights()  # type: ignore[operator]
    made: dict[int, nn.Parameter] = {}
    kept = _kept_in_float32(model, dtype)
    anew: list[nn.Module] = []
    own = unsaved(model)
    for path, module in model.named_modules():
        for leaf, old in module._parameters.items():
            if old is None or not old.is_meta:
                continue
            name = f"{path}.{leaf}" if path else leaf
            if id(old) not in made:
                target = torch.float32 if kept and kept.search(name) else old.dtype
                memory = torch.empty(old.shape, dtype=target, device=device)
                made[id(old)] = nn.Parameter(memory, requires_grad=old.requires_grad)
            module._parameters[leaf] = made[id(old)]
            if name in own:
                anew.append(module)
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[leaf] = buffer.to(device)
    for module in anew:  # what the class makes itself, and no file has
        model._init_weights(module)  # type: ignore[operator]


def _kept_in_float32(model: nn.Module, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Which parameters transformers keeps in float32, whatever dtype is asked for."""
    patterns: list[str] = []
    if dtype == torch.float16:
        patterns += getattr(model, "_keep_in_fp32_modules", None) or ()
    if dtype in (torch.float16, torch.bfloat16):
        patterns += getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return re.compile("|".join(each.replace("*", ".*") for each in patterns)) if patterns else None


def _is_buffer(model: nn.Module, name: str) -> bool:
    module, leaf = owner_of(model, name)
    return leaf in module._buffers
