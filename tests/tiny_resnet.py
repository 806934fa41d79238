"""A tiny ResNet of timm, for tests and the recipes that they write."""

import torch
from torch import nn


def resnet() -> nn.Module:
    import timm

    torch.manual_seed(0)
    made: nn.Module = timm.create_model(
        "resnet10t", num_classes=2, in_chans=1, channels=(8, 16, 16, 16), stem_width=8
    )
    return made.eval()
