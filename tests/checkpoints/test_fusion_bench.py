"""FusionBench's linearized LoRAs, against what its wrapper computes."""

from pathlib import Path
from typing import Any

import hub_images
import pytest
import tiny_clip
import torch
from hub_cache import cached
from peft.tuners.lora import Linear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call, jvp

from fusionkit import ReuseModule
from fusionkit.checkpoints.adapters.folder import AdapterFolder
from fusionkit.errors import CheckpointError
from fusionkit.tasks.dual_encoders import ImageClassifier
from fusionkit.tasks.zero_shot import ZeroShotModels

FILE = "linearized_adapter_model.safetensors"


class Linearized(nn.Module):
    """A layer's first-order expansion around other parameters."""

    def __init__(self, layer: nn.Module, start: dict[str, Tensor]) -> None:
        super().__init__()
        self.layer, self.start = layer, start

    def forward(self, *inputs: Any) -> Tensor:
        now = dict(self.layer.named_parameters())
        moved = {name: value - self.start[name] for name, value in now.items()}
        said, change = jvp(
            lambda params: functional_call(self.layer, params, inputs), (self.start,), (moved,)
        )
        return said + change  # type: ignore[no-any-return]


def test_as_its_wrapper_has_it(hub_cache: Path) -> None:
    """Both factors moved from a start of which neither is 0."""
    base = tiny_clip.clip(cached(hub_cache, "openai/clip"))
    model, start = hub_images.lora(hub_cache, base, "t", 1, linearized=True)
    folder = cached(hub_cache, "tanganke/t")
    generator = torch.Generator().manual_seed(2)
    for name, value in start.items():
        if "lora_" in name:
            start[name] = value + 0.1 * torch.randn(value.shape, generator=generator)
    save_file(hub_images.linearized_file(model, start), folder / FILE)
    layers = {name: each for name, each in model.named_modules() if isinstance(each, Linear)}
    assert len(layers) == 2
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        at_start = {key: start[f"{name}.{key}"] for key, _ in layer.named_parameters()}
        setattr(model.get_submodule(parent), own, Linearized(layer, at_start))
    pixels = torch.randn(2, 3, tiny_clip.SIZE, tiny_clip.SIZE)
    found = ZeroShotModels({"t": str(folder)}, str(base), {"t": ["a", "b"]})
    own = ReuseModule(ImageClassifier(str(base)), finetuned=found, private=["head.*"])
    own.switch("t")
    with torch.no_grad():
        torch.testing.assert_close(
            own.model.vision_model(pixels).pooler_output, model(pixels).pooler_output
        )


def test_what_is_not_whole(hub_cache: Path) -> None:
    base = tiny_clip.clip(cached(hub_cache, "openai/clip"))
    hub_images.lora(hub_cache, base, "t", 1, linearized=True)
    path = cached(hub_cache, "tanganke/t") / FILE
    state = load_file(path)
    key = min(name for name in state if "params0" in name)
    save_file({name: value for name, value in state.items() if name != key}, path)
    with pytest.raises(CheckpointError, match=r"has 2 factors, and 1 that they started at; fetch"):
        AdapterFolder(path.parent)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="has 'x', which is no factor of a linearized LoRA"):
        AdapterFolder(path.parent)
