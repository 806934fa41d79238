"""Tiny dual encoders with tokenizer and processor, random but for their seed, as folders."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

COLOURS = {"blue": (0, 0, 255), "red": (255, 0, 0), "grey": (128, 128, 128)}
TEMPLATES = ["a photo of {}.", "{}!"]
SIZE = 16
TEXT = 40


def tokenizer(folder: Path) -> Any:
    """CLIP's own class: byte by byte, as it merges nothing."""
    transformers = pytest.importorskip("transformers", reason="pip install .[test]")
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    names = [*letters, *(f"{letter}</w>" for letter in letters)]
    names += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: place for place, name in enumerate(names)}
    found = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TEXT)
    found.save_pretrained(folder)
    return found


def clip(folder: Path) -> Path:
    """A CLIPModel, with its tokenizer and image processor."""
    tokens = tokenizer(folder)
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {
        **shape,
        "vocab_size": len(tokens),
        "max_position_embeddings": TEXT,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    }
    image = {**shape, "image_size": SIZE, "patch_size": 8}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=text, vision_config=image, projection_dim=12, initializer_factor=8.0
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SIZE).save_pretrained(folder)
    return folder


def open_clip_model(folder: Path) -> tuple[Path, Any]:
    """A folder that open_clip saved, and the model."""
    import open_clip
    from open_clip.push_to_hf_hub import save_for_hf

    shape = {"width": 16, "layers": 1}
    config = {
        "embed_dim": 12,
        "vision_cfg": {**shape, "image_size": SIZE, "patch_size": 8, "head_width": 8},
        "text_cfg": {**shape, "context_length": 24, "vocab_size": 49408, "heads": 2},
    }
    torch.manual_seed(0)
    made = open_clip.CLIP(**config).eval()
    open_clip.factory.set_model_preprocess_cfg(
        made, {"size": SIZE, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    )

    class Tokenizer:
        def save_pretrained(self, folder: Any) -> None: ...

    save_for_hf(made, Tokenizer(), config, str(folder), safe_serialization=True)
    return folder, made


def tower(base: Path, folder: Path, seed: int) -> Path:
    """The image tower of a dual encoder, changed, as the class of an image tower saves it."""
    from transformers import CLIPModel, CLIPVisionModel

    model = CLIPVisionModel.from_pretrained(base)
    whole = CLIPModel.from_pretrained(base).vision_model.state_dict()
    assert all(torch.equal(whole[name], value) for name, value in model.state_dict().items())
    changed(model, seed).save_pretrained(folder)
    return folder


def changed(model: nn.Module, seed: int) -> Any:
    """A model with a little more on all of its parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=generator))
    return model


def classes(path: Path, **more: Any) -> Path:
    """A file of class names and templates."""
    content = {"labels": sorted(COLOURS), "templates": TEMPLATES, **more}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def images(folder: Path, rows: int = 4, seed: int = 0) -> Path:
    """Noisy images of each colour, in folders of classes for training and testing."""
    generator = np.random.default_rng(seed)
    for split in ("train", "test"):
        for name, colour in COLOURS.items():
            for row in range(rows):
                path = folder / split / name / f"{row}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                noise = generator.integers(-60, 60, (20, 24, 3))
                values = np.clip(np.array(colour) + noise, 0, 255).astype("uint8")
                Image.fromarray(values).save(path)
    return folder
