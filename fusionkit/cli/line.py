"""A verb over models that its command line names: `fusionkit VERB BASE FINETUNED… [--codec …]`."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_type_hints

from fusionkit import registry
from fusionkit.checkpoints.adapters.modules import Adapters
from fusionkit.checkpoints.checkpoint import Checkpoint, Source
from fusionkit.cli.help import kind_of, models_help, options_help
from fusionkit.cli.named_codec import CODECS, settings_of, with_classes
from fusionkit.cli.named_models import located, named_models
from fusionkit.cli.words import divided, with_values
from fusionkit.codecs.base import DeltaCodec
from fusionkit.errors import CodecError, UsageError, meant

DEFAULT_CODEC = "sketch"


@dataclass
class How:
    """What a line may say of models beside their paths.

    Args:
        codec: id or class of the codec; its settings are options, too (fusionkit codecs CODEC).
        private: pattern of tensors that are each task's own, or a list; others are found.
        frozen: pattern of tensors that are the base's in every task, or a list; others are found.
        adapters: of PEFT adapters, compress the weights that they are `merged` into, or the
            adapter `modules` themselves.
        rename: regular expression → replacement, for names of tensors in all models.
        ignore: pattern of tensors that no one needs, or a list.
        dequantize: read quantised models (GGUF, GPTQ, AWQ, bitsandbytes, …) as unquantised ones.
    """

    codec: str | None = DEFAULT_CODEC
    private: list[str] | str | None = None
    frozen: list[str] | str | None = None
    adapters: Adapters = "merged"
    rename: dict[str, str] | None = None
    ignore: list[str] | str | None = None
    dequantize: bool = False

    @property
    def told(self) -> dict[str, Any]:
        """What `Family` is told of the models."""
        return {
            "private": as_list(self.private),
            "frozen": as_list(self.frozen),
            "adapters": self.adapters,
            "rename": self.rename or {},
            "ignore": as_list(self.ignore),
        }

    def opened(self, path: str) -> Source | Checkpoint:
        """A model as the line says it is read; a path, where that says it all."""
        return Checkpoint.of(path, dequantize=True) if self.dequantize else path

    def as_config(self, path: str) -> str | dict[str, Any]:
        """The same as a recipe has it."""
        if not self.dequantize:
            return path
        init_args = {"source": path, "dequantize": True}
        return {"class_path": "fusionkit.Checkpoint.of", "init_args": init_args}


@dataclass(frozen=True)
class Line:
    """A line, understood.

    Attributes:
        words: what is no option: models.
        codec: the codec; None where there is none.
        called: how tables call it.
        how: what else was said of the models.
        own: the verb's own options, and whether each was given.
        given: names of all options that were given.
        passed: options that are not the line's, but a recipe's (`--trainer.devices=2`).
    """

    words: list[str]
    codec: DeltaCodec | None
    called: str
    how: How
    own: Mapping[str, Any]
    given: frozenset[str]
    passed: list[str]


def parse_line(
    verb: str,
    args: Sequence[str],
    own: Callable[..., Any],
    how: type[How] = How,
    passes: Sequence[str] = (),
) -> Line:
    """Understand a line; nothing is looked at yet.

    Args:
        verb: how the errors call it.
        args: the command line after the verb.
        own: a function, or a dataclass, whose parameters are the verb's own options.
        how: what else may be said; its default is the default codec.
        passes: what options begin with that are a recipe's, as `trainer.`.

    Raises:
        UsageError: an option is unknown, or of the wrong type.
        PluginError, CodecError: the codec is unknown, or does not take its settings.
    """
    types = {**get_type_hints(own), **get_type_hints(how)}
    types.pop("return", None)
    flags = [name for name, hint in types.items() if hint is bool]
    words, options = divided(with_values(args, flags))
    passed = [each for each in options if each[2:].startswith(tuple(passes))] if passes else []
    options = [each for each in options if each not in passed]
    codec_name = _codec_in(options, how)
    plugin = None if codec_name is None else registry.named(CODECS, codec_name)
    settings = {} if plugin is None else settings_of(plugin)
    _refuse_unknown(verb, options, types, plugin, settings)
    rest = [each for each in options if not each.startswith("--codec=")]
    told, values = _parsed(with_classes(rest, settings), types, plugin, (own, how))
    make = _made if codec_name == DEFAULT_CODEC else _as_told
    codec, called = (None, "") if plugin is None else make(plugin, values)
    said = how(codec_name, **{n: told[n] for n in get_type_hints(how) if n in told})
    extra = {name: told[name] for name in get_type_hints(own) if name in told}
    given = frozenset(map(_first, options))
    return Line(words, codec, called, said, extra, given, passed)


def models_in(verb: str, words: Sequence[str]) -> tuple[str, dict[str, str], list[str]]:
    """The base and the fine-tuned models that a line names; nothing is read of them yet.

    Args:
        verb: how the errors call it.
        words: of the line.

    Returns:
        the base's path; task → path; and what globs found, and is no model.

    Raises:
        UsageError: there are too few.
        CheckpointError, FamilyError: nothing is at a path; two tasks have one name.
    """
    if len(words) < 2:
        raise UsageError(
            f"expected a base and fine-tuned models: fusionkit {verb} BASE FINETUNED… [options]; "
            f"got {f'{words[0]!r} alone' if words else 'neither'}"
        )
    base = located(words[0])
    return base, *named_models(words[1:], base)


def codec_of(text: str) -> tuple[str, DeltaCodec]:
    """A codec of a list: `svd`, or `svd:rank=32:dtype=int4`.

    What a codec needs, and is not given, is what it usually has (`DeltaCodec.usual`).

    Returns:
        how tables call it (`SVD 32 int4`), and the codec.

    Raises:
        UsageError, PluginError, CodecError: it is unknown, or does not take its settings.
    """
    name, *said = text.split(":")
    plugin: Any = registry.named(CODECS, name)
    settings = settings_of(plugin)
    options = [f"--{each}" for each in said]
    for each in said:
        if "=" not in each:
            raise UsageError(f"{text}: expected CODEC:SETTING=VALUE:…, got '{each}'")
    _refuse_unknown("codecs", options, {}, plugin, settings)
    _, values = _parsed(with_classes(options, settings), {}, plugin, (), complete=False)
    codec, called = _made(plugin, values)
    return called, codec


def _shown(setting: tuple[str, Any]) -> str:
    name, value = setting
    if isinstance(value, registry.Plugin):
        return type(value).__name__
    return str(value) if isinstance(value, str | float) or type(value) is int else f"{name}={value}"


def line_help(verb: str, summary: str, args: Sequence[str], own: Callable[..., Any]) -> str:
    """The help of such a verb, with the settings of the codec that the line names.

    Args:
        verb: the verb.
        summary: what it does.
        args: the command line after the verb.
        own: a function whose parameters are the verb's own options.
    """
    options = divided(args, ("--help", "-h", "--help-all"))[1]
    plugin = registry.named(CODECS, _codec_in(options, How) or DEFAULT_CODEC)
    lines = [
        f"usage: fusionkit {verb} BASE FINETUNED… [--codec CODEC] [--SETTING VALUE…] [options]",
        f"       fusionkit {verb} --config R.yaml [--model.SETTING VALUE…]",
        "",
        summary,
        "",
        *models_help(),
        "",
        *options_help(own),
        *options_help(How),
        "",
        f"settings of --codec {plugin.id} ('fusionkit codecs' lists all codecs):",
        *options_help(plugin, {*get_type_hints(own), *get_type_hints(How)}),
        "",
        f"with a recipe: 'fusionkit {verb} --config R.yaml --help' lists its settings; "
        "--print_config writes one.",
    ]
    return "\n".join(lines)


def as_list(patterns: list[str] | str | None) -> list[str]:
    """One pattern, several, or none, as a list."""
    return [patterns] if isinstance(patterns, str) else list(patterns or [])


def _codec_in(options: Sequence[str], how: type[How]) -> str | None:
    """The codec that a line names."""
    said = [each.partition("=")[2] for each in options if each.startswith("--codec=")]
    return said[-1] if said else how().codec


def _as_told(plugin: Any, values: dict[str, Any]) -> tuple[Any, str]:
    """A codec, and how tables call it."""
    return plugin(**values), " ".join([plugin.__name__, *map(_shown, values.items())])


def _made(plugin: Any, values: dict[str, Any]) -> tuple[Any, str]:
    """A codec as told, or else with what it usually has beside."""
    try:
        return _as_told(plugin, values)
    except (CodecError, TypeError):
        if not plugin.usual:
            raise
        return _as_told(plugin, {**plugin.usual, **values})


def _refuse_unknown(
    verb: str,
    options: Sequence[str],
    types: Mapping[str, Any],
    plugin: type[registry.Plugin] | None,
    settings: Mapping[str, Any],
) -> None:
    of = f" of {plugin.__name__}" if plugin else ""
    for each in options:
        name = each.partition("=")[0].lstrip("-")
        first = name.removeprefix("codec.").partition(".")[0]
        if first in settings or (name.partition(".")[0] in types and first == name):
            continue
        has = [f"{plugin.__name__} has {_options(settings)}"] if plugin and settings else []
        has += [f"'fusionkit {verb}' has {_options(types)}"] if types else []
        raise UsageError(
            f"no option '{name}'{of}{meant(first, [*settings, *types])}\n{'; '.join(has)}"
        )


def _options(names: Iterable[str]) -> str:
    return ", ".join(f"--{each}" for each in names)


def _parsed(
    options: Sequence[str],
    types: Mapping[str, Any],
    plugin: type[registry.Plugin] | None,
    others: Sequence[Callable[..., Any]],
    complete: bool = True,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the options say: of the verb's own, and those of the codec's settings that are given."""
    from jsonargparse import ArgumentError, ArgumentParser

    types_of = {} if plugin is None else settings_of(plugin)
    clashing = types_of.keys() & types.keys()
    apart = types_of.keys() - clashing
    parser = ArgumentParser(exit_on_error=False)
    for each in others:
        if isinstance(each, type):
            parser.add_class_arguments(each, skip={"codec"}, as_group=False)
        else:
            parser.add_function_arguments(each, as_group=False)
    if plugin is not None:
        parser.add_class_arguments(plugin, as_group=False, skip={*clashing}, fail_untyped=False)
        parser.add_class_arguments(plugin, "codec", skip={*apart}, as_group=True)
    plain = [
        each if _first(each) in clashing else each.replace("--codec.", "--", 1) for each in options
    ]
    for action in parser._actions:
        action.required = False  # what lacks is said below
    try:
        parsed = parser.parse_args(plain)
        made = parser.instantiate_classes(parsed, instantiate_groups=False).as_dict()
    except ArgumentError as error:
        raise UsageError(_wrong(str(error), plain, {**types_of, **types})) from error
    given = {_first(each) for each in plain}
    nested = made.pop("codec", {})
    values = {n: (nested if n in clashing else made)[n] for n in types_of if n in given}
    if plugin is not None and complete:
        _refuse_lacking(plugin, values, types_of, clashing)
    return {name: value for name, value in made.items() if name in types}, values


def _refuse_lacking(
    plugin: Any, values: Collection[str], types: Mapping[str, Any], clashing: Collection[str]
) -> None:
    """Refuse a codec without a setting that it needs."""
    for field in fields(plugin):
        if field.default is field.default_factory is MISSING and field.name not in values:
            name = f"codec.{field.name}" if field.name in clashing else field.name
            raise UsageError(f"{plugin.__name__} needs --{name}: {kind_of(types[field.name])}")


def _first(option: str) -> str:
    """The setting that an option says, or says something of."""
    return option.partition("=")[0].lstrip("-").removeprefix("codec.").partition(".")[0]


def _wrong(message: str, options: Sequence[str], types: Mapping[str, Any]) -> str:
    """What is wrong with an option's value, in a line."""
    match = re.search(r'Parser key "([\w.]+)"', message)
    key = match[1].removeprefix("codec.") if match else ""
    said = [each for each in options if _first(each) == key.partition(".")[0]]
    if key not in types or not said:
        return message
    value = said[-1].partition("=")[2]
    return f"--{key}: expected {kind_of(types[key])}, got '{value}'"
