"""A lock file: which commit of each repository of the Hub a recipe reads, and what its files are.

It lies beside the recipe, `R.lock.yaml` of `R.yaml`, in the order of its names, a line a file:

    version: 1
    models:
      openai/clip-vit-base-patch32:
        commit: 3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268
        reads: [model]
        files:
          config.json: {blob: 2ffb…, size: 4186}
          model.safetensors: {sha256: a63082…, size: 605157884}
    datasets: …

The commits are opened that the lock in force names: the environment variable FUSIONKIT_LOCK says
which that is, so that other processes know it, too; a recipe's command sets it.
"""

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import yaml
from msgspec import Meta, Struct, ValidationError, convert, field, to_builtins

from fusionkit.checkpoints.hub_names import Repository
from fusionkit.checkpoints.yaml_text import parsed_yaml
from fusionkit.errors import HubError

LOCK = "FUSIONKIT_LOCK"
"""The environment variable: the lock file in force."""
VERSION = 1
_HEAD = "# Written by `fusionkit fetch`: what the recipe reads of the Hub, to the byte.\n"

_Hex40 = Annotated[str, Meta(pattern=r"^[0-9a-f]{40}$")]
_Hex64 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
_File = Annotated[str, Meta(pattern=r"^(?!/)(?!(?:.*/)?\.\.(?:/|$))[^\\]+$")]
"""Within the repository."""


class LockedFile(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A file of a repository.

    Attributes:
        size: its bytes.
        sha256: of its content, where it is one of Git LFS.
        blob: its id in Git, where it is not.
    """

    size: int
    sha256: _Hex64 | None = None
    blob: _Hex40 | None = None


class Locked(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A repository at a commit.

    Attributes:
        commit: its name.
        reads: what the recipe reads of it, in words: what the files are chosen for.
        files: those, by their paths in the repository.
        splits: of a data set: configuration → split → its files.
    """

    commit: _Hex40
    reads: list[str]
    files: dict[_File, LockedFile]
    splits: dict[str, dict[str, list[_File]]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of all its files."""
        return sum(each.size for each in self.files.values())


class Lock(Struct, frozen=True, forbid_unknown_fields=True):
    """A lock file's content.

    Attributes:
        models: repository, as it is named → what is locked of it.
        datasets: likewise.
        version: of the format.
    """

    models: dict[str, Locked] = field(default_factory=dict)
    datasets: dict[str, Locked] = field(default_factory=dict)
    version: int = VERSION

    @classmethod
    def of(cls, locked: Mapping[Repository, Locked]) -> "Lock":
        """A lock of some repositories."""
        made = cls()
        for name, each in locked.items():
            made._section(name)[str(name)] = each
        return made

    def get(self, name: Repository) -> Locked | None:
        """What is locked of a repository; None where nothing is."""
        return self._section(name).get(str(name))

    def repositories(self) -> dict[Repository, Locked]:
        """All that is locked."""
        models = {Repository.of(name, "model"): each for name, each in self.models.items()}
        data = {Repository.of(name, "dataset"): each for name, each in self.datasets.items()}
        return {**models, **data}

    def text(self) -> str:
        """As the file has it."""
        content = to_builtins(self)
        lines = yaml.safe_dump(content, sort_keys=True, default_flow_style=None, width=1 << 20)
        return _HEAD + str(lines)

    def _section(self, name: Repository) -> dict[str, Locked]:
        return self.models if name.kind == "model" else self.datasets


def lock_beside(recipe: str | Path) -> Path:
    """The lock file of a recipe, which need not be there."""
    return Path(recipe).with_suffix(".lock.yaml")


def read_lock(path: Path) -> Lock:
    """Read a lock file.

    Raises:
        HubError: it can't be read, or is none.
    """
    try:
        content: Any = parsed_yaml(path.read_text(encoding="utf-8"), str(path))
        version = content.get("version") if isinstance(content, dict) else None
        if version != VERSION:
            raise HubError(
                f"{path}: is a lock file of version {version}, and this is read: {VERSION}; "
                "upgrade FusionKit, or delete the file and write it anew with 'fusionkit fetch'"
            )
        return convert(content, Lock)
    except (OSError, UnicodeError, yaml.YAMLError, ValidationError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise HubError(
            f"{path}: can't be read as a lock file ({said}); restore it, or delete it and write it "
            "anew with 'fusionkit fetch'"
        ) from error


def lock_in_force() -> tuple[Path, Lock] | None:
    """The lock whose commits are opened, and its file; None where there is none.

    Raises:
        HubError: it can't be read.
    """
    said = os.environ.get(LOCK)
    if not said:
        return None
    path = Path(said)
    try:
        return path, _read(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise HubError(
            f"{path}: the environment variable {LOCK} says this lock file, and it can't be read "
            f"({error.strerror}); give the right one, or unset {LOCK}"
        ) from error


@lru_cache(maxsize=8)
def _read(path: Path, changed: int) -> Lock:
    return read_lock(path)
