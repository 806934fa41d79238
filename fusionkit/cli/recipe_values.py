"""What a recipe and its options may say in short, written out for the parser.

Codecs and merges by id (`codec: svd`), data modules and Lightning modules by their class's words
(`data: text_classification`), one text for a list of one (`private: head.*`). What is no key,
option, class or setting, but close to one, is refused by name. A setting's type says which of
these it takes: that of the parser's own, or of the parameter of the class that is named.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from jsonargparse import ArgumentParser, get_loader

from fusionkit.cli.class_names import ClassNames, classes_in, holds_texts, inside, kinds_of
from fusionkit.errors import UsageError, meant

_NONE = ("null", "None")


class RecipeValues:
    """The values that a parser takes, by its own types.

    Args:
        parser: has all its arguments.

    Attributes:
        flags: the options that may stand alone.
    """

    def __init__(self, parser: ArgumentParser) -> None:
        own = [each for each in parser._actions if each.option_strings]
        options = {name.lstrip("-"): each for each in own for name in each.option_strings}
        self._types = {
            n: each._typehint for n, each in options.items() if hasattr(each, "_typehint")
        }
        self._keys = set(options)
        self._settings = {each.dest for each in own if each.dest in self._types}
        self._names = ClassNames()
        self.flags = [name for name, hint in self._types.items() if kinds_of(hint) == [bool]]

    def content(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """A recipe's content, written out.

        Args:
            content: as YAML has it.

        Raises:
            UsageError: a key, a class or a class's setting is mistyped.
        """
        return {name: self._under(name, each) for name, each in content.items()}

    def options(self, args: Sequence[str]) -> list[str]:
        """A command line, written out.

        Args:
            args: each option with its value after it, or as `--name=value`.

        Raises:
            UsageError: an option, a class or a class's setting is mistyped.
        """
        found: list[str] = []
        rest = list(args)
        while rest:
            word = rest.pop(0)
            name, equals, value = word.removeprefix("--").partition("=")
            if not word.startswith("--") or not name:
                found.append(word)
                continue
            hint = self._type_of(name.removesuffix("+"))
            if hint is None:
                found.append(f"--{self._handed_on(name)}{equals}{value}")
                continue
            if not equals and rest and not rest[0].startswith("--"):
                equals, value = "=", rest.pop(0)
            found.append(f"--{name}{equals}{self._as_text(value, hint, name) if equals else ''}")
        return found

    def value(self, value: Any, hint: Any, key: str) -> Any:
        """A value of some type, written out.

        Args:
            value: as YAML has it.
            hint: the type.
            key: where it is said, the `init_args` in it left out.

        Raises:
            UsageError: a class, or a class's setting, is mistyped.
        """
        kinds = kinds_of(hint)
        classes = classes_in(kinds)
        if isinstance(value, str):
            return self._text(value, kinds, classes, key)
        if isinstance(value, list):
            items = inside(kinds, Sequence) or (hint if classes else None)
            return value if items is None else [self.value(each, items, key) for each in value]
        if not isinstance(value, dict):
            return value
        if classes and ("class_path" in value or self._names.chosen(key)):
            return self._of_class(value, classes, key)
        held = inside(kinds, Mapping)
        if held is None:
            return value
        return {name: self.value(each, held, f"{key}.{name}") for name, each in value.items()}

    def _text(self, value: str, kinds: Sequence[Any], classes: Sequence[type], key: str) -> Any:
        if str in kinds or value in _NONE:
            return value
        if classes:
            return self._names.written_out(value, classes, key)
        return [value] if holds_texts(kinds) and value[:1] not in ("[", "") else value

    def _of_class(self, value: dict[str, Any], classes: Sequence[type], key: str) -> dict[str, Any]:
        """A value that names a class, or has settings of the one that was named before."""
        found = dict(value)
        if "class_path" in value:
            found["class_path"] = self._names.written_out(str(value["class_path"]), classes, key)
        plain = "class_path" not in value and "init_args" not in value
        settings = value if plain else value.get("init_args")
        if isinstance(settings, dict):
            told = {
                name: self.value(each, self._names.type_of(key, name), f"{key}.{name}")
                for name, each in settings.items()
            }
            if plain:
                return told
            on = {name: each for name, each in told.items() if self._names.hands_on(key, name)}
            found["init_args"] = {name: each for name, each in told.items() if name not in on}
            if on:
                found["dict_kwargs"] = {**(found.get("dict_kwargs") or {}), **on}
        return found

    def _under(self, key: str, value: Any) -> Any:
        """What a recipe has at a key."""
        if key in self._settings:
            return self.value(value, self._types[key], key)
        if not self._inside(key):
            above, _, name = key.rpartition(".")
            if key.removesuffix("+") not in self._keys and (
                close := meant(name, self._inside(above))
            ):
                raise UsageError(f"no key '{name}'{f' in `{above}`' if above else ''}{close}")
        elif isinstance(value, dict):
            return {name: self._under(f"{key}.{name}", each) for name, each in value.items()}
        return value

    def _inside(self, key: str) -> list[str]:
        """The names of the keys inside one."""
        start = f"{key}." if key else ""
        found = [
            each[len(start) :].partition(".")[0] for each in self._keys if each.startswith(start)
        ]
        return sorted({*found} - {"help", ""})

    def _type_of(self, name: str) -> Any:
        """The type of an option's value; None where nothing is known of it.

        Raises:
            UsageError: there is no such option, but one close to it.
        """
        if name in self._keys:
            return self._types.get(name)
        parts = name.split(".")
        for place in range(len(parts) - 1, 0, -1):
            key = ".".join(parts[:place])
            if key in self._settings:
                return self._type_inside(key, parts[place:])
        if not any(each.startswith(name) for each in self._keys):  # what is cut short is no typo
            for place, part in enumerate(parts):
                known = self._inside(".".join(parts[:place]))
                close = meant(part, known)
                if part not in known and close:
                    right = ".".join([*parts[:place], close.split("'")[1], *parts[place + 1 :]])
                    raise UsageError(f"no option '--{name}'; did you mean '--{right}'?")
        return None

    def _type_inside(self, key: str, parts: Sequence[str]) -> Any:
        """The type of what is inside a setting: a class's own setting, or a mapping's value."""
        hint = self._types[key]
        for part in parts:
            if part == "init_args":
                continue
            if part == "class_path":
                return hint
            if part == "help" or hint is None:
                return None
            held = inside(kinds_of(hint), Mapping)
            if held is not None and not self._names.chosen(key):
                hint = held
            else:
                hint = self._names.type_of(key, part)
            key = f"{key}.{part}"
        return hint

    def _handed_on(self, name: str) -> str:
        """An option's name, as the parser knows those that a function hands on."""
        above, _, last = name.removesuffix("+").rpartition(".")
        key = ".".join(part for part in above.split(".") if part != "init_args")
        if last == "help" or not self._names.hands_on(key, last):
            return name
        return f"{above.removesuffix('.init_args')}.dict_kwargs.{name.rpartition('.')[2]}"

    def _as_text(self, value: str, hint: Any, key: str) -> str:
        """An option's value, written out."""
        parts = key.removesuffix("+").split(".")
        key = ".".join(part for part in parts if part not in ("init_args", "class_path"))
        said: Any = value
        if value[:1] in ("{", "["):
            try:
                said = get_loader("yaml")(value)
            except yaml.YAMLError:
                return value  # the parser says what is wrong
        found = self.value(said, hint, key)
        return value if found == said else found if isinstance(found, str) else json.dumps(found)
