"""A cache as Hugging Face's, of repositories that a test makes."""

from pathlib import Path
from typing import Literal

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path, name: str, kind: Literal["model", "dataset"] = "model") -> Path:
    """The folder of a repository's commit, empty, which its `main` is at.

    Args:
        cache: the folder of the cache.
        name: `OWNER/NAME`.
        kind: of the repository.
    """
    repository = cache / f"{kind}s--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(COMMIT)
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True, exist_ok=True)
    return folder
