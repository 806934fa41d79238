"""From an image to what its model takes: by timm, a processor of transformers, or open_clip."""

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from fusionkit.checkpoints.hub_places import model_place
from fusionkit.checkpoints.json_text import read_json
from fusionkit.checkpoints.paths import is_there, open_path, written_out
from fusionkit.errors import DataError, FusionKitError, meant, of_extra
from fusionkit.tasks.open_clip_models import OpenClipModel

Preprocessing = str | dict[str, Any]
"""A model whose own preprocessing is meant, by its folder or name, or timm's data config."""

_KEYS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
"""Of timm's data config."""
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


class ImageTransform:
    """Makes a model's input of an image.

    Attributes:
        mode: how the image must be for it: `RGB`, or `L`, of one channel.

    Args:
        transform: PIL image → float32 `(C, H, W)`.
        mode: see above.
    """

    def __init__(self, transform: Callable[[Any], Tensor], mode: Literal["RGB", "L"]) -> None:
        self._transform = transform
        self.mode = mode

    def __call__(self, image: Any) -> Tensor:
        """PIL image of its mode → float32 `(C, H, W)`, resized, cropped and normalised."""
        return self._transform(image)


def image_transform(preprocessing: Preprocessing) -> ImageTransform:
    """The transform by which a model is evaluated; nothing is drawn at random.

    Args:
        preprocessing: a model's folder, whose image processor (transformers), `config.json`
            (timm) or `open_clip_config.json` is read; a name of timm's (`resnet50.a1_in1k`), of
            open_clip's (`open_clip:ViT-B-32/openai`), or of the hub; or timm's data config:
            `input_size`, `(C, H, W)`, and of `interpolation`, `mean`, `std`, `crop_pct` and
            `crop_mode` what differs from timm's defaults.

    Raises:
        DataError: nothing there says how images are made, or a key is not known.
    """
    if not isinstance(preprocessing, str):
        return _of_timm(preprocessing)
    path = written_out(preprocessing)
    if known := known_to_timm(path):
        return _of_timm(_timm_data().resolve_data_config({}, known))
    path = model_place(path)
    if theirs := OpenClipModel.at(path):
        return ImageTransform(theirs.made(pretrained=False)[1], "RGB")
    if is_there(path):
        folder = open_path(path)
        if any((folder / name).is_file() for name in _PROCESSORS):
            return _of_processor(path)
        return _of_timm(_timm_config_of(folder))
    return _of_processor(path)


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """The preprocessing of a live model, of timm or transformers.

    Raises:
        DataError: it is of neither.
    """
    if hasattr(model, "pretrained_cfg"):
        config = _timm_data().resolve_model_data_config(model)
        config["input_size"] = _input_size(model, config["input_size"])
        return {key: _plain(value) for key, value in _of_channels(config).items()}
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    if not name:
        raise DataError(
            f"how {type(model).__name__} wants its images is not known: it is no model of timm, "
            "nor was it loaded by transformers from a folder; give `preprocessing`, timm's data "
            "config: {input_size: [3, 224, 224], mean: […], std: […]}"
        )
    return str(name)


def known_to_timm(name: str) -> dict[str, Any] | None:
    """What timm knows of a model of its own; None of another, or of what is here."""
    if is_there(name) or not find_spec("timm"):
        return None
    timm = import_module("timm")
    found: Any = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return found and dict(found.to_dict())


def _of_timm(config: Mapping[str, Any]) -> ImageTransform:
    for key in config:
        if key not in _KEYS:
            hint = meant(key, _KEYS)
            raise DataError(
                f"`preprocessing` knows no '{key}'{hint or ';'} there are {', '.join(_KEYS)}"
            )
    size = config.get("input_size")
    if not isinstance(size, list | tuple) or len(size) != 3 or size[0] not in (1, 3):
        raise DataError(
            f"expected `input_size` of `preprocessing` as [channels, height, width], channels 1 or "
            f"3, got {size!r}"
        )
    data = _timm_data()
    try:
        full = _of_channels({**data.resolve_data_config({"input_size": size}), **config})
        if not len(full["mean"]) == len(full["std"]) == size[0]:
            raise ValueError(f"{size[0]} channels")  # noqa: TRY301
        transform = data.create_transform(**full, is_training=False)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"`preprocessing` is not timm's data config, a mean and a std for each channel: "
            f"{dict(config)} ({type(error).__name__}: {error})"
        ) from error
    return ImageTransform(transform, "L" if size[0] == 1 else "RGB")


def _of_processor(name: str) -> ImageTransform:
    try:
        from transformers import AutoImageProcessor
    except ImportError as error:
        raise FusionKitError(
            f"{name}: its image processor needs transformers; pip install 'fusionkit[text]'"
        ) from error
    try:
        processor = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        said = f"its image processor can't be read ({str(error).strip().splitlines()[0]})"
        if not is_there(name):
            said = "no folder here, no model of timm's, and no image processor on the hub"
        raise DataError(
            f"{name}: {said}; give the folder of a model with {_PROCESSORS[0]} (transformers) or "
            "config.json (timm), or timm's data config as `preprocessing`"
        ) from error
    return ImageTransform(_Processor(processor), "RGB")


class _Processor:
    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, image: Any) -> Tensor:
        values: Tensor = self._processor(images=image, return_tensors="pt")["pixel_values"][0]
        return values


def _timm_config_of(path: Path) -> dict[str, Any]:
    """What the `config.json` of a folder that timm saved says of images."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    try:
        content = read_json(file)
        config = content.get("pretrained_cfg", content)
        if "input_size" not in config:
            raise KeyError("input_size")  # noqa: TRY301
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: says nothing of how images are made for it: neither {_PROCESSORS[0]} is "
            "there nor a config.json that timm wrote; give the folder of a model that has one, or "
            "timm's data config as `preprocessing`"
        ) from error
    return {key: config[key] for key in _KEYS if config.get(key) is not None}


def _timm_data() -> Any:
    return of_extra("timm.data", "vision", "what a model makes of images")


def _input_size(model: Any, size: tuple[int, int, int]) -> tuple[int, ...]:
    """What a model of timm was built for, which need not be what its name is for."""
    first = model.pretrained_cfg.get("first_conv")
    channels = model.get_submodule(first).in_channels if isinstance(first, str) else size[0]
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return (channels, *(built or size[1:]))


def _of_channels(config: Mapping[str, Any]) -> dict[str, Any]:
    """A data config whose mean and std are, of grey images, the mean over the colours."""
    fitted = {key: config[key] for key in _KEYS}
    if config["input_size"][0] == 1:
        for key in ("mean", "std"):
            fitted[key] = (sum(config[key]) / len(config[key]),)
    return fitted


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
