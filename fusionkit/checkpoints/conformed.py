"""A file's checkpoint as its class has it: its names, its ties, without what no one reads."""

from collections.abc import Mapping

from torch import Tensor

from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.checkpoints.architecture import Architecture
from fusionkit.checkpoints.checkpoint import Checkpoint, Pieces, TensorSpec, reading
from fusionkit.checkpoints.conversion import Reading, reading_of
from fusionkit.checkpoints.ties import tied_by_bytes, tied_by_class
from fusionkit.checkpoints.view import View


def conformed(below: Checkpoint, architecture: Architecture | None) -> Checkpoint:
    """See a checkpoint as its class, if it were loaded, would have it.

    Names are the class's, tensors are joined or cut as it reads them; names that it ties are
    there and share one tensor, unless the file holds them apart; tensors that no one reads
    (`Architecture.unread`) are not seen. What the class does not know, and may be someone's (a
    head of a user's own), keeps its name.

    Args:
        below: the checkpoint, as it is stored.
        architecture: what is known of its class; None: its ties alone, where their values say so.

    Raises:
        CheckpointError: the tensors can't be what the class is made of.
    """
    if architecture is None:
        tied = tied_by_bytes(below)
        return Conformed(below, _as_is(below), tied, None) if tied else below
    reading = _reading(below, architecture)
    own = {n: there for n, there in reading.names.items() if n not in architecture.unsaved}
    made_anew = {there for n, there in reading.names.items() if n not in own}
    unread = {name for name in reading.unread if not architecture.reads(name)} | made_anew
    others = {n: n for n in below if n in reading.unread - unread and n not in own}
    names = {**own, **others}
    read = Reading(names, reading.made, reading.specs, frozenset(unread))
    seen = Conformed(below, read, {}, architecture)
    tied = tied_by_class(seen, architecture.tied)
    if tied.keys() - below.aliases.keys():
        return Conformed(below, read, tied, architecture)
    if reading.made or unread or any(name != there for name, there in names.items()):
        return seen
    below.architecture = architecture
    return below


def with_ties(below: Checkpoint, tied: Mapping[str, str]) -> Checkpoint:
    """See a checkpoint with names that it lacks, tied to those that it has.

    Args:
        below: the checkpoint.
        tied: name → name whose tensor it shares; what is there already is left as it is.
    """
    new = {name: to for name, to in tied.items() if name not in below and to in below}
    return Conformed(below, _as_is(below), new, below.architecture) if new else below


def _reading(below: Checkpoint, architecture: Architecture) -> Reading:
    specs = {name: (spec.shape, spec.dtype) for name, spec in below.specs.items()}
    if architecture.skeleton is not None:
        return reading_of(architecture.skeleton, specs, below.label)
    names = {name: name for name in below if name in architecture.shapes}
    return Reading(names, {}, {}, frozenset(name for name in below if name not in names))


def _as_is(below: Checkpoint) -> Reading:
    return Reading({name: name for name in below}, {}, {}, frozenset())


class Conformed(View):
    """A checkpoint as its class has it; made by `conformed`.

    Args:
        below: the checkpoint, as it is stored.
        read: how the class reads it.
        tied: name → name of the class whose tensor it shares.
        architecture: what is known of the class.
    """

    def __init__(
        self,
        below: Checkpoint,
        read: Reading,
        tied: Mapping[str, str],
        architecture: Architecture | None,
    ) -> None:
        names = dict(read.names)
        for name, target in tied.items():
            if target not in names and target not in read.made:
                names[target] = names[name]
            names[name] = names.get(target, target)
        super().__init__(below, {n: there for n, there in names.items() if there in below})
        self._made = dict(read.made)
        made_specs = dict(read.specs)
        for name, target in tied.items():
            if target in self._made:
                self._made[name], made_specs[name] = self._made[target], made_specs[target]
        self._targets = {name: tied.get(name, name) for name in self._made}
        specs = {**self.specs, **{n: TensorSpec(*spec) for n, spec in made_specs.items()}}
        place = {name: place for place, name in enumerate(below)}
        order = sorted(specs, key=lambda name: min(place[each] for each in self._sources(name)))
        self.specs = {name: specs[name] for name in order}  # as the file has them
        self.aliases = {**self.aliases, **tied}
        self.unread = below.unread | read.unread
        self.architecture = architecture
        self._by_rows = {
            name: made.by_rows(name, self.specs[name].shape)
            for name, made in self._made.items()
            if architecture and architecture.kinds.get(name) == "experts"
        }

    @property
    def as_stored(self) -> Checkpoint:
        """As it is stored."""
        return self._below

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor, or make it of those that it is made of."""
        if name not in self._made:
            return super().__getitem__(name)
        with reading(self.label, name):
            return self._made[name].run(self._below.__getitem__)[self._targets[name]].contiguous()

    def row(self, name: str, index: int) -> Tensor:
        """Read one entry along the first axis, of its own sources where that can be."""
        if not self._by_rows.get(name):
            return super().row(name, index)
        with reading(self.label, name):
            return self._made[name].run(self._below.__getitem__, index)[name][0].contiguous()

    def row_pieces(self, name: str, index: int) -> Pieces:
        """Read one entry along the first axis piece by piece; what is made of others at once."""
        if not self._by_rows.get(name):
            return super().row_pieces(name, index)
        return self.row(name, index).reshape(-1).__getitem__

    def pieces(self, name: str) -> Pieces:
        """Read one tensor piece by piece; what is made of others is made whole."""
        return self[name].reshape(-1).__getitem__ if name in self._made else super().pieces(name)

    def prefetch(self, name: str) -> None:
        """Have a tensor, or those that it is made of, read ahead."""
        for source in self._sources(name):
            self._below.prefetch(source)

    def prefetch_row(self, name: str, index: int) -> None:
        """Have one entry's sources read ahead."""
        if self._by_rows.get(name):
            for sources in self._made[name].sources.values():
                self._below.prefetch(sources[index])
        elif index == 0:
            self.prefetch(name)

    def touches(self, name: str) -> bool:
        """As below; what is not seen here may be anything."""
        if name not in self._made:
            return super().touches(name)
        return any(self._below.touches(source) for source in self._sources(name))

    def delta(self, name: str) -> Tensor | None:
        """As below; of what is made of others, nobody knows it."""
        return None if name in self._made else super().delta(name)

    def row_delta(self, name: str, index: int) -> Tensor | None:
        """As below; of what is made of others, nobody knows it."""
        return None if name in self._made else super().row_delta(name, index)

    def low_rank(self, name: str) -> LowRank | None:
        """As below; of what is made of others, nobody knows it."""
        return None if name in self._made else super().low_rank(name)

    def row_low_rank(self, name: str, index: int) -> LowRank | None:
        """As below; of what is made of others, nobody knows it."""
        return None if name in self._made else super().row_low_rank(name, index)

    def _sources(self, name: str) -> list[str]:
        if name not in self._made:
            return [self._names[name]]
        return [source for names in self._made[name].sources.values() for source in names]
