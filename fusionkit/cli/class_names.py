"""Classes as recipes name them, and the types of their settings."""

import re
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import is_dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import Parameter, isabstract, isclass, signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule

from fusionkit import registry
from fusionkit.cli.named_codec import class_path
from fusionkit.errors import PluginError, UsageError, meant

_BY_WORDS = (LightningDataModule, LightningModule)


class ClassNames:
    """The classes, and functions, that a recipe names: where each is named, and its settings."""

    def __init__(self) -> None:
        self._chosen: dict[str, Any] = {}

    def chosen(self, key: str) -> Any:
        """What was named at a key; None where nothing was, or nothing that is known."""
        return self._chosen.get(key)

    def written_out(self, name: str, bases: Sequence[type], key: str) -> str:
        """A name as the parser knows it: an id, or a class's words, becomes the class's path.

        Args:
            name: as the recipe has it.
            bases: what the class may be a subclass of.
            key: where it is named.

        Raises:
            UsageError: there is none of that name, but one close to it; or no such codec.
        """
        if re.fullmatch(r"\w+", name) is None:
            self._chosen[key] = _imported(name, key)
            return name
        known = {each.__name__: each for base in bases for each in _with_subclasses(base)}
        if name in known:
            self._chosen[key] = known[name]
            return name
        for base in bases:
            if issubclass(base, registry.Plugin):
                try:
                    self._chosen[key] = plugin = registry.named(base.group, name)
                except PluginError as error:
                    raise UsageError(f"{key}: {error}") from error
                return class_path(plugin)
            words = {_words(own): each for own, each in known.items()}
            if issubclass(base, _BY_WORDS) and _words(name) in words:
                self._chosen[key] = found = words[_words(name)]
                return f"{found.__module__}.{found.__qualname__}"
        if close := meant(name, known):
            raise UsageError(f"{key}: no {bases[0].__name__} '{name}'{close}")
        self._chosen.pop(key, None)
        return name

    def type_of(self, key: str, setting: str) -> Any:
        """The type of a setting of what was named at a key; None where it is not known.

        Raises:
            UsageError: it has no such setting.
        """
        found = self._chosen.get(key)
        if found is None:
            return None
        try:
            parameters = signature(found).parameters
            own = found.__init__ if isclass(found) and not is_dataclass(found) else found
            hints = get_type_hints(own)
        except (NameError, TypeError, ValueError):
            return None  # the parser knows more ways to find out
        setting = setting.removesuffix("+")
        if setting in parameters:
            return hints.get(setting)
        if any(each.kind is Parameter.VAR_KEYWORD for each in parameters.values()):
            return None
        name = getattr(found, "__name__", str(found))
        raise UsageError(
            f"{key}: no option '{setting}' of {name}{meant(setting, parameters)}\n"
            f"{name} has {', '.join(parameters) or 'none'}"
        )

    def hands_on(self, key: str, setting: str) -> bool:
        """Whether a setting of what was named at a key is one that it hands on, unseen, to another.

        timm's `create_model` does so with a model's own settings.
        """
        found = self._chosen.get(key)
        accepted = None if found is None else _accepted(found)
        return accepted is not None and setting.removesuffix("+") not in accepted


@cache
def _accepted(found: Any) -> frozenset[str] | None:
    """The settings that the parser finds of a class or function; None where all are its own.

    It follows what is handed on to another (`**kwargs`), as far as the code says to which.
    """
    try:
        parameters = signature(found).parameters.values()
    except (TypeError, ValueError):
        return None
    if all(each.kind is not Parameter.VAR_KEYWORD for each in parameters):
        return None
    parser = ArgumentParser(exit_on_error=False)
    add = parser.add_class_arguments if isclass(found) else parser.add_function_arguments
    try:
        added = add(found, "it", fail_untyped=False)
    except ValueError:
        return None  # the parser says why, where it is to be built
    return frozenset(name.removeprefix("it.") for name in added)


def kinds_of(hint: Any) -> list[Any]:
    """The types that a type stands for: of a union all, but that of None."""
    if get_origin(hint) is Annotated:
        return kinds_of(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return [kind for each in get_args(hint) for kind in kinds_of(each)]
    return [] if hint is NoneType else [hint]


def classes_in(kinds: Sequence[Any]) -> list[type]:
    """The types that are classes to choose a subclass of."""
    plain = [each for each in kinds if isclass(each) and get_origin(each) is None]
    return [each for each in plain if each.__module__ != "builtins"]


def inside(kinds: Sequence[Any], container: type) -> Any:
    """The type of what a list, or a mapping, holds; None where no type is one."""
    for each in kinds:
        origin = get_origin(each)
        if isclass(origin) and issubclass(origin, container) and get_args(each):
            return get_args(each)[-1]
    return None


def holds_texts(kinds: Sequence[Any]) -> bool:
    """Whether one of the types is a list, or the like, of texts."""
    lists = [get_args(each) for each in kinds if get_origin(each) in (list, tuple, set, Sequence)]
    return any(args[:1] == (str,) and args[1:] in ((), (...,)) for args in lists)


def subclass_names(base: type, modules: Collection[str]) -> list[str]:
    """The subclasses that a recipe can name, of those that some modules have, sorted.

    Args:
        base: the class.
        modules: their names; they are imported.
    """
    own = {each for each in _with_subclasses(base) if each.__module__ in modules}
    return sorted(each.__name__ for each in own if not isabstract(each) and each.__name__[0] != "_")


def _with_subclasses(base: type) -> Iterator[type]:
    yield base
    below: list[type] = type.__subclasses__(base)
    for each in below:
        yield from _with_subclasses(each)


def _words(name: str) -> str:
    """A name as it is compared: `TextClassification` and `text_classification` are one."""
    return name.replace("_", "").lower()


def _imported(path: str, key: str) -> Any:
    """The class or function that a path leads to; None where the parser is to say what is wrong.

    Raises:
        UsageError: there is no such module, or nothing of that name in it.
    """
    names = path.split(".")
    if not all(name.isidentifier() for name in names):
        return None
    if names[0] not in sys.modules and find_spec(names[0]) is None:
        near = (file.stem for each in sys.path for file in Path(each or ".").glob("*.py"))
        raise UsageError(
            f"{key}: no module '{names[0]}'{meant(names[0], near)}\nmodules are looked for in the "
            "working directory, beside the recipe, and among what is installed"
        )
    for place in range(len(names) - 1, 0, -1):
        try:
            found: Any = import_module(".".join(names[:place]))
        except ModuleNotFoundError as error:
            if not f"{path}.".startswith(f"{error.name}."):
                return None  # the module is there, and lacks what it imports
            continue
        except Exception:
            return None
        for name in names[place:]:
            above, found = found, getattr(found, name, None)
            if found is None:
                where = getattr(above, "__name__", ".".join(names[:place]))
                raise UsageError(f"{key}: no '{name}' in {where}{meant(name, dir(above))}")
        return found if callable(found) else None
    return None
