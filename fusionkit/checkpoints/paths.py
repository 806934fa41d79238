"""Paths that recipes and calls may name: local, in an installed package, or anywhere by fsspec."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape as glob_escape
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from fusionkit.checkpoints.hub_cache import in_hub_cache
from fusionkit.checkpoints.hub_pins import pinned_url
from fusionkit.checkpoints.path_text import expanded, in_its_form, refuse_long_names
from fusionkit.errors import BundleError, FusionKitError

_SCHEME = "package:"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_remote(path: str | Path) -> bool:
    """Whether a path is an fsspec URL: `s3://…`, `hf://…`."""
    return _URL.match(str(path)) is not None


def open_path(path: str | Path) -> Path:
    """A path to read or write at, wherever it is.

    Args:
        path: of the local disk; `package:NAME/FOLDER`, the folder of an installed package; or an
            fsspec URL, for which `pip install 'fusionkit[remote]'` and what its protocol needs
            (`s3fs`, `huggingface_hub`, …) must be installed. `~`, `~user`, `$NAME` and `${NAME}`
            are written out. A local name that is there in another Unicode form alone is found.
            Of the Hugging Face Hub, what lies whole in its cache is read from there; what a lock
            file pins is the folder of that commit.

    Returns:
        a `pathlib.Path`; for a URL what acts like one.

    Raises:
        FusionKitError: the package, or what the URL needs, is not installed; there is no such
            variable or user; or a name is longer than file systems take.
    """
    if not isinstance(path, str) and is_remote(path):
        return path  # opened already
    path = written_out(str(path))
    if not is_remote(path):
        refuse_long_names(Path(path))
        return in_its_form(Path(path))
    if (cached := pinned_url(path) or in_hub_cache(path)) is not None:
        return cached
    try:
        from upath import UPath

        return cast(Path, UPath(path))
    except ImportError as error:
        missing = error.name if error.name and error.name != "upath" else "'fusionkit[remote]'"
        raise FusionKitError(f"{path}: needs more: {error}; pip install {missing}") from error
    except ValueError as error:
        raise FusionKitError(f"{path}: can't be opened ({error})") from error


def is_file_name(text: str) -> bool:
    """Whether a text, from a file that others wrote, names one beside that, and no path."""
    return Path(text).name == text and len(text.encode()) <= 255


def is_there(path: str | Path) -> bool:
    """Whether a path, wherever it is, leads to something: a file, a folder, or what a URL names.

    Raises:
        FusionKitError: nobody may look there; or as of `open_path`.
    """
    try:
        return open_path(path).exists()
    except PermissionError as error:
        raise FusionKitError(
            f"{path}: you may not look there ({error.strerror}); choose another place, or change "
            "the permissions of its folders"
        ) from error


def refuse_existing(path: str | Path, overwrite: bool, mend: str) -> None:
    """Refuse to write where something is already, unless it may be replaced.

    Args:
        path: where to write; of the local disk, or a URL.
        overwrite: it may be replaced.
        mend: what the caller can do about it.

    Raises:
        BundleError: something is there.
        FusionKitError: as of `open_path`.
    """
    if not overwrite and is_there(path):
        raise BundleError(f"{path}: exists; {mend}")


def written_out(path: str) -> str:
    """A path, a URL or a name on a hub, with `~` and environment variables written out.

    `package:NAME/FOLDER` becomes the folder of the installed package; nothing else is changed.

    Raises:
        FusionKitError: the package is not installed, or there is no such variable or user.
    """
    path = expanded(path)
    if not path.startswith(_SCHEME):
        return path
    name, _, inside = path.removeprefix(_SCHEME).partition("/")
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FusionKitError(
            f"{path}: no package '{name}' is installed; pip install {name.replace('_', '-')}"
        )
    return str(Path(spec.submodule_search_locations[0]) / inside)


def glob_remote(pattern: str) -> list[str]:
    """What a URL's one `*` stands for, sorted."""
    first, _, tail = pattern.partition("*")
    before: Any = open_path(first + "x")
    if is_remote(before):
        head = before.path[:-1]
        found = [str(each) for each in before.fs.glob(f"{head}*{tail}")]
    else:  # a pinned commit's folder
        head = str(before)[:-1]
        found = glob(f"{glob_escape(head)}*{glob_escape(tail)}")
    return sorted(each[len(head) : len(each) - len(tail) or None] for each in found)


def local_copy(path: Path, key: str) -> Path:
    """A file as one of the local disk: itself, or what was fetched of it.

    Args:
        path: the file.
        key: tells its content; what was fetched once under a key is not fetched again.
    """
    if not is_remote(path):
        return path
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fusionkit" / "remote"
    copy = cache / f"{key}-{path.name[-64:]}"  # short enough for any file system
    if not copy.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            fetched = Path(temporary) / "fetched"
            copy_file(path, fetched)
            fetched.replace(copy)
    return copy


@contextmanager
def network_errors() -> Iterator[None]:
    """A context in which whatever a URL's client raises is an error of the system.

    Raises:
        OSError: it can't be reached, or no longer.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # of any kind
        raise OSError(f"{type(error).__name__}: {error}") from error


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, from and to wherever it is.

    Raises:
        OSError: it can't be read, or written.
    """
    if not is_remote(source) and not is_remote(target):
        shutil.copyfile(source, target)  # within the kernel, where it can
        return
    with network_errors(), source.open("rb") as read, target.open("wb") as written:
        shutil.copyfileobj(read, written, 1 << 24)


def upload(folder: Path, target: Path, last: str) -> None:
    """Copy a folder's files to a remote one.

    Args:
        folder: of the local disk.
        target: where to.
        last: the file that says the others are there.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == last):
        copy_file(path, target / path.name)
