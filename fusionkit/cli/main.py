"""The command line: one verb a file, `fusionkit/cli/<verb>.py`, imported when it is asked for."""

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version

from fusionkit.errors import FusionKitError, UsageError, meant

GROUPS = {
    "on models (BASE FINETUNED…: paths, globs, names on a hub), or a recipe (--config R.yaml)": {
        "compress": "compress fine-tuned models into a bundle",
        "test": "score every task, from a bundle or compressed on the fly",
        "validate": "the same on the validation rows",
        "predict": "what each task's model says of each row, as CSV or Parquet",
        "compare": "score several codecs over the same checkpoints: table, CSV, plot",
    },
    "with a recipe (--config R.yaml; every setting can be overridden on the command line)": {
        "calibrate": "compress, with a few scalars per task learned on a few rows",
        "sweep": "sizes and weight errors of codecs over their settings, without data",
        "fit": "fine-tune one task: in full, a LoRA, a linearized LoRA, or (IA)³",
        "fetch": "download what it reads of the Hub, and pin it: R.lock.yaml",
        "fuse": "train families of adapters, fuse every set of tasks: table, CSV, plot",
    },
    "on a bundle (--key RWQ…, of minisign: refuse it unless it is signed by that key)": {
        "inspect": "show what a bundle holds",
        "export": "write one task's whole model to a file, or its delta as a PEFT adapter",
        "chat": "talk to a task's language model, and switch among them",
        "generate": "have a task's language model answer the prompts of a file",
        "route": "make what picks the task of a request that names none",
        "serve": "answer over HTTP: OpenAI's API, or POST /predict, for all tasks at once",
        "sign": "sign it with a secret key of minisign",
        "push": "put it on the Hugging Face Hub, with a model card",
        "pull": "get it from there, or one of its tasks",
        "add": "add fine-tuned models to a bundle",
        "remove": "take tasks out of a bundle",
        "lm_eval": "lm-eval's own command, with a bundle's task as its model",
    },
    "without input": {
        "demo": "the whole way on a small family of vision models, made on the spot",
        "codecs": "list the installed codecs and merges; of one, its settings and how to use it",
    },
}
"""What `fusionkit` can do: each a file of that name, whose `run` takes the arguments after it."""

_GO_ON = ("compare", "compress", "fetch")
_WRITING = ("add", "compress", "export", "fetch", "pull", "push", "remove", "sign", "sweep")
VERBS = tuple(verb for verbs in GROUPS.values() for verb in verbs)
_VARIABLES = ("FUSIONKIT_LOCK", "FUSIONKIT_PUBLIC_KEY")
"""Environment variables that a command sets for what it calls, and for itself alone."""
# Not subcommands of jsonargparse: it would have to build every verb's parser to print one line.


def main(args: list[str] | None = None) -> None:
    """Run `fusionkit VERB …`; bad input ends with one clear message and exit code 1."""
    args = sys.argv[1:] if args is None else args
    if args[:1] == ["help"]:
        args = [*args[1:2], "--help"]
    if not args or args[0] in ("-h", "--help"):
        print(overview(), end="")
        return
    if args[0] == "--version":
        print(f"fusionkit {version('fusionkit')}")
        return
    verb, rest = args[0], args[1:]
    if verb == "--completion":
        verb, rest = "completion", [*(rest[:1] or [""]), *VERBS]
    elif verb not in VERBS:
        what = f"fusionkit: no verb '{verb}'{meant(verb, VERBS)}"
        print(f"{what}\n\n{overview()}", file=sys.stderr, end="")
        sys.exit(2)
    if "" not in sys.path and "." not in sys.path:
        sys.path.append("")  # class paths of recipes may be in the folder where one is
    warnings.formatwarning = _note
    before = {name: os.environ.get(name) for name in _VARIABLES}
    try:
        if verb != "sign":
            rest = _without_key(rest)
        with _ending_in_order(verb):
            import_module(f"fusionkit.cli.{verb}").run(rest)
            sys.stdout.flush()
    except FusionKitError as error:
        print(f"fusionkit {verb}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except BrokenPipeError:  # who reads what is printed has seen enough, as `| head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt as error:
        ended = isinstance(error, _Ended)
        more = "; the same command goes on from what was finished" * (verb in _GO_ON)
        print(
            f"fusionkit {verb}: {'ended' if ended else 'interrupted'}; nothing was left "
            f"half-written{more}",
            file=sys.stderr,
        )
        sys.exit(128 + (signal.SIGTERM if ended else signal.SIGINT))
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


class _Ended(KeyboardInterrupt):
    """The system, or a scheduler, ends the process: as Ctrl-C does, in order."""


@contextmanager
def _ending_in_order(verb: str) -> Iterator[None]:
    """A context in which SIGTERM is as Ctrl-C; where something is trained, it is Lightning's."""

    def end(number: int, frame: object) -> None:
        raise _Ended

    if verb not in _WRITING or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _without_key(args: list[str]) -> list[str]:
    """A line without `--key KEY`, which all verbs have; whatever opens a bundle then heeds it."""
    left = []
    words = iter(args)
    for word in words:
        if word == "--key" or word.startswith("--key="):
            key = next(words, None) if word == "--key" else word.partition("=")[2]
            if key is None:
                raise UsageError("--key: give minisign's public key, RWQ…, or its file")
            os.environ["FUSIONKIT_PUBLIC_KEY"] = key
        else:
            left.append(word)
    return left


def overview() -> str:
    """All verbs, each in a line."""
    groups = [
        f"{title}:\n" + "".join(f"  {verb:<9}  {what}\n" for verb, what in verbs.items())
        for title, verbs in GROUPS.items()
    ]
    usage = "usage: fusionkit VERB …      (fusionkit VERB --help says more)"
    shell = "fusionkit --version; fusionkit --completion bash|zsh: a script that completes words"
    return "\n".join([usage + "\n", *groups, shell + "\n"])


def _note(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """A warning as a user reads it: what, not where in which file; of other libraries as ever."""
    if issubclass(category, UserWarning) and "/fusionkit" in filename.replace("\\", "/"):
        return f"note: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"
