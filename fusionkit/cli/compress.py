"""`fusionkit compress`: of models that the command line names, or of a recipe."""

import re
from importlib import import_module

_RECIPE = re.compile(r"--(config(=|$)|(model|trainer|data)\.|help-all$)")


def run(args: list[str]) -> None:
    """Compress fine-tuned models into a bundle."""
    way = "recipe" if any(map(_RECIPE.match, args)) else "line"  # a line needs no Lightning
    import_module(f"fusionkit.cli.compress_{way}").run(args)
