"""The Hugging Face Hub: files of a repository as they are needed, and a push in one commit.

Everything goes through huggingface_hub: its cache, its credentials, its environment variables. What
was downloaded lies in a snapshot folder, `models--OWNER--NAME/snapshots/COMMIT`: a bundle opened
there stays at that commit, and its tasks' files are fetched into it when they are first needed.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fusionkit.checkpoints.hub_pins import pinned_url
from fusionkit.checkpoints.model_folder import BESIDE
from fusionkit.errors import BundleError, FusionKitError

CARD = "README.md"
MARK = "<!-- written by fusionkit push; without this line it is left as it is -->"
"""In model cards that the next push may replace."""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_URL = re.compile(r"hf://(?:models/)?([^/@]+/[^/@]+)(?:@([^/]+))?/?")
_CACHED = "models--"
_WEIGHTS, _PICKLES = ("*.safetensors", "*.safetensors.index.json"), ("*.bin", "*.bin.index.json")


def is_name(text: str) -> bool:
    """Whether a text may be a repository's name: `OWNER/NAME`."""
    return _NAME.fullmatch(text) is not None


def in_cache(folder: Path) -> bool:
    """Whether a folder is a snapshot in Hugging Face's cache."""
    return folder.parent.name == "snapshots" and folder.parents[1].name.startswith(_CACHED)


def download(name: str, file: str, revision: str | None = None, cache: Path | None = None) -> Path:
    """Download a file of a repository, unless it is in the cache.

    Args:
        name: `OWNER/NAME`.
        file: the file's name there.
        revision: a branch, tag or commit.
        cache: the cache's folder; by default Hugging Face's own.

    Raises:
        BundleError: there is no such repository or file, or it can't be reached.
    """
    from huggingface_hub import hf_hub_download

    with _told(name, f"'{file}' can't be downloaded"):
        return Path(hf_hub_download(name, file, revision=revision, cache_dir=cache))


def fetched(path: Path) -> Path:
    """A file of a folder; of a snapshot in Hugging Face's cache, downloaded if it is not there.

    Raises:
        BundleError: it can't be downloaded.
    """
    if not isinstance(path, Path) or not in_cache(path.parent) or path.exists():
        return path
    name = path.parents[2].name.removeprefix(_CACHED).replace("--", "/")
    return download(name, path.name, path.parent.name, path.parents[3])


def base_in_cache(source: str) -> str:
    """A base's URL as a folder of Hugging Face's cache, downloaded as needed; others as they are.

    Args:
        source: `hf://OWNER/NAME`, or anything else.

    Raises:
        BundleError: it can't be downloaded.
    """
    match = _URL.fullmatch(source)
    if match is None:
        return source
    if folder := pinned_url(source):
        return str(folder)
    from huggingface_hub import snapshot_download

    with _told(match[1], "the base can't be downloaded"):
        for weights in (_WEIGHTS, _PICKLES):
            patterns = [*weights, *BESIDE]
            folder = Path(snapshot_download(match[1], revision=match[2], allow_patterns=patterns))
            if any(folder.glob(weights[0])):
                break
    return str(folder)


def name_of(source: str) -> str | None:
    """The repository that a URL is of; None of another path."""
    match = _URL.fullmatch(source)
    return match[1] if match else None


def push(
    name: str,
    files: Mapping[str, Path | bytes],
    stale: re.Pattern[str],
    message: str,
    private: bool = False,
) -> str:
    """Put files into a repository, in one commit: all of them, or none.

    A model card that someone else wrote stays as it is.

    Args:
        name: `OWNER/NAME`; it is made, if there is none.
        files: file's name there → content.
        stale: names of files that go in the same commit, unless they are among `files`.
        message: of the commit.
        private: a repository that is made is private.

    Returns:
        the commit's URL.

    Raises:
        BundleError: it can't be reached, may not be written to, or changed meanwhile; it is then as
            it was.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    if not is_name(name):
        raise BundleError(f"'{name}' is no name on the Hugging Face Hub; expected OWNER/NAME")
    api = HfApi(library_name="fusionkit")
    with _told(name, "could not be pushed to, and is as it was before"):
        api.create_repo(name, private=private, exist_ok=True)
        info = api.model_info(name)
        there = [each.rfilename for each in info.siblings or ()]
        left = {CARD} if CARD in there and not _is_ours(name, info.sha) else set()
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(file, content if isinstance(content, bytes) else str(content))
            for file, content in files.items()
            if file not in left
        ]
        gone = [file for file in there if stale.fullmatch(file) and file not in files]
        operations += [CommitOperationDelete(file) for file in gone]
        done = api.create_commit(
            name, operations, commit_message=message, parent_commit=info.sha or None
        )
    return str(done.commit_url)


def _is_ours(name: str, revision: str | None) -> bool:
    return MARK in download(name, CARD, revision).read_text(encoding="utf-8")


@contextmanager
def _told(name: str, what: str) -> Iterator[None]:
    """A context that says what could not be done with a repository.

    Raises:
        BundleError: it could not.
    """
    try:
        yield
    except FusionKitError:
        raise
    except Exception as error:  # what clients of the network raise is of any kind
        reason = " ".join(str(error).split())[:300]
        raise BundleError(
            f"{name}: {what} ({type(error).__name__}: {reason}); check the name and the network, "
            "and for what is not public log in: hf auth login"
        ) from error
