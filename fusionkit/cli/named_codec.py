"""A codec as a command line names it: by its id or class, its settings as plain options."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, cast, get_args, get_type_hints

from fusionkit import registry

CODECS = registry.GROUPS[0]


def settings_of(plugin: type[registry.Plugin]) -> dict[str, Any]:
    """A codec's or merge's settings: name → type."""
    hints = get_type_hints(plugin)
    return {field.name: hints[field.name] for field in fields(cast(Any, plugin))}


def with_classes(options: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    """Options whose values name codecs or merges by their ids, by their classes instead.

    Args:
        options: each as `--name=value`.
        settings: name of a setting → type.
    """
    found = []
    for option in options:
        name, equals, value = option.partition("=")
        hint = settings.get(name.removeprefix("--").removeprefix("codec."))
        group = group_of(hint)
        if group and equals and value and value[0] not in "{[" and value not in ("null", "None"):
            value = class_path(registry.named(group, value))
        found.append(f"{name}{equals}{value}")
    return found


def group_of(hint: Any) -> str | None:
    """The plugins that a setting of this type takes; None where it takes none."""
    for each in (hint, *get_args(hint)):
        if isinstance(each, type) and issubclass(each, registry.Plugin):
            return each.group
    return None


def class_path(plugin: type[registry.Plugin]) -> str:
    """How recipes call a class: by its name alone, where FusionKit exports it."""
    import fusionkit

    own = getattr(fusionkit, plugin.__name__, None) is plugin
    return f"fusionkit.{plugin.__name__}" if own else f"{plugin.__module__}.{plugin.__qualname__}"


def as_config(plugin: registry.Plugin) -> dict[str, Any]:
    """A codec as recipes have it: `class_path` and `init_args`, those within it likewise."""
    settings = {field.name: getattr(plugin, field.name) for field in fields(cast(Any, plugin))}
    return {
        "class_path": class_path(type(plugin)),
        "init_args": {name: _plain(value) for name, value in settings.items()},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, registry.Plugin):
        return as_config(value)
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
