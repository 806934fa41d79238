"""A verb over models that its command line names: `fusionkit VERB BASE FINETUNED… [--codec …]`."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_type_hints

from fusionkit import registry
from fusionkit.checkpoints.adapters.modules import Adapters
from fusionkit.cli.help import kind_of, option, options_help
from fusionkit.cli.named_codec import CODECS, settings_of, with_classes
from fusionkit.cli.named_models import located, named_models
from fusionkit.cli.words import divided, with_values
from fusionkit.codecs.base import DeltaCodec
from fusionkit.errors import UsageError, meant

DEFAULT_CODEC = "sketch"
_OF_DEFAULT = {"bits": 0.1}
"""What the default codec is given, where nothing else says how much to keep."""


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
    """

    codec: str = DEFAULT_CODEC
    private: list[str] | str | None = None
    frozen: list[str] | str | None = None
    adapters: Adapters = "merged"
    rename: dict[str, str] | None = None
    ignore: list[str] | str | None = None


@dataclass(frozen=True)
class Line:
    """A line, understood.

    Attributes:
        base: the base's path.
        finetuned: task → path.
        codec: the codec.
        how: what else was said.
        left_out: what globs found, and is no model.
        own: the verb's own options.
    """

    base: str
    finetuned: dict[str, str]
    codec: DeltaCodec
    how: How
    left_out: tuple[str, ...]
    own: Mapping[str, Any]


def parse_line(verb: str, args: Sequence[str], own: Callable[..., Any]) -> Line:
    """Understand a line; nothing is read of the models yet but where they are.

    Args:
        verb: how the errors call it.
        args: the command line after the verb.
        own: a function whose parameters are the verb's own options.

    Raises:
        UsageError: an option is unknown, or of the wrong type; or no model is named.
        PluginError, CodecError: the codec is unknown, or does not take its settings.
        CheckpointError, FamilyError: nothing is at a path; two tasks have one name.
    """
    types = {**get_type_hints(own), **get_type_hints(How)}
    types.pop("return", None)
    flags = [name for name, hint in types.items() if hint is bool]
    words, options = divided(with_values(args, flags))
    codec_name = _codec_in(options)
    plugin = registry.named(CODECS, codec_name)
    settings = settings_of(plugin)
    _refuse_unknown(verb, options, types, plugin.__name__, settings)
    rest = [each for each in options if not each.startswith("--codec=")]
    told, values = _parsed(with_classes(rest, settings), types, plugin, own)
    if len(words) < 2:
        raise UsageError(
            f"expected a base and fine-tuned models: fusionkit {verb} BASE FINETUNED… [options]; "
            f"got {f'{words[0]!r} alone' if words else 'neither'}"
        )
    base = located(words[0])
    finetuned, left_out = named_models(words[1:], base)
    codec: Any = plugin(**_with_default(plugin.id, values))
    how = How(codec_name, **{name: told[name] for name in get_type_hints(How) if name != "codec"})
    extra = {name: told[name] for name in get_type_hints(own) if name in told}
    return Line(base, finetuned, codec, how, tuple(left_out), extra)


def line_help(verb: str, summary: str, args: Sequence[str], own: Callable[..., Any]) -> str:
    """The help of such a verb, with the settings of the codec that the line names.

    Args:
        verb: the verb.
        summary: what it does.
        args: the command line after the verb.
        own: a function whose parameters are the verb's own options.
    """
    plugin = registry.named(CODECS, _codec_in(divided(args, ("--help", "-h", "--help-all"))[1]))
    lines = [
        f"usage: fusionkit {verb} BASE FINETUNED… [--codec CODEC] [--SETTING VALUE…] [options]",
        f"       fusionkit {verb} --config R.yaml [--model.SETTING VALUE…]",
        "",
        summary,
        "",
        *option("BASE", "the base model: a folder, a file, a URL, or ORG/NAME on the Hub"),
        *option(
            "FINETUNED…",
            "models fine-tuned from it, whole or as adapters, likewise; globs; NAME=PATH says "
            "what a task is called",
        ),
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


def _codec_in(options: Sequence[str]) -> str:
    """The codec that a line names."""
    said = [each.partition("=")[2] for each in options if each.startswith("--codec=")]
    return said[-1] if said else DEFAULT_CODEC


def _with_default(name: str, values: dict[str, Any]) -> dict[str, Any]:
    if name == DEFAULT_CODEC and not {"bits", "bytes", "noise"} & values.keys():
        return {**_OF_DEFAULT, **values}
    return values


def _refuse_unknown(
    verb: str,
    options: Sequence[str],
    types: Mapping[str, Any],
    codec: str,
    settings: Mapping[str, Any],
) -> None:
    for each in options:
        name = each.partition("=")[0].lstrip("-")
        first = name.removeprefix("codec.").partition(".")[0]
        if first in settings or (name.partition(".")[0] in types and first == name):
            continue
        raise UsageError(
            f"no option '{name}' of {codec}{meant(first, [*settings, *types])}\n"
            f"{codec} has {', '.join(f'--{each}' for each in settings)}; 'fusionkit {verb}' has "
            + ", ".join(f"--{each}" for each in types)
        )


def _parsed(
    options: Sequence[str], types: Mapping[str, Any], plugin: Any, own: Callable[..., Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the options say: of the verb's own, and those of the codec's settings that are given."""
    from jsonargparse import ArgumentError, ArgumentParser

    types_of = settings_of(plugin)
    clashing = types_of.keys() & types.keys()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(own, as_group=False)
    parser.add_class_arguments(How, skip={"codec"}, as_group=False)
    parser.add_class_arguments(plugin, as_group=False, skip={*clashing}, fail_untyped=False)
    others = types_of.keys() - clashing
    parser.add_class_arguments(plugin, "codec", skip={*others}, as_group=True)
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
    values = {n: nested[n] for n in clashing & given}
    values |= {name: made[name] for name in others & given}
    for field in fields(plugin):
        if field.default is field.default_factory is MISSING and field.name not in values:
            name = f"codec.{field.name}" if field.name in clashing else field.name
            raise UsageError(f"{plugin.__name__} needs --{name}: {kind_of(types_of[field.name])}")
    return {name: value for name, value in made.items() if name in types}, values


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
