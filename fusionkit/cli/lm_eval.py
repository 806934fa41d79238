"""`fusionkit lm_eval`."""

import sys
from importlib import import_module

from fusionkit.errors import FusionKitError
from fusionkit.tasks.harness import INSTALL

_OWN = ("ls", "validate", "-h", "--help")
"""What lm-eval's command does without a model."""


def run(args: list[str]) -> None:
    """lm-eval's own command, which knows the model `fusionkit`, and has it by default.

    Raises:
        FusionKitError: lm-eval is not installed.
    """
    try:
        command = import_module("lm_eval.__main__").cli_evaluate
        import_module("fusionkit.reuse.lm_eval")
    except ImportError as error:
        raise FusionKitError(f"it needs lm_eval ({error}); {INSTALL}") from error
    told = any(each.partition("=")[0] in ("--model", "-M", "--config", "-C") for each in args)
    if args and args[0] not in _OWN and not told:
        args = [*args, "--model", "fusionkit"]
    sys.argv = ["lm_eval", *args]
    command()
