"""Codecs and merges by name: found through Python entry points, the built-in ones like any other.

A distribution offers one with a line of its `pyproject.toml`:

    [project.entry-points."fusionkit.codecs"]
    ternary = "my_package:Ternary"

The entry point's name is the class's `id`. Listing names imports nothing; a plugin that fails to
import, or a name that two distributions claim, is an error only for who asks for that name.
"""

import dataclasses
import math
import os
import sys
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import Distribution, EntryPoint, entry_points
from typing import Any, ClassVar, TypeVar, cast, get_type_hints

import msgspec

from fusionkit.errors import PluginError, in_line, listing, meant

GROUPS = ("fusionkit.codecs", "fusionkit.merges")
"""The entry-point groups; a config from a file can name nothing outside them."""

_DEEPEST = 8
"""Levels of plugins in each other, as a merge in a codec in DBMS is three."""

Config = dict[str, Any]
"""A plugin as JSON: group, id, settings, and the distribution and version it came from."""


class Plugin:
    """Base of what a distribution can offer: a frozen dataclass of JSON-able settings.

    Attributes:
        group: the entry-point group; set by `DeltaCodec` and `Merge`.
        id: the name it is registered under, unique in its group; set by each class.
    """

    group: ClassVar[str]
    id: ClassVar[str]

    @property
    def recorded(self) -> "Plugin":
        """The plugin that files name: this one, unless it is another that is given more to know."""
        return self


P = TypeVar("P", bound=Plugin)


def names(group: str) -> list[str]:
    """The registered names of a group, sorted; nothing is imported."""
    return sorted({point.name for point in _entry_points(group)})


def load(group: str, name: str) -> type[Plugin]:
    """Import the class registered under a name.

    Raises:
        PluginError: it is not installed, does not import, is claimed by two distributions, or
            calls itself by another id.
    """
    point = entry_point(group, name)
    try:
        found = point.load()
    except Exception as error:
        raise PluginError(
            f"'{name}' of {_distribution(point)} fails to import: {type(error).__name__}: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Plugin)) or (
        getattr(found, "group", None) != group or not dataclasses.is_dataclass(found)
    ):
        raise PluginError(
            f"'{name}' of {_distribution(point)} is not a dataclass for {group}: {found!r}"
        )
    if getattr(found, "id", None) != name:
        raise PluginError(
            f"{_distribution(point)} registers {found.__name__} as '{name}', but its id is "
            f"'{getattr(found, 'id', None)}'; the two must agree"
        )
    return found


def named(group: str, name: str) -> type[Plugin]:
    """The class that is registered under an id, or that has this name or path.

    Args:
        group: of codecs, or merges.
        name: `svd`, `SVD` or `fusionkit.SVD`.

    Raises:
        PluginError: there is none, or it can't be used.
    """
    ids, plain = names(group), name.rpartition(".")[2]
    for each in (plain, _id_of(plain)):
        if each in ids:
            return load(group, each)
    failures = load_all()
    usable = [each for each in ids if f"{group}:{each}" not in failures]
    classes = {load(group, each).__name__: each for each in usable}
    if plain in classes:
        return load(group, classes[plain])
    kind = group.rpartition(".")[2].removesuffix("s")
    known = ", ".join(f"{own} ({each})" for own, each in classes.items())
    raise PluginError(
        f"no {kind} '{name}'{meant(plain, [*classes, *ids])}\ninstalled: {known}; "
        f"'fusionkit codecs' says what each does{unusable(failures)}"
    )


def unusable(failures: dict[str, PluginError]) -> str:
    """Lines on the plugins that `load_all` could not load."""
    found = [f"\nnot usable: {n.rpartition(':')[2]}: {why}" for n, why in failures.items()]
    return "".join(found)


def load_all() -> dict[str, PluginError]:
    """Import every plugin, so that recipes can use bare class names.

    Returns:
        `<group>:<name>` → why it could not be imported, for those that could not.
    """
    failures = {}
    for group in GROUPS:
        for name in names(group):
            try:
                load(group, name)
            except PluginError as error:
                failures[f"{group}:{name}"] = error
    return failures


def origin(plugin: type[Plugin]) -> tuple[str, str]:
    """The distribution and version that registered a class.

    Raises:
        PluginError: the class is not registered, so that a bundle made with it could not be
            opened again.
    """
    if load(plugin.group, plugin.id) is not plugin:
        raise PluginError(
            f"{plugin.__module__}.{plugin.__qualname__} is not what '{plugin.id}' is registered as "
            f"in {plugin.group}"
        )
    return distribution_of(entry_point(plugin.group, plugin.id))


def entry_point(group: str, name: str) -> EntryPoint:
    """Where the class is that is registered under a name; nothing is imported.

    Raises:
        PluginError: it is not installed, or is claimed by two distributions.
    """
    points = [point for point in _entry_points(group) if point.name == name]
    # The same distribution can be seen twice (an editable install beside its source folder).
    claims = {(p.value, _name_and_version(p.dist)[0] if p.dist else ""): p for p in points}
    if not claims:
        raise PluginError(f"no '{name}' in {group} is installed{_installed(group)}")
    if len(claims) > 1:
        raise PluginError(
            f"'{name}' in {group} is claimed by "
            f"{' and '.join(_distribution(p) for p in claims.values())}; uninstall one"
        )
    return next(iter(claims.values()))


def distribution_of(point: EntryPoint) -> tuple[str, str]:
    """The distribution and version that an entry point is of."""
    return _name_and_version(point.dist) if point.dist else ("", "")


def to_config(plugin: Plugin) -> Config:
    """A plugin's settings as JSON; nested plugins become nested configs."""
    plugin = plugin.recorded
    distribution, version = origin(type(plugin))
    settings = {
        field.name: _to_json(getattr(plugin, field.name))
        for field in dataclasses.fields(cast(Any, plugin))
    }
    return {
        "group": plugin.group,
        "id": plugin.id,
        "settings": settings,
        "distribution": distribution,
        "version": version,
    }


def from_config(config: Mapping[str, Any], place: str = "") -> Plugin:
    """The plugin that `to_config` described. Only registered classes are ever imported.

    Settings are held against the annotations of the class's fields before it is made.

    Args:
        config: the description.
        place: where it was read, which messages name: a file, and a key in it.

    Raises:
        PluginError: it is not installed, does not know a setting, lacks one, or has one of
            another type or out of range; or plugins are nested deeper than any that are meant.
    """
    return _made(config, place or "config", _DEEPEST)


def _id_of(name: str) -> str:
    """The id that a class of this name would have, at a guess: `MagnitudePrune` → its words."""
    words = "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name))
    return words if any(c.islower() for c in name) else name.lower()


def _entry_points(group: str) -> tuple[EntryPoint, ...]:
    """All of a group, read again only once something was installed or a folder joined the path."""
    return _read_entry_points(group, tuple((path, _changed(path)) for path in sys.path))


@lru_cache(maxsize=8)
def _read_entry_points(
    group: str, path: tuple[tuple[str, int | None], ...]
) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=group))


def _changed(path: str) -> int | None:
    """When a folder's entries last changed; nothing where there is none."""
    try:
        return os.stat(path or ".").st_mtime_ns
    except OSError:
        return None


@lru_cache(maxsize=64)
def _name_and_version(distribution: Distribution) -> tuple[str, str]:
    return distribution.name, distribution.version


def _distribution(point: EntryPoint) -> str:
    return " ".join(_name_and_version(point.dist)) if point.dist else point.value


def _installed(group: str) -> str:
    return f"; installed:{listing(names(group), limit=50)}"


def _to_json(value: object) -> object:
    if isinstance(value, Plugin):
        return to_config(value)
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    return value


def _made(config: object, place: str, levels: int) -> Plugin:
    """A config's plugin, in which as many levels of others may be."""
    if not levels:
        raise PluginError(
            f"{place}: codecs and merges are nested deeper than {_DEEPEST} levels; none that is "
            "meant is"
        )
    if not isinstance(config, Mapping) or not isinstance(config.get("settings"), Mapping):
        raise PluginError(f"{place}: not a codec's or merge's config: {_shown(config)}")
    group, name, settings = config.get("group"), config.get("id"), config["settings"]
    if not isinstance(group, str) or not isinstance(name, str):
        raise PluginError(f"{place}: not a codec's or merge's config: {_shown(config)}")
    if group not in GROUPS:
        raise PluginError(
            f"{place}: unknown plugin group {_shown(group)}; there are {', '.join(GROUPS)}"
        )
    if name not in names(group):
        came_from = " ".join(str(config.get(k, "")) for k in ("distribution", "version")).strip()
        mend = f"; install it: it came from {came_from[:80]}" if came_from else ""
        raise PluginError(
            f"{place}: no {_shown(name)} in {group} is installed{mend}{_installed(group)}"
        )
    try:
        found = load(group, name)
    except PluginError as error:
        raise PluginError(f"{place}: {error}") from error
    fields = {field.name: field.type for field in dataclasses.fields(cast(Any, found))}
    if unknown := sorted(set(settings) - fields.keys()):
        raise PluginError(
            f"{place}: '{name}' knows no setting {in_line(unknown)}; it was written by "
            f"{config.get('distribution')} {config.get('version')}, install that version or later"
        )
    known = _annotations(found)
    arguments = {
        key: _setting(value, known.get(key, Any), f"{place}.settings.{key}", levels - 1)
        for key, value in settings.items()
    }
    try:
        return found(**arguments)
    except Exception as error:  # of another distribution's class it may be any
        raise PluginError(f"{place}: '{name}' can't be made from its settings: {error}") from error


def _setting(value: object, kind: Any, place: str, levels: int) -> Any:
    """A setting from JSON, held against its annotation; nested plugins made."""

    def nested(wanted: type, each: object) -> object:
        if isinstance(wanted, type) and issubclass(wanted, Plugin):
            made = each if isinstance(each, Plugin) else _made(each, place, levels)
            if isinstance(made, wanted):
                return made
            raise PluginError(f"{place}: expected a {wanted.__name__}, got {type(made).__name__}")
        raise NotImplementedError

    plain = _from_json(value, place, levels)
    try:
        found = msgspec.convert(plain, kind, dec_hook=nested)
        # A whole number where a float may stand stays one: messages show it as it was given.
        return plain if isinstance(plain, int) and found == plain else found
    except msgspec.ValidationError as error:
        raise PluginError(f"{place}: {str(error).replace(' - at `$', ' at `')}") from error
    except (TypeError, NotImplementedError):  # an annotation that JSON knows nothing of
        return plain


def _from_json(value: object, place: str, levels: int) -> object:
    """Plugins made of the configs in a value.

    Raises:
        PluginError: a number is not finite, or as of `from_config`.
    """
    if isinstance(value, Mapping) and {"group", "id", "settings"} <= value.keys():
        return _made(value, place, levels)
    if isinstance(value, list):
        return [_from_json(item, place, levels) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise PluginError(f"{place}: expected a finite number, got {value}")
    return value


def _annotations(found: type[Plugin]) -> dict[str, Any]:
    """The types of a class's fields; none where they can't be told."""
    try:
        return get_type_hints(found)
    except Exception:  # a name that only a type checker imports, say
        return {}


def _shown(value: object) -> str:
    """A value in a message, cut short."""
    return repr(value)[:80]
