"""The command line: one verb a file, `fusionkit/cli/<verb>.py`, imported when it is asked for."""

import sys
from importlib import import_module

from fusionkit.errors import FusionKitError

OVERVIEW = """usage: fusionkit VERB [options]      (fusionkit VERB --help says more)

with a recipe (--config R.yaml; every setting can be overridden on the command line):
  compress   compress fine-tuned checkpoints into a bundle
  calibrate  compress, with a few scalars per task learned on a few rows
  test       score every task, from a bundle or compressed on the fly
  compare    score several codecs over the same checkpoints: table, CSV, plot
  sweep      sizes and weight errors of codecs over their settings, without data
  fit        fine-tune one task: in full, a LoRA, a linearized LoRA, or (IA)³
  fuse       train families of adapters, fuse every set of tasks: table, CSV, plot

on a bundle:
  inspect    show what a bundle holds
  export     write one task's whole model to a file, or its delta as a PEFT adapter

without input:
  demo       the whole way on a small family of vision models, made on the spot
  codecs     list the installed codecs and merges
"""

VERBS = (
    *("compress", "calibrate", "test", "compare", "sweep", "fit", "fuse"),
    *("inspect", "export", "demo", "codecs"),
)
"""What `fusionkit` can do: each a file of that name, whose `run` takes the arguments after it."""


def main(args: list[str] | None = None) -> None:
    """Run `fusionkit VERB …`; bad input ends with one clear message and exit code 1."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print(OVERVIEW, end="")
        return
    verb, rest = args[0], args[1:]
    if verb not in VERBS:
        print(f"fusionkit: no verb '{verb}'\n\n{OVERVIEW}", file=sys.stderr, end="")
        sys.exit(2)
    try:
        import_module(f"fusionkit.cli.{verb}").run(rest)
    except FusionKitError as error:
        print(f"fusionkit {verb}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"fusionkit {verb}: interrupted; nothing was left half-written", file=sys.stderr)
        sys.exit(130)
