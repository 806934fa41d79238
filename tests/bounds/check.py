"""Takes a family the whole way, and holds what comes back to the codec's bound."""

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bounds import formulas_of_plugins  # noqa: F401
from bounds.draw import Drawn
from bounds.formulas import check_error
from bounds.seen import Seen
from fusionkit import Bundle, Family, compress
from fusionkit.codecs.base import DeltaCodec
from fusionkit.errors import BundleError, FusionKitError
from fusionkit.reuse.switcher import Switcher

HALF = 6e4
"""From here on a value, or a difference of two, may not fit into fp16."""


def hold(drawn: Drawn, codec: DeltaCodec, folder: Path) -> None:
    """Compress, open, decode, switch: right to within the bound, or refused by name.

    Raises:
        AssertionError: it is neither.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compress(drawn.base, drawn.finetuned, codec, folder / "bundle")
        except FusionKitError as error:
            _check_refusal(str(error), drawn)
            return
        assert drawn.bad is None, f"{drawn.bad} is not finite, and was taken"
        bundle = Bundle(folder / "bundle", drawn.base)
        seen = Seen(codec, Family(drawn.base, drawn.finetuned), bundle)
        for name, found in seen.found.items():
            assert np.isfinite(found).all(), f"{name} decodes to what is not finite"
        check_error(codec, seen)
        _check_models(drawn, bundle, codec)


def _check_refusal(message: str, drawn: Drawn) -> None:
    """It names a tensor and a task, and there is something to refuse."""
    if drawn.bad and all(f"'{each}" in message for each in drawn.bad):
        return
    if "budget" not in message:
        assert drawn.largest >= HALF, f"refused for nothing: {message}"
        of_whole = message.startswith("task ")
        assert of_whole or any(f"'{name}" in message for name in drawn.base), message
    assert any(f"'{task}'" in message for task in drawn.finetuned), message


def _check_models(drawn: Drawn, bundle: Bundle, codec: DeltaCodec) -> None:
    """Whole models and a live one are base plus delta, rounded; or it is said what is too large."""
    model = live(drawn)
    switcher = Switcher(model)
    for task in bundle.tasks[:: max(len(bundle.tasks) // 3, 1)]:
        try:
            state = bundle.state_dict(task)
        except BundleError as error:
            _check_overflow(str(error), task, drawn)
            state = None
        try:
            switcher.become(task, bundle)
        except BundleError as error:
            _check_overflow(str(error), task, drawn)
            assert state is None or codec.restores, "refused live, and not as a state dict"
            now = model.state_dict()
            assert all(torch.equal(now[name], tensor) for name, tensor in drawn.base.items())
            continue
        assert state is not None, "refused as a state dict, and not live"
        now = model.state_dict()
        for name, tensor in state.items():
            assert tensor.isfinite().all(), f"{name} of {task} is not finite"
            assert torch.equal(now[name], tensor.to(now[name].dtype)), f"{name} of {task}, live"


def _check_overflow(message: str, task: str, drawn: Drawn) -> None:
    assert "would be infinite in" in message, message
    assert f"'{task}'" in message, message
    assert any(f"'{name}" in message for name in drawn.base), message


def live(drawn: Drawn) -> nn.Module:
    """A module of the base's tensors."""
    model = nn.Module()
    for name, tensor in drawn.base.items():
        *path, last = name.split(".")
        module = model
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, nn.Parameter(tensor.clone(), requires_grad=False))
    return model
