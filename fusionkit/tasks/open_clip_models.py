"""Models of open_clip, by a folder that it saved or by its own names."""

from pathlib import Path
from typing import Any, NamedTuple

from fusionkit.checkpoints.paths import is_there, open_path
from fusionkit.errors import CheckpointError, of_extra

PREFIX = "open_clip:"
"""What a path begins with that is one of open_clip's own names: `NAME/PRETRAINED`."""
CONFIG = "open_clip_config.json"
"""A file of a folder that open_clip saved."""


class OpenClipModel(NamedTuple):
    """A model of open_clip; nothing is read yet.

    Attributes:
        path: how messages call it.
        name: as open_clip takes it.
        tag: which of its pretrained weights; empty where the name says it.
    """

    path: str
    name: str
    tag: str

    @classmethod
    def at(cls, path: str) -> "OpenClipModel | None":
        """The model that a path means; None where it is another library's.

        Args:
            path: a folder, or `open_clip:NAME/PRETRAINED`, `open_clip:hf-hub:ORG/NAME`.
        """
        folder: Path | None = open_path(path) if is_there(path) else None
        if folder is not None and (folder / CONFIG).is_file():
            return cls(path, f"local-dir:{folder}", "")
        if not path.startswith(PREFIX):
            return None
        own = path.removeprefix(PREFIX)
        name, _, tag = own.partition("/")
        return cls(path, own, "") if ":" in own else cls(path, name, tag)

    def made(self, pretrained: bool = True) -> tuple[Any, Any]:
        """Build it: the model, in eval mode, and what it makes of an image.

        Args:
            pretrained: load the weights.

        Raises:
            MissingExtraError: open_clip is not installed.
            CheckpointError: there is no such model.
        """
        try:
            model, _, transform = self.library.create_model_and_transforms(
                self.name,
                self.tag or None,
                load_weights=pretrained,
                require_pretrained=pretrained,
                pretrained_text=False,
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: open_clip can't make it ({str(error).strip().splitlines()[0]}); "
                f"give a folder with {CONFIG} and weights, or {PREFIX}NAME/PRETRAINED, as "
                "open_clip.list_pretrained() has them"
            ) from error
        return model.eval(), transform

    @property
    def tokenizer(self) -> Any:
        """What makes tokens of texts."""
        return self.library.get_tokenizer(self.name)

    @property
    def library(self) -> Any:
        """open_clip itself."""
        return of_extra("open_clip", "clip", f"{self.path}, a model of open_clip's,")
