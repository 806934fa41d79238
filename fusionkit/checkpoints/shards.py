"""A checkpoint in several files, and the index that says which tensor is in which."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct
from torch import Tensor

from fusionkit.checkpoints.checkpoint import (
    MOST_TENSORS,
    Checkpoint,
    Pieces,
    reading,
    same_values,
)
from fusionkit.checkpoints.json_text import read_json
from fusionkit.checkpoints.paths import is_file_name
from fusionkit.errors import CheckpointError, listing


class _Index(Struct, frozen=True):
    """What an index says: name of a tensor → name of the file that it is in."""

    weight_map: Annotated[dict[str, str], Meta(max_length=MOST_TENSORS)]


class Shards(Checkpoint):
    """A Hugging Face index and the files that it names, with every tensor that is in them.

    Args:
        index: the index.
        label: how messages call it.
        open_file: opens one of the files.

    Raises:
        CheckpointError: it is no index, a file or a tensor that it names is missing, or two files
            hold one tensor with different values.
    """

    def __init__(self, index: Path, label: str, open_file: Callable[[Path], Checkpoint]) -> None:
        try:
            weight_map = msgspec.convert(read_json(index), _Index).weight_map
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{index}: not a shard index ('weight_map' expected): {error}"
            ) from error
        paths = {file: index.parent / file for file in sorted(set(weight_map.values()))}
        shards: dict[str, Checkpoint] = {}
        for file, path in paths.items():
            if not is_file_name(file):
                raise CheckpointError(
                    f"{index}: names a shard outside its own folder: '{file[:255]}'"
                )
            if not path.is_file():
                raise CheckpointError(f"{index}: names a shard that is missing: '{file}'")
            shards[file] = open_file(path)
        absent = [f"'{n}' in {f}" for n, f in weight_map.items() if n not in shards[f]]
        if absent:
            raise CheckpointError(
                f"{index}: names tensors that their shards lack:{listing(absent)}"
            )
        self.label = label
        self._shard = {name: shards[file] for name, file in weight_map.items()}
        for file, shard in shards.items():
            self._add_unnamed(index, file, shard)
        self.specs = {name: shard.specs[name] for name, shard in self._shard.items()}
        self.nbytes = sum(shard.nbytes for shard in shards.values())
        self.aliases = {
            alias: name
            for shard in shards.values()
            for alias, name in shard.aliases.items()
            if alias in self.specs and name in self.specs
        }
        self.files = (index, *paths.values())

    def _add_unnamed(self, index: Path, file: str, shard: Checkpoint) -> None:
        """Add a shard's tensors that the index does not name: who loads it loads all of them.

        Raises:
            CheckpointError: another shard holds one of them, with other values.
        """
        for name in shard:
            other = self._shard.setdefault(name, shard)
            if other is not shard and not same_values(other, name, shard, name):
                raise CheckpointError(
                    f"{index.parent}: says two things: '{name}' has other values in {file} than in "
                    f"{other.files[0].name}, and which of them is loaded depends on the library; "
                    f"save the model again, or take it out of one of the two"
                )

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor from its file."""
        with reading(self.label, name):
            return self._shard[name][name]

    def pieces(self, name: str) -> Pieces:
        """Read one tensor from its file, piece by piece."""
        return self._shard[name].pieces(name)

    def prefetch(self, name: str) -> None:
        """Have a tensor read ahead, where its file can be."""
        self._shard[name].prefetch(name)
