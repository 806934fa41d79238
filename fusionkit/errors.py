"""FusionKit's errors: one class per cause, each message says what, where and the mend."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any


class FusionKitError(Exception):
    """Base class of every error that FusionKit raises on purpose."""


class CheckpointError(FusionKitError):
    """A checkpoint can't be read: missing, damaged, of an unknown kind, or an unsafe pickle."""


class FamilyError(FusionKitError):
    """Base and fine-tuned checkpoints don't fit together: names, shapes, dtypes or values."""


class CodecError(FusionKitError):
    """A codec or merge was given settings or values that it can't handle."""


class RangeError(CodecError):
    """A value is too large for the dtype that a codec is to store it in."""


class PluginError(FusionKitError):
    """A codec or merge is not installed, fails to import, or is claimed by two distributions."""


class BundleError(FusionKitError):
    """A bundle is damaged, of another format version, or does not hold what is asked for.

    Also raised for any file or folder, a fine-tune's or an export's as well, that can't be
    written: something is in its way, another run is writing there, or the disk refuses.
    """


class SignatureError(BundleError):
    """A bundle is not signed by the key that it is to be verified by, or was changed since."""


class WrongBaseError(BundleError):
    """The base model at hand is not the one that the bundle was made from."""


class ProcessError(FusionKitError):
    """Another process of a distributed run failed, or has ended."""


class UsageError(FusionKitError):
    """A command line has an option that there is not, or a value that the option does not take."""


class DataError(FusionKitError):
    """A data set can't be read: a missing file, array or label, or a malformed row."""


class HubError(FusionKitError):
    """A repository of the Hub can't be had as it is asked for.

    It is missing, gated or damaged, its commit is gone, or there is no network, or no room.
    """


class RequestError(FusionKitError):
    """A request to the server's engine can't be answered as it stands; the message says why."""


class TaskGoneError(FusionKitError):
    """A request's task was removed while the request waited or ran."""


class UnknownTaskError(FusionKitError):
    """A request names a task that is not served."""


class QueueFullError(FusionKitError):
    """As many requests wait as may; the request was not taken."""


class StoppedError(FusionKitError):
    """The engine takes no requests any more, or stopped before it had answered this one."""


class MissingExtraError(FusionKitError):
    """Something is asked for that a package does which only one of FusionKit's extras installs."""


def of_extra(module: str, extra: str, what: str) -> Any:
    """A module that one of FusionKit's extras installs, imported.

    Args:
        module: its name.
        extra: of FusionKit's distribution.
        what: what needs it, as the message calls it.

    Raises:
        MissingExtraError: it is not installed; says which line installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{what} needs more: {error}; pip install 'fusionkit[{extra}]'"
        ) from error


def listing(items: list[str], limit: int = 8) -> str:
    """Join findings line by line, at most `limit` of them, and say how many were left out."""
    shown = "".join(f"\n  - {item}" for item in items[:limit])
    more = len(items) - limit
    return shown + (f"\n  - … and {more} more" if more > 0 else "")


def in_line(names: Sequence[str], limit: int = 6) -> str:
    """Names with commas between, at most `limit` of them, and how many were left out."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f", … and {more} more" if more > 0 else "")


def size(nbytes: float) -> str:
    """Bytes in the unit that reads best (powers of 1000, as disks count)."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


def meant(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'rank'?`, where one of the known words is close; else nothing.

    Args:
        word: what was written.
        known: what could have been.
    """
    names = {name.lower(): name for name in known}
    close = get_close_matches(word.lower(), names, n=3, cutoff=0.6)
    close.sort(key=lambda name: sorted(name) != sorted(word.lower()))  # letters changed places
    return f"; did you mean '{names[close[0]]}'?" if close else ""


def lacks(place: str, task: str, tasks: Sequence[str]) -> str:
    """That a bundle, or a family, has no such task, and which it has.

    Args:
        place: what lacks it.
        task: its name, as it was asked for.
        tasks: those that are there.
    """
    return f"{place} has no task '{task}'; it has {in_line(tasks, 20)}{meant(task, tasks)}"
