"""What the papers' vision recipes name on the Hub, as tiny stand-ins in its cache.

Of each model the class, the configuration, the processor and the layout of files are those on the
Hub; of each data set the columns, the names of classes and the splits.
"""

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import tiny_clip
import torch
from hub_cache import cached
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_net import TESTS
from torch import Tensor

CLASSES = TESTS.parent / "recipes/papers/classes"
EIGHT = ("sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")
TWELVE = (
    *("oxford_flowers102", "pcam", "fer2013", "oxford-iiit-pet", "stl10", "cifar100", "cifar10"),
    *("food101", "fashion_mnist", "emnist_letters", "kmnist", "rendered-sst2"),
)
ROWS = 4
"""Of each split."""


def clip(cache: Path, name: str) -> Path:
    """A whole CLIP, in shards."""
    folder = tiny_clip.clip(cached(cache, f"openai/{name}"))
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def tower(cache: Path, clip_folder: Path, name: str, seed: int) -> None:
    """An image tower as an earlier transformers saved it, the positions' numbers among it."""
    folder = tiny_clip.tower(clip_folder, cached(cache, f"tanganke/{name}"), seed)
    state = load_file(folder / "model.safetensors")
    state = {f"vision_model.{key.removeprefix('vision_model.')}": t for key, t in state.items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def lora(cache: Path, clip_folder: Path, name: str, seed: int, linearized: bool = False) -> Any:
    """A LoRA of the transformer within a tower; linearized, in FusionBench's own file.

    Returns:
        the live model, and what its parameters started at.
    """
    from transformers import CLIPModel

    folder = cached(cache, f"tanganke/{name}")
    vision = CLIPModel.from_pretrained(clip_folder).vision_model
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1
    )
    torch.manual_seed(0)  # all start at one point
    model: Any = peft.get_peft_model(vision, settings)
    start = {key: value.detach().clone() for key, value in model.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.requires_grad and not (linearized and "lora_A" in key):  # has no gradient
                value.add_(0.2 * torch.randn(value.shape, generator=generator))
    model.save_pretrained(folder)
    if linearized:
        (folder / "adapter_model.safetensors").unlink()
        save_file(linearized_file(model, start), folder / "linearized_adapter_model.safetensors")
    return model.eval(), start


def linearized_file(model: Any, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What FusionBench writes of a linearized model: factors, and those at the start."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            for place, (key, value) in enumerate(module.named_parameters()):
                if value.requires_grad:
                    found[f"{name}.model.{key}"] = value.detach().clone()
                    found[f"{name}.params0_values.{place}"] = start[f"{name}.{key}"].clone()
    return found


def classifier(cache: Path, name: str, kind: str, classes: int, seed: int | None = None) -> Path:
    """A classifier of transformers with a processor; fine-tuned ones differ by a seed."""
    import transformers

    folder = cached(cache, name)
    if kind == "convnext":
        config: Any = transformers.ConvNextConfig(
            hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=classes, image_size=32
        )
        processor: Any = transformers.ConvNextImageProcessor(size={"shortest_edge": 32})
    else:
        shape = {"hidden_size": 16, "intermediate_size": 32, "image_size": 32, "patch_size": 16}
        config = transformers.ViTConfig(
            **shape, num_hidden_layers=1, num_attention_heads=2, num_labels=classes
        )
        processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    torch.manual_seed(0)
    config.architectures = None
    model: Any = transformers.AutoModelForImageClassification.from_config(config)
    if seed is not None:
        tiny_clip.changed(model, seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def data(cache: Path, task: str) -> None:
    """A task's data set: Parquet, or of one the tar files of WebDataset, and the card."""
    _DATA.get(task, _plain)(cache, task)


def names_of(task: str) -> list[str]:
    """The classes as the data set has them."""
    content = json.loads((CLASSES / f"{task}.json").read_text(encoding="utf-8"))
    found: list[str] = content.get("names") or content["labels"]
    return found


def _repository(task: str) -> str:
    content = json.loads((CLASSES / f"{task}.json").read_text(encoding="utf-8"))
    return str(content["data"]).partition(":")[0]


def labels(count: int, seed: int) -> list[int]:
    """The labels of a split's rows.

    Args:
        count: of the classes.
        seed: which of the splits it is, from 0.
    """
    return [int(each) for each in np.random.default_rng(seed).integers(0, count, ROWS)]


def _rows(count: int, seed: int, truth: bool = False) -> dict[str, list[Any]]:
    colours = np.random.default_rng(seed).integers(0, 256, (ROWS, 3))
    images = [Image.new("RGB", (20, 18), tuple(map(int, colour))) for colour in colours]
    own = labels(count, seed)
    return {"image": images, "label": [bool(each) for each in own] if truth else own}


def _write(
    folder: Path,
    names: list[str] | None,
    splits: list[str],
    inside: str = "data",
    count: int = 0,
    truth: bool = False,
) -> None:
    (folder / inside).mkdir(parents=True, exist_ok=True)
    label: Any = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Value("bool") if truth else label}
    )
    for seed, split in enumerate(splits):
        rows = _rows(count or len(names or ()), seed, truth)
        made = datasets.Dataset.from_dict(rows, features)
        for part in (0, 1):
            path = folder / inside / f"{split}-0000{part}-of-00002.parquet"
            made.shard(2, part).to_parquet(path)


def _card(folder: Path, configs: Mapping[str, tuple[str, list[str]]]) -> None:
    lines = ["---", "configs:"]
    for name, (inside, splits) in configs.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split in splits:
            lines += [f"  - split: {split}", f"    path: {inside}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def _plain(cache: Path, task: str, splits: tuple[str, ...] = ("train", "test")) -> None:
    folder = cached(cache, _repository(task), "dataset")
    _write(folder, names_of(task), [*splits])
    _card(folder, {"default": ("data", [*splits])})


def _digits(cache: Path, task: str) -> None:
    """SVHN: two configurations, of which one has other columns."""
    folder = cached(cache, _repository(task), "dataset")
    splits = ["train", "test", "extra"]
    _write(folder, names_of(task), splits, "cropped_digits")
    other = datasets.Dataset.from_dict({"digits": [["1", "9"]]})
    (folder / "full_numbers").mkdir(exist_ok=True)
    for split in splits:
        other.to_parquet(folder / "full_numbers" / f"{split}-00000-of-00001.parquet")
    _card(folder, {name: (name, splits) for name in ("cropped_digits", "full_numbers")})


def _numbers(cache: Path, task: str) -> None:
    """Class numbers without names."""
    folder = cached(cache, _repository(task), "dataset")
    _write(folder, None, ["train", "test"], count=len(names_of(task)))


def _truth(cache: Path, task: str) -> None:
    folder = cached(cache, _repository(task), "dataset")
    _write(folder, None, ["train", "valid", "test"], count=2, truth=True)


def _tar(cache: Path, task: str) -> None:
    """WebDataset: an image and its class's number, in files that are called alike."""
    folder = cached(cache, _repository(task), "dataset")
    for seed, split in enumerate(("train", "test")):
        (folder / split).mkdir(exist_ok=True)
        rows = _rows(len(names_of(task)), seed)
        with tarfile.open(folder / split / "0.tar", "w") as tar:
            for place, (image, label) in enumerate(zip(*rows.values(), strict=True)):
                content = io.BytesIO()
                image.save(content, "JPEG")
                for end, file in (("jpg", content.getvalue()), ("cls", str(label).encode())):
                    info = tarfile.TarInfo(f"s{place:07}.{end}")
                    info.size = len(file)
                    tar.addfile(info, io.BytesIO(file))


_CORRUPTED = ("train", "test", "contrast", "gaussian_noise")
_DATA: dict[str, Callable[[Path, str], None]] = {
    "gtsrb": lambda cache, task: _plain(cache, task, _CORRUPTED),
    "eurosat": lambda cache, task: _plain(cache, task, _CORRUPTED),
    "food101": lambda cache, task: _plain(cache, task, ("train", "validation")),
    "svhn": _digits,
    "pcam": _truth,
    "fer2013": _tar,
    **dict.fromkeys(("emnist_letters", "kmnist"), _numbers),
}
"""Those that have something of their own."""
