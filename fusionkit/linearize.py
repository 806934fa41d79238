"""Partial linearization (L-LoRA, Tang et al., 2310.04742)."""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from fusionkit.errors import FusionKitError


class LinearizedLinear(Linear):
    initial_A: Tensor

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        name = self.active_adapters[0]
        b = self.lora_B[name].weight
        x = self.lora_dropout[name](x.to(b.dtype))
        low = nn.functional.linear(nn.functional.linear(x, self.initial_A), b)
        return result + low * self.scaling[name]


def linearize(model: nn.Module) -> list[str]:
    names = []
    for name, layer in model.named_modules():
        if type(layer) is Linear:
            a = layer.lora_A["default"].weight
            layer.register_buffer("initial_A", a.detach().clone())
            a.requires_grad_(False)
            layer.__class__ = LinearizedLinear
            names.append(name)
    if not names:
        raise FusionKitError("no LoRA layers")
    return names
