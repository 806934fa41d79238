"""What libraries are given for a model or data set: a folder here, or its name on the Hub."""

import re
from pathlib import Path

from fusionkit.checkpoints.hub_lock import Locked
from fusionkit.checkpoints.hub_names import Repository, Use, of_library
from fusionkit.checkpoints.hub_pins import pinned
from fusionkit.checkpoints.paths import is_there, written_out

_PLAIN = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
_FILE = re.compile(r"[^:]*\.(?:json|jsonl|csv|tsv|txt|gz|npz|zip|parquet|arrow|ya?ml)")


def model_place(path: str) -> str:
    """What transformers and open_clip take for a model.

    Args:
        path: a folder, `package:NAME/FOLDER`, or a name on the Hub: `OWNER/NAME`, or, for
            open_clip, `open_clip:hf-hub:OWNER/NAME`.

    Returns:
        the path, written out; of a pinned name the folder of its commit.

    Raises:
        FusionKitError: the package is not installed, there is no such variable or user, or the
            pinned commit can't be had.
    """
    place = written_out(path)
    if named := of_library(place):
        found = pinned(named[0]) if named[1] is Use.OPEN_CLIP else None
        return f"{place.partition(':')[0]}:local-dir:{found[0]}" if found else place
    name = named_model(place)
    found = pinned(name) if name else None
    return str(found[0]) if found else place


def dataset_place(path: str) -> tuple[Path, Locked, str] | None:
    """The folder of a data set's pinned commit, what is locked of it, and the configuration.

    Args:
        path: `OWNER/NAME` or `OWNER/NAME:CONFIG`.

    Returns:
        None of what is not pinned.

    Raises:
        HubError: the pinned commit can't be had.
    """
    named = named_dataset(path)
    found = pinned(named[0]) if named else None
    return (*found, named[1]) if named and found else None


def named_model(path: str) -> Repository | None:
    """The repository that a path means to transformers; None where it leads to something here."""
    if _PLAIN.fullmatch(path) is None or is_there(path):
        return None
    return Repository(path)


def named_dataset(path: str) -> tuple[Repository, str] | None:
    """The repository, and the configuration, that a path of rows means; None of what is here."""
    name, _, config = path.partition(":")
    owner, slash, _ = name.partition("/")
    if not slash or _PLAIN.fullmatch(name) is None or _FILE.fullmatch(name):
        return None
    return None if is_there(path) or Path(owner).exists() else (Repository(name, "dataset"), config)
