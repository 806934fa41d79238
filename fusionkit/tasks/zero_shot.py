"""Heads made of words: a dual encoder's image tower classifies by what its text tower says.

As the authors of CLIP do it (OpenAI's notebook; open_clip's `build_zero_shot_classifier`): of each
class its name is put into each of some templates, the features of these prompts are normalised,
averaged, and normalised again. A head is these features times the logit scale. It is made once a
task, and is the task's own: a bundle keeps it, and needs no text tower.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusionkit.checkpoints.checkpoint import Source, find_checkpoints
from fusionkit.checkpoints.headed import Headed
from fusionkit.checkpoints.hub_names import Use, reads_hub
from fusionkit.checkpoints.json_text import read_json
from fusionkit.checkpoints.paths import open_path
from fusionkit.errors import DataError, in_line
from fusionkit.tasks.dual_encoders import DualEncoder, dual_encoder

TEMPLATES = ("a photo of a {}.",)
"""Prompts, where neither the file of classes nor a setting has others."""
_PROMPTS = 256
"""Prompts that the text tower reads at once."""


@dataclass(frozen=True)
class ClassPrompts:
    """A task's classes, in the order of its head's rows, and what is asked of each.

    Attributes:
        names: the classes, as prompts call them.
        templates: prompts with `{}` for a name.
    """

    names: tuple[str, ...]
    templates: tuple[str, ...] = TEMPLATES

    def __post_init__(self) -> None:
        if not self.names or not self.templates:
            raise DataError("a zero-shot head needs classes and templates; one of them is empty")
        if wrong := [each for each in self.templates if "{}" not in each]:
            raise DataError(f"template '{wrong[0]}': expected {{}} in it, for the class's name")

    @classmethod
    def read(cls, path: str | Path, templates: Sequence[str] | None = None) -> "ClassPrompts":
        """Read a JSON file of classes, which the data's `labels` may be, too.

        It is an object: `labels`, the classes as the data call them; `names`, as prompts call
        them, where that is otherwise; `templates`.

        Args:
            path: the file.
            templates: prompts, where the file has none.

        Raises:
            DataError: it is no such file.
        """
        file = open_path(path)
        try:
            content = read_json(file)
            labels = _texts(content, "labels")
            names = _texts(content, "names") or labels
            own = _texts(content, "templates") or templates or TEMPLATES
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise DataError(
                f"{file}: expected JSON with lists of texts: labels, and templates with {{}} for a "
                f"label; names, where prompts call the classes otherwise ({error})"
            ) from error
        if labels and len(names) != len(labels):
            raise DataError(
                f"{file}: has {len(labels)} labels and {len(names)} names; a name for each label, "
                "in their order"
            )
        return cls(tuple(names), tuple(own))

    @property
    def prompts(self) -> list[str]:
        """All of them, class by class."""
        return [each.replace("{}", name) for name in self.names for each in self.templates]


def _texts(content: Mapping[str, Any], key: str) -> list[str]:
    found = content.get(key) or []
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise TypeError(f"'{key}' is no such list")
    return found


def zero_shot_head(encoder: DualEncoder, prompts: ClassPrompts) -> dict[str, Tensor]:
    """The head of a task, by the text tower.

    Args:
        encoder: the dual encoder.
        prompts: the task's classes.

    Returns:
        what `ImageClassifier` lacks: `head.weight`, `(classes, D)` float32, and `head.bias`.
    """
    texts, features = prompts.prompts, []
    with torch.no_grad():
        for start in range(0, len(texts), _PROMPTS):
            said = encoder.text_features(texts[start : start + _PROMPTS]).to(torch.float32)
            features.append(nn.functional.normalize(said, dim=-1))
    rows = torch.cat(features)
    by_class = rows.reshape(len(prompts.names), -1, rows.shape[-1]).mean(1)
    weight = encoder.scale * nn.functional.normalize(by_class, dim=-1)
    bias = torch.full((len(weight),), encoder.bias)
    return {"head.weight": weight.contiguous(), "head.bias": bias}


@reads_hub(encoder=Use.MODEL)
class ZeroShotModels(Mapping[str, Headed]):
    """Fine-tuned image towers of one dual encoder, each under the head of its classes' names.

    It stands where fine-tuned models by task do: `finetuned` of a `ReuseModule` or a recipe.

    Args:
        towers: task name → image tower, or its adapter; or one path with a `*` for the name.
        encoder: the dual encoder whose text tower makes the heads; see `dual_encoder`.
        classes: task name → JSON file of its classes (`ClassPrompts.read`), or their names; or one
            path with a `*` for the name.
        templates: prompts, where the files have none.

    Raises:
        DataError: a task has no classes, or its file can't be read.
    """

    def __init__(
        self,
        towers: dict[str, str] | str,
        encoder: str,
        classes: dict[str, str | list[str]] | str,
        templates: list[str] | None = None,
    ) -> None:
        found = find_checkpoints(towers) if isinstance(towers, str) else towers
        if isinstance(classes, str):
            if classes.count("*") != 1:
                raise DataError(f"classes: expected a '*' for the task's name in {classes}")
            classes = {task: classes.replace("*", task) for task in found}
        if lacking := sorted(found.keys() - classes.keys()):
            raise DataError(
                f"classes: nothing is said of {in_line(lacking)}; a head is made of a task's class "
                "names: give them, or a file of them"
            )
        self._encoder = encoder
        self._models = {
            task: _ZeroShot(tower, self, _prompts(classes[task], templates))
            for task, tower in found.items()
        }

    @cached_property
    def encoder(self) -> DualEncoder:
        """The dual encoder, opened when a head is first asked for."""
        return dual_encoder(self._encoder)

    def __getitem__(self, task: str) -> Headed:
        return self._models[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)


class _ZeroShot(Headed):
    """One of them, whose head is made when it is first asked for."""

    def __init__(self, model: Source, models: ZeroShotModels, prompts: ClassPrompts) -> None:
        super().__init__(model, {})
        self._models, self._prompts = models, prompts

    @cached_property
    def head(self) -> Mapping[str, Tensor]:
        """The head."""
        return zero_shot_head(self._models.encoder, self._prompts)


def _prompts(classes: str | list[str], templates: list[str] | None) -> ClassPrompts:
    if isinstance(classes, str):
        return ClassPrompts.read(classes, templates)
    return ClassPrompts(tuple(classes), tuple(templates or TEMPLATES))
