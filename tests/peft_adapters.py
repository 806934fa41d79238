"""A model with a layer of every kind that PEFT adapts, and adapters of it."""

from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Net(nn.Module):
    """A layer of every kind that PEFT adapts, names that end alike, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.conv = nn.Conv2d(6, 8, (3, 1), padding=(1, 0))
        self.layer = nn.ModuleDict({str(place): nn.Linear(8, 8) for place in (1, 11)})
        self.turned = Conv1D(8, 8)
        self.wide = Conv1D(10, 8)
        self.fc = nn.Linear(10, 5, bias=False)
        self.block = nn.ModuleDict({"fc": nn.Linear(5, 7)})
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 `(B, L)` → logits `(B, 3)`."""
        x = self.conv(self.embed(tokens).mT[..., None]).mean((2, 3))
        x = self.layer["11"](self.layer["1"](x).relu()).relu()
        x = self.wide(self.turned(x).relu())
        return self.head(self.norm(self.block["fc"](self.fc(x).relu())))  # type: ignore[no-any-return]


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().eval().to(dtype)


def saved(folder: Path, config: Any, seed: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    """Save an adapter with random values; returns the PEFT model."""
    model: Any = peft.get_peft_model(net(dtype), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = 0.3 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + noise if "ia3_l" in name else noise)
    model.save_pretrained(folder)
    return model.eval()


LAYERS = ["embed", "conv", "1", "11", "fc"]
IA3 = {"target_modules": ["conv", "1", "11", "wide", "fc"], "feedforward_modules": ["11", "conv"]}
CONFIGS = {
    "all layers": peft.LoraConfig(r=3, lora_alpha=7, target_modules=LAYERS),
    "rslora": peft.LoraConfig(r=4, lora_alpha=3, target_modules=["1", "fc"], use_rslora=True),
    "patterns": peft.LoraConfig(
        r=2,
        target_modules=["1", "11", "fc"],
        rank_pattern={"layer.1": 4, "^fc": 1},
        alpha_pattern={"layer.11": 5, "block.fc": 3},
    ),
    "bias of all": peft.LoraConfig(r=2, target_modules=["1"], bias="all"),
    "a bias of its own": peft.LoraConfig(r=2, target_modules=["1", "11"], lora_bias=True),
    "whole modules": peft.LoraConfig(r=2, target_modules=["1"], modules_to_save=["head", "norm"]),
    "turned and square": peft.LoraConfig(
        r=2, target_modules=["turned", "wide"], fan_in_fan_out=True
    ),
    "gaussian": peft.LoraConfig(r=2, target_modules=["1"], init_lora_weights="gaussian"),
    "ia3": peft.IA3Config(**IA3),
    "ia3 and a head": peft.IA3Config(
        target_modules=["1", "11"], feedforward_modules=["1"], modules_to_save=["head"]
    ),
}
