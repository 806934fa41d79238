"""Data sets that Hugging Face's `datasets` reads: Parquet, Arrow, saved ones, and the hub's."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusionkit.checkpoints.hub_cache import dataset_in_hub_cache
from fusionkit.checkpoints.hub_lock import Locked
from fusionkit.checkpoints.hub_places import dataset_place
from fusionkit.errors import DataError, FusionKitError, HubError, in_line
from fusionkit.tasks.data import Split
from fusionkit.tasks.table import MissingSplitError, Table


def read_dataset(path: Path, split: Split, names: Sequence[str], saved: bool) -> Table:
    """Read one split of a folder, or of a data set on the hub.

    Args:
        path: the folder; where there is none, the data set's name, `ORG/NAME[:CONFIG]`, which is
            read from Hugging Face's cache where it is there whole.
        split: which.
        names: what it may be called; the first that is there counts.
        saved: whether it is a folder that `save_to_disk` wrote.

    Raises:
        FusionKitError: `datasets` is not installed.
        MissingSplitError: there is no such split.
        DataError: there is no such data set, or it can't be had.
        HubError: a lock file pins it, and it can't be had so.
    """
    local = path.is_dir()
    datasets = _library(str(path))
    name, _, config = (str(path), "", "") if local else str(path).partition(":")
    pinned = None if local else dataset_place(str(path))
    if saved:
        found = _loaded(path, lambda: datasets.load_from_disk(name))
    elif pinned is not None:
        found = _loaded(path, lambda: _locked(*pinned))
    else:
        cached = None if local else dataset_in_hub_cache(name)
        place, hub = str(cached or name), not local and cached is None
        found = _loaded(path, lambda: datasets.load_dataset(place, config or None), hub)
    if isinstance(found, datasets.Dataset):  # no splits
        if split == "train":
            raise MissingSplitError(
                f"{path}: has no splits, and its rows are test rows; save a DatasetDict"
            )
        return _table(str(path), found)
    for name in names:
        if name in found:
            return _table(f"{path}, split '{name}'", found[name])
    raise MissingSplitError(
        f"{path}: has no {split} rows (looked for {', '.join(names)}); it has the splits "
        f"{', '.join(found)}; say which in `splits`: {{{split}: {next(iter(found), '…')}}}"
    )


def files_on_hub(name: str, config: str, commit: str) -> dict[str, list[str]]:
    """The files that `datasets` would read of a data set on the hub; no row is read.

    Args:
        name: `ORG/NAME`.
        config: its configuration; of an empty one the default.
        commit: of the repository.

    Returns:
        split → its files' paths in the repository.

    Raises:
        FusionKitError: `datasets` is not installed.
        DataError: there is no such configuration, or files of it are elsewhere.
    """
    datasets = _library(name)
    path = Path(f"{name}:{config}" if config else name)

    def load() -> Any:
        return datasets.load_dataset_builder(name, config or None, revision=commit)

    found = _loaded(path, load, hub=True).config.data_files or {}
    start = f"hf://datasets/{name}@{commit}/"
    splits = {str(split): [str(file) for file in files] for split, files in found.items()}
    for file in (file for files in splits.values() for file in files):
        if not file.startswith(start):
            raise DataError(f"{path}: reads {file}, which is not of its repository; copy it here")
    return {s: [each.removeprefix(start) for each in files] for s, files in splits.items()}


def _locked(folder: Path, locked: Locked, config: str) -> Any:
    """The rows of a data set whose commit is locked, of the splits that are."""
    import datasets

    if config not in locked.splits:
        known = in_line([each or "the default" for each in locked.splits])
        raise HubError(
            f"{folder}: the lock file has {known} of it, and not the configuration '{config}'; "
            "give 'fusionkit fetch' again"
        )
    files = locked.splits[config]
    own = {split: [str(folder / each) for each in names] for split, names in files.items()}
    infos = datasets.info.DatasetInfosDict.from_directory(str(folder))
    info = infos.get(config or ("default" if len(infos) > 1 else next(iter(infos), "")))
    features = info and info.features
    return datasets.load_dataset(str(folder), config or None, data_files=own, features=features)


def read_dataset_file(path: Path) -> Table:
    """Read a `.parquet` or `.arrow` file.

    Raises:
        FusionKitError: `datasets` is not installed.
        DataError: it can't be read.
    """
    datasets = _library(str(path))
    kind = path.suffix.removeprefix(".")

    def load() -> Any:
        return datasets.load_dataset(kind, data_files=[str(path)], split="train")

    return replace(_table(str(path), _loaded(path, load)), folder=path.parent)


def _table(where: str, dataset: Any) -> Table:
    if not len(dataset):
        raise DataError(f"{where}: has no rows")
    named = {n: f.names for n, f in dataset.features.items() if hasattr(f, "int2str")}
    return Table(where, tuple(dataset.column_names), dataset, classes=named)


def _library(where: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise FusionKitError(
            f"{where}: is read by Hugging Face's datasets, which is not installed (or no such file "
            "was found here); pip install 'fusionkit[datasets]'"
        ) from error
    return datasets


def _loaded(path: Path, load: Callable[[], Any], hub: bool = False) -> Any:
    """What `datasets` loads; whatever it raises, of any library beneath it, said in plain words."""
    try:
        with _quiet():
            return load()
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        if not hub:
            raise DataError(f"{path}: can't be read by datasets: {said[0]}") from error
        if isinstance(error, ConnectionError):
            raise DataError(
                f"{path}: no such file or folder here, and the Hugging Face hub can't be reached "
                "for a data set of that name; check the path, or the network and HF_HUB_OFFLINE"
            ) from error
        raise DataError(
            f"{path}: no such file or folder here, and the Hugging Face hub gives none of that "
            f"name: {said[0]}; a configuration is given as {str(path).partition(':')[0]}:CONFIG"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars: they would run across ours."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
