"""What lies in Hugging Face's cache already, and is read from there: models, data sets.

The cache has a folder for each commit of a repository, `models--OWNER--NAME/snapshots/COMMIT`,
and says in `refs` which commit a branch was at. What is there whole needs no network.
"""

import re
from importlib.util import find_spec
from pathlib import Path

from fusionkit.checkpoints.hub_download import reference_of, snapshot
from fusionkit.checkpoints.hub_names import Repository, of_url
from fusionkit.checkpoints.hub_pins import fetch_line, pinning
from fusionkit.checkpoints.json_text import read_json

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
_PART = re.compile(r"(.+)-(\d+)-of-(\d+)(\..+)")
"""How one of several files is called that are one."""


def in_hub_cache(url: str) -> Path | None:
    """A model's folder, or a file of it, as it lies in the cache.

    Args:
        url: `hf://OWNER/NAME[@REVISION][/FILE]`; of anything else nothing is known.

    Returns:
        the path; None where it is not there, or a folder's weights are not all there.
    """
    named = of_url(url)
    if named is None or named[0].kind != "model":
        return None
    repository, inside = named
    folder = newest(repository)
    if folder is None:
        return None
    if inside:
        return folder / inside if (folder / inside).exists() else None
    files = [each.name for each in folder.iterdir()]
    indexes = [folder / name for name in files if name.endswith(".index.json")]
    shards = [(folder / name) for index in indexes for name in _shards(index)]
    whole = any(name.endswith(_WEIGHTS) for name in files) and all(map(Path.is_file, shards))
    return folder if whole else None


def lacking_on_hub(url: str) -> str | None:
    """Why there is nothing at a URL of the Hub, and what to do; None for other paths."""
    named = of_url(url)
    if named is None:
        return None
    if lock := pinning(named[0]):
        return f"is not among what {lock} has of it; add it: {fetch_line(lock)}"
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return (
            f"is not in Hugging Face's cache ({constants.HF_HUB_CACHE}), or not whole, and the Hub "
            "is not asked, since HF_HUB_OFFLINE is set; unset it, or download it first: hf "
            f"download {named[0].name}"
        )
    return (
        "the Hub gives no such repository or file; check the name, and for what is gated or "
        "private log in: hf auth login"
    )


def newest(name: Repository) -> Path | None:
    """The folder of a repository's commit in the cache, by the name's revision, `main` by default.

    Returns:
        None where there is none.
    """
    if find_spec("huggingface_hub") is None:
        return None
    reference = reference_of(name)
    commit = reference.read_text().strip() if reference.is_file() else name.revision
    folder = snapshot(name, commit) if commit else None
    return folder if folder and folder.is_dir() else None


def dataset_in_hub_cache(name: str) -> Path | None:
    """A data set's folder in the cache; None where it is not there, or files of it lack.

    Args:
        name: `OWNER/NAME`.
    """
    folder = newest(Repository(name, "dataset"))
    if folder is None:
        return None
    files = [each for each in folder.rglob("*") if each.is_file()]
    parts: dict[tuple[str, ...], int] = {}
    for each in files:
        if match := _PART.fullmatch(str(each.relative_to(folder))):
            parts[match[1], match[3], match[4]] = parts.get((match[1], match[3], match[4]), 0) + 1
    whole = all(count == int(of) for (_, of, _), count in parts.items())
    held = any(not each.name.startswith(".") and each.name != "README.md" for each in files)
    return folder if held and whole else None


def _shards(index: Path) -> set[str]:
    """The files that an index names; one that is none if it can't be read."""
    try:
        return {str(name) for name in read_json(index)["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {""}
