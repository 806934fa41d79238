"""The arguments of one call, always the same."""

import torch
from torch import Tensor

IMAGE_TOKEN = 60


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def tokens() -> dict[str, Tensor]:
    """Two rows of eight tokens."""
    return {"input_ids": torch.arange(4, 20).view(2, 8)}


def pairs() -> dict[str, Tensor]:
    """Tokens for an encoder, and for its decoder."""
    return {**tokens(), "decoder_input_ids": torch.arange(24, 34).view(2, 5)}


def pixels(size: int = 16) -> dict[str, Tensor]:
    """Two square images."""
    return {"pixel_values": _random(2, 3, size, size)}


def images(channels: int = 3) -> dict[str, Tensor]:
    """Two images, as timm's models take them."""
    return {"x": _random(2, channels, 32, 32)}


def captioned() -> dict[str, Tensor]:
    """Two images and two texts."""
    return {**tokens(), **pixels()}


def prompted(shape: tuple[int, ...], grid: tuple[int, int, int] | None = None) -> dict[str, Tensor]:
    """Two texts that begin with the four tokens that stand for an image.

    Args:
        shape: of both images together, as the family cuts them into patches.
        grid: each image's number of patches in time, height and width, where the model asks.
    """
    ids = tokens()["input_ids"]
    ids[:, :4] = IMAGE_TOKEN
    made = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": _random(*shape),
    }
    if grid is not None:
        made["image_grid_thw"] = torch.tensor([grid, grid])
        made["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
    return made


def waves() -> dict[str, Tensor]:
    """Two sounds."""
    return {"input_values": _random(2, 400)}


def spectrogram() -> dict[str, Tensor]:
    """Two sounds by frequency, and the texts so far."""
    ids = torch.arange(24, 34).view(2, 5)
    return {"input_features": _random(2, 8, 40), "decoder_input_ids": ids}


def latents(name: str = "", pooled: bool = False) -> dict[str, Tensor]:
    """Two noised images and their texts, at one step.

    Args:
        name: what the model calls the image.
        pooled: it takes each text as one vector, too.
    """
    name = name or ("hidden_states" if pooled else "sample")
    text = {"encoder_hidden_states": _random(2, 3, 16), "timestep": torch.tensor([3, 7])}
    own = {"pooled_projections": _random(2, 16)} if pooled else {}
    return {name: _random(2, 4, 8, 8), **text, **own}
