"""Where a repository's pinned commit lies: what the lock in force says, as a folder here.

All that opens names on the Hub asks here first. A pinned repository is a folder of Hugging Face's
cache, which every library opens as it opens any folder: so the commit is the locked one, and
nothing more is asked of the network.
"""

import warnings
from pathlib import Path

from fusionkit.checkpoints.hub_download import absent, cut_short, download, snapshot
from fusionkit.checkpoints.hub_lock import Locked, lock_in_force
from fusionkit.checkpoints.hub_names import Repository, of_url
from fusionkit.errors import HubError, in_line


class UnpinnedWarning(UserWarning):
    """A repository is opened that the lock file does not name."""


def pinned(name: Repository) -> tuple[Path, Locked] | None:
    """The folder of a repository's pinned commit, and what is locked of it.

    What is not in the cache yet is downloaded.

    Args:
        name: the repository.

    Returns:
        None where no lock is in force, or it does not name the repository.

    Raises:
        HubError: the commit can't be had, or a file of it is damaged.
    """
    said = lock_in_force()
    if said is None:
        return None
    path, lock = said
    locked = lock.get(name)
    if locked is None:
        warnings.warn(
            f"{name}: {path} does not name it, so its newest commit is read; pin it, too: "
            f"{fetch_line(path)}",
            UnpinnedWarning,
            stacklevel=2,
        )
        return None
    return _whole(name, locked, path), locked


def pinned_url(url: str) -> Path | None:
    """The file or folder that a URL of the Hub means at its pinned commit; None of another."""
    named = of_url(url)
    found = named and pinned(named[0])
    return found[0] / named[1] if named and found else None


def pinning(name: Repository) -> Path | None:
    """The lock file in force, where it names a repository."""
    said = lock_in_force()
    return said[0] if said and said[1].get(name) else None


def fetch_line(lock: Path) -> str:
    """The command that wrote a lock file."""
    recipe = lock.name.removesuffix(".lock.yaml") + ".yaml"
    return f"fusionkit fetch --config {lock.with_name(recipe)}"


def _whole(name: Repository, locked: Locked, lock: Path) -> Path:
    """The folder of a locked commit, with all its files, each of the size that it must have.

    Raises:
        HubError: it is not to be had.
    """
    if missing := absent(name, locked):
        try:
            download(name, locked.commit, missing, update=f"{fetch_line(lock)} --update")
        except HubError as error:
            raise HubError(
                f"{error}\n{lock} pins {name} at {locked.commit[:12]}, and the cache has no "
                f"{in_line(missing, 3)} of it; before a run offline: {fetch_line(lock)}"
            ) from error
    if wrong := cut_short(name, locked):
        raise HubError(
            f"{name}: damaged in the cache: {next(iter(wrong.values()))}; fetch it again: "
            f"{fetch_line(lock)}"
        )
    return snapshot(name, locked.commit)
