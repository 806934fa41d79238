"""Files of the Hub in Hugging Face's cache: whether they are there, whole; how they come there.

Everything goes through huggingface_hub: its cache, its credentials, its environment variables. It
resumes what was cut off, and keeps a file that several commits share once.
"""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from errno import ENOSPC
from pathlib import Path

from fusionkit.checkpoints.hub_lock import Locked, LockedFile
from fusionkit.checkpoints.hub_names import Repository
from fusionkit.errors import FusionKitError, HubError, of_extra

_PIECE = 1 << 20


def snapshot(name: Repository, commit: str) -> Path:
    """The folder of a repository's commit in the cache, which need not be there."""
    return _storage(name) / "snapshots" / commit


def reference_of(name: Repository) -> Path:
    """The file in the cache that says which commit a name's branch or tag was at."""
    return _storage(name) / "refs" / (name.revision or "main")


def cache_folder() -> Path:
    """Hugging Face's cache."""
    hub = of_extra("huggingface_hub", "text", "the Hugging Face Hub")
    return Path(hub.constants.HF_HUB_CACHE)


def absent(name: Repository, locked: Locked) -> list[str]:
    """The files that are not in the commit's folder in the cache."""
    folder = snapshot(name, locked.commit)
    return [file for file in locked.files if not (folder / file).exists()]


def bytes_to_download(name: Repository, locked: Locked) -> int:
    """Of files that are not in the cache, of this commit or another, or are cut short there."""
    blobs, wrong = _storage(name) / "blobs", cut_short(name, locked)
    return sum(
        each.size
        for file, each in locked.files.items()
        if file in wrong
        or not (
            (snapshot(name, locked.commit) / file).exists()
            or (blobs / (each.sha256 or each.blob or "none")).is_file()
        )
    )


def cut_short(name: Repository, locked: Locked) -> dict[str, str]:
    """Files in the cache of another size than is locked → what is wrong with each."""
    folder, found = snapshot(name, locked.commit), {}
    for file, each in locked.files.items():
        there = folder / file
        if there.exists() and (size := there.stat().st_size) != each.size:
            found[file] = f"{there} has {size:,} bytes, and {each.size:,} are locked"
    return found


def damaged(
    name: Repository, locked: Locked, files: Collection[str] | None = None
) -> dict[str, str]:
    """Files in the cache that are not what is locked, to the byte → what is wrong with each.

    Args:
        name: the repository.
        locked: what is locked of it.
        files: which are looked at; by default all.
    """
    folder, found = snapshot(name, locked.commit), cut_short(name, locked)
    for file in locked.files if files is None else files:
        there, each = folder / file, locked.files[file]
        if file in found or not there.exists():
            continue
        said, is_ = each.sha256 or each.blob, _hash(there, each)
        if said != is_:
            kind = "SHA-256" if each.sha256 else "Git id"
            found[file] = f"{there} has the {kind} {is_[:12]}…, and {str(said)[:12]}… is locked"
    return found


def download(
    name: Repository, commit: str, files: Sequence[str], update: str, anew: bool = False
) -> None:
    """Download files of a commit, unless they are in the cache.

    Args:
        name: the repository.
        commit: which.
        files: their paths in it.
        update: the command that takes a newer commit.
        anew: replace what is in the cache.

    Raises:
        HubError: they can't be had.
    """
    hub = of_extra("huggingface_hub", "text", "the Hugging Face Hub")
    if anew:
        for file in files:
            _forget(snapshot(name, commit) / file)
    with hub_errors(name, commit, update):
        # `[` and `*` in a file's own name would be a pattern's
        patterns = [file.translate({ord(c): f"[{c}]" for c in "[*?"}) for file in files]
        hub.snapshot_download(
            name.name, repo_type=name.kind, revision=commit, allow_patterns=patterns
        )


def point_at(name: Repository, commit: str) -> None:
    """Have whoever asks the cache for the repository by name, without a network, get a commit."""
    ref = reference_of(name)
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit)


@contextmanager
def hub_errors(name: Repository, commit: str = "", update: str = "") -> Iterator[None]:
    """A context that says in plain words why a repository can't be had.

    Args:
        name: the repository.
        commit: which was asked for, where one is pinned.
        update: the command that takes a newer one.

    Raises:
        HubError: it can't be had.
    """
    try:
        yield
    except FusionKitError:
        raise
    except Exception as error:  # what clients of the network raise is of any kind
        raise HubError(f"{name}: {_reason(name, commit, update, error)}") from error


def _reason(name: Repository, commit: str, update: str, error: BaseException) -> str:
    from huggingface_hub import errors

    causes = _causes(error)
    page = f"https://huggingface.co/{'datasets/' * (name.kind == 'dataset')}{name.name}"
    kind = "data set" if name.kind == "dataset" else "model"
    said = " ".join(str(error).split())[:300]

    def of(*kinds: type[BaseException]) -> bool:
        return any(isinstance(each, kinds) for each in causes)

    if of(errors.GatedRepoError):
        reason = (
            f"is gated: its owners say who may read it; ask for access at {page}, log in (hf auth "
            "login, or HF_TOKEN=…), and give the command again"
        )
    elif of(errors.RevisionNotFoundError) and commit:
        reason = (
            f"has no commit {commit} any more, which is locked: its history was rewritten; take "
            f"its newest: {update}"
        )
    elif of(errors.RevisionNotFoundError):
        reason = f"has no branch, tag or commit '{name.revision}'; look at {page}/commits/main"
    elif of(errors.RepositoryNotFoundError):
        reason = (
            f"there is no {kind} of that name on the Hub, or it is private, and no folder here; "
            "check the name or the path, and for what is not public log in: hf auth login"
        )
    elif any(getattr(each, "errno", None) == ENOSPC for each in causes):
        reason = "the disk is full; make room, or set HF_HOME to a folder on another disk"
    elif of(ConnectionError, errors.LocalEntryNotFoundError):
        reason = f"the Hub can't be reached ({said}); check the network, and HF_HUB_OFFLINE"
    else:
        reason = f"can't be had of the Hub ({type(error).__name__}: {said}); check the network"
    return reason


def _causes(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        found.append(cause)
        cause = cause.__cause__ or cause.__context__
    return found


def _storage(name: Repository) -> Path:
    return cache_folder() / f"{name.kind}s--{name.name.replace('/', '--')}"


def _forget(file: Path) -> None:
    """Take a file out of the cache, and what it is a link to."""
    if file.is_symlink():
        file.resolve().unlink(missing_ok=True)
    file.unlink(missing_ok=True)


def _hash(file: Path, like: LockedFile) -> str:
    """A file's SHA-256; of one that is not of LFS its id in Git."""
    made = hashlib.sha256() if like.sha256 else hashlib.sha1(usedforsecurity=False)
    if not like.sha256:
        made.update(b"blob %d\0" % file.stat().st_size)
    with file.open("rb") as read:
        while piece := read.read(_PIECE):
            made.update(piece)
    return made.hexdigest()
