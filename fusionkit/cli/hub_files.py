"""Which files of a repository a recipe reads: those that the code which opens it would choose."""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from fusionkit.bundles.format import MANIFEST
from fusionkit.checkpoints.hub_download import hub_errors
from fusionkit.checkpoints.hub_lock import Locked, LockedFile
from fusionkit.checkpoints.hub_names import Repository, Use
from fusionkit.checkpoints.model_folder import BESIDE, weights_among
from fusionkit.cli.hub_names_in import Read
from fusionkit.errors import HubError, in_line
from fusionkit.tasks.hub_datasets import files_on_hub
from fusionkit.tasks.open_clip_models import CONFIG

_OPEN_CLIP = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"),
    *("open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin"),
)
"""What open_clip's weights are called; the first that is there is read."""
_ABOUT_ROWS = ("README.md", "dataset_infos.json", ".huggingface.yaml")
"""Files that say what a data set's rows are."""


@dataclass(frozen=True)
class Listing:
    """What a repository has.

    Attributes:
        of: the repository.
        commit: at which commit.
        files: path in it → size and hash.
    """

    of: Repository
    commit: str
    files: dict[str, LockedFile]


def listing(name: Repository, commit: str = "", update: str = "") -> Listing:
    """Ask the Hub what a repository has.

    Args:
        name: the repository.
        commit: at which commit; by default the newest of its branch.
        update: the command that takes a newer commit than that.

    Raises:
        HubError: it can't be had.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="fusionkit")
    with hub_errors(name, commit, update):
        said: Any = api.repo_info(
            name.name,
            repo_type=name.kind,
            revision=commit or name.revision or None,
            files_metadata=True,
        )
        if said.gated:
            api.auth_check(name.name, repo_type=name.kind)
    files = {
        each.rfilename: LockedFile(each.size or 0, sha256=each.lfs.sha256)
        if each.lfs
        else LockedFile(each.size or 0, blob=each.blob_id)
        for each in said.siblings or ()
    }
    return Listing(name, str(said.sha), files)


def locked_of(listed: Listing, reads: Sequence[Read]) -> Locked:
    """What a recipe reads of a repository, to be locked.

    Args:
        listed: what it has.
        reads: what the recipe reads of it.

    Raises:
        HubError: it has no such files.
        DataError: it has no such rows.
    """
    files: set[str] = set()
    splits: dict[str, dict[str, list[str]]] = {}
    for read in reads:
        if read.splits:
            found = _rows(listed, read)
            splits.setdefault(read.inside, {}).update(found)
            files |= {file for names in found.values() for file in names}
            files |= {file for file in _ABOUT_ROWS if file in listed.files}
        elif read.use is Use.ROWS:  # whatever reads the URL
            files |= {file for file in listed.files if file.startswith(read.inside)}
        else:
            files |= _of_model(listed, read)
    chosen = {file: listed.files[file] for file in sorted(files)}
    return Locked(listed.commit, sorted(map(str, reads)), chosen, splits)


def _rows(listed: Listing, read: Read) -> dict[str, list[str]]:
    """The files of the splits that are read."""
    there = files_on_hub(listed.of.name, read.inside, listed.commit)
    wanted = [next((name for name in names if name in there), None) for names in read.splits]
    found = {name: there[name] for name in wanted if name}
    if not found:
        raise HubError(
            f"{listed.of}: has the splits {in_line(list(there))}, and neither training nor test "
            f"rows are among them; say how they are called: `splits` beside {read.key}"
        )
    return found


def _of_model(listed: Listing, read: Read) -> set[str]:
    """The files of a model, or of each that a `*` stands for."""
    if read.inside in listed.files:  # a file itself; what is beside it says of what class it is
        folder, _, name = read.inside.rpartition("/")
        here = _in_folder(listed.files, folder)
        more = weights_among([*here]) if ".index" in name else []
        return {read.inside, *(here[each] for each in [*_beside(here), *more])}
    start, star, end = read.inside.strip("/").partition("*")
    if not star:
        return _of_folder(listed, read, read.inside.strip("/"))
    between = re.compile(rf"({re.escape(start)}[^/]*{re.escape(end)})(/.*)?")
    matches = [match for file in listed.files if (match := between.fullmatch(file))]
    if not matches:
        raise HubError(f"{listed.of}: nothing in it matches {read.inside} ({read.key})")
    found = {match[1] for match in matches if match[2] is None}
    for folder in {match[1] for match in matches if match[2] is not None}:
        found |= _of_folder(listed, read, folder)
    return found


def _of_folder(listed: Listing, read: Read, folder: str) -> set[str]:
    """What is read of one folder of a repository."""
    here = _in_folder(listed.files, folder)
    chosen = _beside(here)
    if read.use is Use.OPEN_CLIP:
        chosen += [CONFIG] * (CONFIG in here and CONFIG not in chosen)
        weights = [name for name in _OPEN_CLIP if name in here][:1]
    elif MANIFEST in here and read.use is Use.MODEL:  # a bundle
        weights = [name for name in here if name.endswith(".safetensors")]
    else:
        weights = weights_among([*here], read.variant)
    if read.use is not Use.BESIDE:
        if not weights:
            raise HubError(_no_weights(listed, read, folder))
        chosen += weights
    if not chosen:
        raise HubError(f"{listed.of}: has nothing that is read as {read.key}: {_content(here)}")
    return {here[name] for name in chosen}


def _no_weights(listed: Listing, read: Read, folder: str) -> str:
    below = sorted({file.partition("/")[0] for file in listed.files if "/" in file})
    hint = f"; its folders are {in_line(below)}: hf://{listed.of}/FOLDER" if below else ""
    where = f"{listed.of}/{folder}" if folder else str(listed.of)
    return (
        f"{where}: has no weights that are read ({read.key}), as model.safetensors, its index, or "
        f"adapter_model.safetensors: {_content(_in_folder(listed.files, folder))}{hint}"
    )


def _content(here: Collection[str]) -> str:
    return f"it holds {in_line(sorted(here)) or 'nothing'}"


def _in_folder(files: Iterable[str], folder: str) -> dict[str, str]:
    """The files of a folder itself: name → path."""
    start = f"{folder}/" if folder else ""
    inside = [file for file in files if file.startswith(start)]
    return {file[len(start) :]: file for file in inside if "/" not in file[len(start) :]}


def _beside(here: Iterable[str]) -> list[str]:
    """What lies beside weights; no index, which is read with the shards that it names."""
    return [
        name
        for name in here
        if any(fnmatchcase(name, pattern) for pattern in BESIDE) and ".index" not in name
    ]
