"""`fusionkit lm_eval`."""

import sys
from importlib import import_module

from fusionkit.errors import of_extra

_OWN = ("ls", "validate", "-h", "--help")
"""What lm-eval's command does without a model."""


def run(args: list[str]) -> None:
    """lm-eval's own command, which knows the model `fusionkit`, and has it by default.

    Raises:
        MissingExtraError: lm-eval is not installed.
    """
    of_extra("lm_eval", "harness", "this verb")
    import_module("fusionkit.reuse.lm_eval")
    told = any(each.partition("=")[0] in ("--model", "-M", "--config", "-C") for each in args)
    if args and args[0] not in _OWN and not told:
        args = [*args, "--model", "fusionkit"]
    sys.argv = ["lm_eval", *args]
    import_module("lm_eval.__main__").cli_evaluate()
