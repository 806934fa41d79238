"""Dual encoders (CLIP, SigLIP): a tower for images, one for texts, which meet in one space.

Those of transformers and of open_clip are opened alike. A task of classification needs the image
tower alone, and a head: `ImageClassifier`. What makes heads of class names is in `zero_shot`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from fusionkit.checkpoints.hub_names import Use, reads_hub
from fusionkit.checkpoints.hub_places import model_place
from fusionkit.errors import CheckpointError, of_extra
from fusionkit.tasks.models import config_of, quiet, tokenizer_of
from fusionkit.tasks.open_clip_models import CONFIG, PREFIX, OpenClipModel


class DualEncoder(ABC):
    """An image tower and a text tower, in eval mode; `dual_encoder` opens one.

    Attributes:
        module: all of it.
        towers: the parts that an image goes through, one after the other.
        tokens: what makes of texts the module's arguments.
    """

    module: Any
    towers: tuple[str, ...]
    tokens: "TextTokens"

    @abstractmethod
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """What the text tower says of texts, not normalised: `(N, D)`, of the module's dtype."""

    @property
    @abstractmethod
    def width(self) -> int:
        """D, the number of a feature's entries."""

    @property
    def scale(self) -> float:
        """What cosines are multiplied by for logits."""
        return float(self.module.logit_scale.detach().exp())

    @property
    def bias(self) -> float:
        """What is added to them then (SigLIP)."""
        own = getattr(self.module, "logit_bias", None)
        return 0.0 if own is None else float(own.detach())


@reads_hub(path=Use.MODEL)
def dual_encoder(path: str, pretrained: bool = True) -> DualEncoder:
    """Open a dual encoder.

    Args:
        path: a folder or hub name of transformers' (CLIP, SigLIP, …); a folder of open_clip's; or
            `open_clip:NAME/PRETRAINED`, as open_clip calls it (`open_clip:ViT-B-32/openai`).
        pretrained: load the weights; otherwise the architecture alone is built.

    Raises:
        FusionKitError: the library that it is of is not installed.
        CheckpointError: there is no such model, or it has no two towers.
    """
    place = model_place(path)
    theirs = OpenClipModel.at(place)
    return _OpenClip(theirs, pretrained) if theirs else _Transformers(place, pretrained)


@reads_hub(path=Use.MODEL)
def both_towers(path: str, pretrained: bool = True) -> nn.Module:
    """The whole of a dual encoder, a model for recipes: for tasks of images and texts.

    Args:
        path: as of `dual_encoder`.
        pretrained: as of `dual_encoder`.

    Returns:
        the model, in eval mode; it returns features of images and of texts.

    Raises:
        FusionKitError: as of `dual_encoder`.
    """
    model: nn.Module = dual_encoder(path, pretrained).module
    return model


@reads_hub(path=Use.MODEL)
class ImageClassifier(nn.Module):
    """The image tower of a dual encoder under a linear head: the logits of each task's classes.

    The tower's tensors are called as in the dual encoder's files; the head, `head.weight`
    `(classes, D)` and `head.bias` `(classes,)`, is each task's own (`private: head.*`), and of
    normalised features: `ZeroShotModels` makes it of class names.

    Args:
        path: the dual encoder; see `dual_encoder`.
        classes: rows of the head; a task's own replaces it, whatever its size.
        pretrained: load the weights; otherwise the architecture alone is built.

    Raises:
        FusionKitError: as of `dual_encoder`.
    """

    def __init__(self, path: str, classes: int = 2, pretrained: bool = True) -> None:
        super().__init__()
        encoder = dual_encoder(path, pretrained)
        self._towers = encoder.towers
        for name in encoder.towers:
            self.add_module(name, getattr(encoder.module, name))
        self.head = nn.Linear(encoder.width, classes)
        self.eval()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images `(B, C, H, W)` → logits `(B, classes)`."""
        found: Any = pixel_values
        for name in self._towers:
            found = pooled(getattr(self, name)(found))
        logits: Tensor = self.head(nn.functional.normalize(found, dim=-1))
        return logits


def pooled(said: Any) -> Tensor:
    """The features in what a tower says: that itself, or its pooled output."""
    found: Tensor = said if isinstance(said, Tensor) else said.pooler_output
    return found


class TextTokens:
    """Makes of texts, and calls images, what a dual encoder takes as arguments; needs no weights.

    Args:
        path: the dual encoder's; see `dual_encoder`.

    Attributes:
        image: what it calls its images.

    Raises:
        DataError: there is no tokenizer.
        CheckpointError: there is no such model.
    """

    def __init__(self, path: str) -> None:
        theirs = OpenClipModel.at(model_place(path))
        self.image = "image" if theirs else "pixel_values"
        self._tokenizer = theirs.tokenizer if theirs else tokenizer_of(path)
        self._config = None if theirs else config_of(path)

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Texts as arguments by name, the tokens, int64 `(N, L)`, first."""
        if self._config is None:
            return {"text": self._tokenizer(list(texts))}
        longest = "siglip" in self._config.model_type  # as it was trained
        found = self._tokenizer(
            list(texts),
            padding="max_length" if longest else True,
            truncation=True,
            max_length=self._config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        known = ("input_ids", "attention_mask")
        return {name: found[name] for name in known if name in found}


class _Transformers(DualEncoder):
    def __init__(self, path: str, pretrained: bool) -> None:
        transformers = of_extra("transformers", "text", "a dual encoder")
        self._path = path
        try:
            with quiet():
                if pretrained:
                    self.module = transformers.AutoModel.from_pretrained(path).eval()
                else:
                    config = transformers.AutoConfig.from_pretrained(path)
                    self.module = transformers.AutoModel.from_config(config).eval()
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: no dual encoder there; expected a folder of transformers' with "
                f"config.json and weights, one of open_clip's with {CONFIG}, a hub name, "
                f"or {PREFIX}NAME/PRETRAINED ({str(error).strip().splitlines()[0]})"
            ) from error
        if not hasattr(self.module, "get_text_features") or not hasattr(self.module, "logit_scale"):
            raise CheckpointError(
                f"{path}: {type(self.module).__name__} is no dual encoder, with a tower for images "
                "and one for texts; give the whole of CLIP or SigLIP, not its image tower alone"
            )
        known = [name for name, _ in self.module.named_children()]
        self.towers = tuple(n for n in ("vision_model", "visual_projection") if n in known)

    @cached_property
    def tokens(self) -> TextTokens:  # type: ignore[override]
        return TextTokens(self._path)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        return pooled(self.module.get_text_features(**self.tokens(texts)))

    @property
    def width(self) -> int:
        projection = getattr(self.module, "visual_projection", None)
        return int(
            self.module.config.vision_config.hidden_size
            if projection is None
            else projection.out_features
        )


class _OpenClip(DualEncoder):
    towers = ("visual",)

    def __init__(self, model: OpenClipModel, pretrained: bool) -> None:
        self._path = model.path
        self.module, _ = model.made(pretrained)

    @cached_property
    def tokens(self) -> TextTokens:  # type: ignore[override]
        return TextTokens(self._path)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        features: Tensor = self.module.encode_text(self.tokens(texts)["text"])
        return features

    @property
    def width(self) -> int:
        known = getattr(self.module.visual, "output_dim", None)
        return known or self.text_features(["a"]).shape[-1]
