"""The help of a verb that takes a recipe: what the verb reads itself, or all that there is."""

from collections.abc import Iterable, Sequence
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from fusionkit.cli.help import option, options_help, parameter

ASK = ("--help", "-h", "--help-all")
_ELSEWHERE = {
    "checkpoint": "Lightning's ModelCheckpoint's: dirpath, every_n_epochs, …",
    "data": "the datamodule's, which differ by class: --data.help CLASS",
    "trainer": "the Lightning Trainer's: accelerator, devices, precision, max_epochs, …",
}
"""Sections that have their settings from Lightning, or from a class of the user's."""
_SAID = {
    "config": ("--config FILE", "the recipe; of several, a later one changes what is before it"),
    "print_config": ("--print_config", "print the recipe with all that it leaves out, and end"),
    "seed_everything": ("--seed_everything N", "the seed of what is random (default: 0)"),
}
_MANY = 12


class AllHelp(DefaultHelpFormatter):
    """Names the classes that a setting takes where they are few: a process has hundreds of some."""

    def _get_help_string(self, action: Any) -> str:
        text: str = super()._get_help_string(action)
        before, _, names = text.partition(", known subclasses: ")
        return text if names.count(",") < _MANY else f"{before})"


def recipe_help(
    parser: ArgumentParser, sections: Sequence[str], model: type | None, data: Iterable[str]
) -> str:
    """What a verb reads itself: its options, and the settings of its sections.

    Args:
        parser: has all its arguments.
        sections: those whose settings are listed.
        model: the class whose settings `model` has as a rule, where a recipe names the class.
        data: names of datamodules.
    """
    typed = [each for each in parser._actions if hasattr(each, "_typehint") and each.option_strings]
    settings = [each for each in typed if not each.dest.endswith(".help")]
    named = {each.dest for each in parser._actions}
    lines = [f"usage: {parser.usage}", "", parser.description or "", ""]
    for name, (spelled, meaning) in _SAID.items():
        lines += option(spelled, meaning) if name in named else []
    for each in settings:
        if "." not in each.dest and each.dest not in ("model", "data", *_SAID):
            lines += parameter(f"--{each.dest}", each._typehint, each.help, each.default)
    for section in sections:
        lines += ["", f"`{section}:` of the recipe"]
        if section == "model" and model is not None:
            lines += option(
                "--model CLASS", f"what is trained: of {model.__name__} the settings are"
            )
            lines += options_help(model, prefix="--model.")
        for each in settings:
            if each.dest.startswith(f"{section}."):
                lines += parameter(f"--{each.dest}", each._typehint, each.help, each.default)
    lines += ["", "other sections"]
    lines += option("--data CLASS", f"{', '.join(data)}, or a class path: my_module.MyData")
    for section, meaning in _ELSEWHERE.items():
        if any(each.startswith(f"{section}.") for each in named):
            lines += option(f"--{section}.SETTING", meaning)
    lines += [
        "",
        f"'{parser.prog} --help-all' lists all sections' settings; 'fusionkit codecs' the codecs;",
        "'fusionkit codecs CODEC' a codec's settings, each --model.codec.SETTING here.",
    ]
    return "\n".join(lines) + "\n"
