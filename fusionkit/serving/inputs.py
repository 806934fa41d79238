"""Rows to be classified, as a model takes them: texts as tokens, images as numbers, numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fusionkit.bundles.bundle import Bundle
from fusionkit.checkpoints.architecture import is_transformers
from fusionkit.errors import DataError, RequestError
from fusionkit.reuse.beside import config_for, processor
from fusionkit.serving.served_tasks import ServedTask
from fusionkit.tasks.transforms import ImageTransform, image_transform, preprocessing_of


@dataclass(frozen=True)
class Input:
    """A row.

    Attributes:
        values: what the model takes, by the name of its argument; by "" if it has but one.
        length: its tokens; rows of other lengths are padded.
        tokens: of its text.
    """

    values: Mapping[str, Tensor]
    length: int = 0
    tokens: int = 0

    @property
    def kind(self) -> object:
        """Rows of one kind can be put into one batch."""
        if self.length:
            return tuple(self.values)
        return tuple((name, value.shape, value.dtype) for name, value in self.values.items())


class Inputs(Protocol):
    """Makes rows ready for a model."""

    def row(self, task: ServedTask, asked: Any) -> Input:
        """A row, from what was asked; see `Predict.inputs`.

        Raises:
            RequestError: it is nothing that the model takes.
        """

    def batch(self, rows: Sequence[Input]) -> Mapping[str, Tensor]:
        """Rows of one kind as the model takes them."""


def inputs_of(model: nn.Module, bundle: Bundle) -> Inputs:
    """What makes rows ready for a model."""
    main = getattr(model, "main_input_name", "") if is_transformers(model) else ""
    if main == "input_ids":
        return Texts(model)
    if main in ("", "pixel_values") and (main or hasattr(model, "pretrained_cfg")):
        return Images(model, bundle, main)
    return Numbers(model, main)


class Texts:
    """Texts, or pairs of them, by each task's tokenizer.

    Args:
        model: of transformers.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        self._pad: int | None = config.get_text_config().pad_token_id
        self._longest: int | None = getattr(config, "max_position_embeddings", None)

    def row(self, task: ServedTask, asked: Any) -> Input:
        """A text's tokens."""
        texts = (asked,) if isinstance(asked, str) else asked
        if not (
            isinstance(texts, tuple | list)
            and 1 <= len(texts) <= 2
            and all(isinstance(text, str) for text in texts)
        ):
            raise RequestError(f"{task.label} takes a text, or a pair of texts, got {_kind(asked)}")
        words = task.need_words()
        with words.lock:
            found = words.tokenizer(*texts)
            known = words.tokenizer.model_max_length
        length = len(found["input_ids"])
        longest = min(known, self._longest or known)
        if not 0 < length <= longest:
            raise RequestError(
                f"{task.label} takes texts of 1 to {longest} tokens, got {length}; shorten the text"
            )
        return Input({name: torch.tensor(each) for name, each in found.items()}, length, length)

    def batch(self, rows: Sequence[Input]) -> Mapping[str, Tensor]:
        """Padded on the right to the longest."""
        width = max(row.length for row in rows)
        found = {}
        for name in rows[0].values:
            fill = self._pad or 0 if name == "input_ids" else 0
            found[name] = torch.full((len(rows), width), fill)
            for place, row in enumerate(rows):
                found[name][place, : row.length] = row.values[name]
        return found


class Numbers:
    """Numbers as they are: whole ones as int64, others as float32.

    Args:
        model: what they are for.
        name: of its argument.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self._name, self._model = name, model

    def row(self, task: ServedTask, asked: Any) -> Input:
        """A row's array."""
        try:
            array = np.asarray(asked)
            if array.dtype.kind not in "biuf":
                raise ValueError(f"of dtype {array.dtype}")  # noqa: TRY301
        except ValueError as error:
            raise RequestError(
                f"{task.label} takes an array of numbers, got {_kind(asked)} ({error})"
            ) from error
        whole = array.dtype.kind in "biu" and not self._name
        return Input({self._name: torch.tensor(array, dtype=torch.long if whole else torch.float)})

    def batch(self, rows: Sequence[Input]) -> Mapping[str, Tensor]:
        """One beside the other."""
        dtype = next((p.dtype for p in self._model.parameters() if p.is_floating_point()), None)
        values = torch.stack([row.values[self._name] for row in rows])
        return {self._name: values.to(dtype) if values.is_floating_point() else values}


class Images(Numbers):
    """Images by each task's own preprocessing; arrays as they are, `(C, H, W)`.

    Args:
        model: of timm or transformers.
        bundle: whose preprocessing it is.
        name: of the model's argument.
    """

    def __init__(self, model: nn.Module, bundle: Bundle, name: str) -> None:
        super().__init__(model, name)
        self._bundle = bundle
        self._transforms: dict[str | None, ImageTransform] = {}

    def row(self, task: ServedTask, asked: Any) -> Input:
        """An image's pixels."""
        if not isinstance(asked, bytes):
            found = super().row(task, asked).values[self._name]
            return Input({self._name: found.float()})
        if task.name not in self._transforms:
            self._transforms[task.name] = self._transform(task.name)
        transform = self._transforms[task.name]
        from PIL import Image

        from fusionkit.tasks.image_files import opened

        try:
            with Image.open(BytesIO(asked)) as image:
                pixels = transform(opened(image, task.label, transform.mode))
        except (DataError, OSError, ValueError, Image.DecompressionBombError) as error:
            raise RequestError(f"{task.label} takes images, PNG or JPEG, say: {error}") from error
        return Input({self._name: pixels})

    def _transform(self, task: str | None) -> ImageTransform:
        if self._name:
            made = processor(self._bundle, task)
            return ImageTransform(
                lambda image: made(images=image, return_tensors="pt")["pixel_values"][0], "RGB"
            )
        known = preprocessing_of(self._model)
        said = config_for(self._bundle, task).get("pretrained_cfg") or {}
        assert isinstance(known, dict)
        return image_transform({key: said.get(key) or value for key, value in known.items()})


def _kind(asked: Any) -> str:
    return "bytes" if isinstance(asked, bytes) else type(asked).__name__
