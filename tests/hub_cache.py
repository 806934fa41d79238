"""A cache as Hugging Face's, of repositories that a test makes."""

import hashlib
from pathlib import Path
from typing import Literal


def cached(cache: Path, name: str, kind: Literal["model", "dataset"] = "model") -> Path:
    """The folder of a repository's commit, empty, which its `main` is at.

    Args:
        cache: the folder of the cache.
        name: `OWNER/NAME`.
        kind: of the repository.
    """
    repository = cache / f"{kind}s--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    commit = hashlib.sha1(repository.name.encode(), usedforsecurity=False).hexdigest()
    (repository / "refs" / "main").write_text(commit)
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True, exist_ok=True)
    return folder
