"""Whether results that are there already are of the recipe that is run."""

from pathlib import Path
from typing import Any

import yaml

from fusionkit.checkpoints.yaml_text import parsed_yaml

_DECIDE = (
    *("seed_everything", "trainer", "model", "data"),
    *("families", "merges", "scales", "lorahub", "search_batches"),
)
"""The sections that results come from; not where they go, nor what other verbs read."""
_ACCURACY = "fusionkit.models.accuracy"
"""The metric of recipes that named none, before a task's kind said what scores it."""


def same_recipe(earlier: Path, now: str) -> bool:
    """Whether a recipe that was run comes to the same as another.

    Args:
        earlier: the file of the one that was run, resolved.
        now: the text of the other, resolved.
    """
    try:
        return _decisive(earlier.read_text()) == _decisive(now)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False


def _decisive(text: str) -> dict[str, Any]:
    recipe = parsed_yaml(text, "the recipe")
    return {key: _plain(recipe.get(key)) for key in _DECIDE} if isinstance(recipe, dict) else {}


def _plain(settings: Any) -> Any:
    """Settings without what is null, whatever module FusionKit has a class of its own in."""
    if isinstance(settings, list):
        return [_plain(each) for each in settings]
    if isinstance(settings, dict):
        told = {key: each for key, each in settings.items() if each not in (None, _ACCURACY)}
        return {key: _plain(each) for key, each in told.items()}
    if isinstance(settings, str) and settings.startswith("fusionkit."):
        return settings.removesuffix(".of").rpartition(".")[2]
    return settings
