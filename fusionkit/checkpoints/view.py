"""Another checkpoint seen otherwise: under other names, in part, with other things known of it."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.checkpoints.checkpoint import Checkpoint, Pieces, reading


class View(Checkpoint):
    """Another checkpoint's tensors; what is not given is as there.

    Args:
        below: the other checkpoint.
        names: name here → its name there, of all that are seen; by default all, as they are.
        label: how messages call it.
        files: the files that it is read from.
        buffers: names, as here, of its buffers.
        strip_prefix: what was taken off the source's names.
        add_prefix: what was put in front of them.
    """

    def __init__(
        self,
        below: Checkpoint,
        names: Mapping[str, str] | None = None,
        *,
        label: str | None = None,
        files: tuple[Path, ...] | None = None,
        buffers: frozenset[str] | None = None,
        strip_prefix: str | None = None,
        add_prefix: str | None = None,
    ) -> None:
        self._below = below
        self._names = {name: name for name in below} if names is None else names
        new = {there: name for name, there in self._names.items()}
        seen = frozenset(new[name] for name in below.buffers if name in new)
        self.label = below.label if label is None else label
        self.files = below.files if files is None else files
        self.buffers = seen if buffers is None else buffers
        self.strip_prefix = below.strip_prefix if strip_prefix is None else strip_prefix
        self.add_prefix = below.add_prefix if add_prefix is None else add_prefix
        self.variant = below.variant
        self.nbytes, self.live, self.serial = below.nbytes, below.live, below.serial
        self.unread, self.rename = below.unread, dict(below.rename)  # the class's can't be pickled
        self.dequantized = below.dequantized
        self.specs = {name: below.specs[there] for name, there in self._names.items()}
        if below.architecture is not None:
            same = all(name == there for name, there in self._names.items())
            known = below.architecture
            self.architecture = known if same else known.renamed(self._names)
        self.aliases = {
            new[alias]: new[name]
            for alias, name in below.aliases.items()
            if alias in new and name in new
        }

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor."""
        with reading(self.label, name):
            return self._below[self._names[name]]

    def pieces(self, name: str) -> Pieces:
        """Read one tensor piece by piece, as below."""
        return self._below.pieces(self._names[name])

    def prefetch(self, name: str) -> None:
        """Have a tensor read ahead, as below."""
        self._below.prefetch(self._names[name])

    def row(self, name: str, index: int) -> Tensor:
        """Read one entry along a tensor's first axis, as below."""
        with reading(self.label, name):
            return self._below.row(self._names[name], index)

    def row_pieces(self, name: str, index: int) -> Pieces:
        """Read the same piece by piece, as below."""
        return self._below.row_pieces(self._names[name], index)

    def prefetch_row(self, name: str, index: int) -> None:
        """Have it read ahead, as below."""
        self._below.prefetch_row(self._names[name], index)

    @property
    def as_stored(self) -> Checkpoint:
        """As below, under the names that are stored there; itself, where that is no other."""
        stored = self._below.as_stored
        return self if stored is self._below else stored

    @property
    def plain(self) -> Checkpoint:
        """The model alone, seen likewise."""
        plain = self._below.plain
        return self if plain is self._below else self._over(plain, self._names)

    @property
    def stored(self) -> Checkpoint:
        """An adapter's own tensors; those that are seen here, under the names that they have here.

        Factors, which are not seen, keep the names that they have.
        """
        stored = self._below.stored
        if stored is self._below:
            return self
        factors = {name: name for name in stored if name not in self._below}
        return self._over(stored, {**self._names, **factors})

    def touches(self, name: str) -> bool:
        """As below; what is not seen here may be anything."""
        return name not in self._names or self._below.touches(self._names[name])

    def delta(self, name: str) -> Tensor | None:
        """As below."""
        return self._below.delta(self._names[name])

    def low_rank(self, name: str) -> LowRank | None:
        """As below."""
        return self._below.low_rank(self._names[name])

    def row_delta(self, name: str, index: int) -> Tensor | None:
        """As below."""
        return self._below.row_delta(self._names[name], index)

    def row_low_rank(self, name: str, index: int) -> LowRank | None:
        """As below."""
        return self._below.row_low_rank(self._names[name], index)

    def _over(self, below: Checkpoint, names: Mapping[str, str]) -> "View":
        """The same over another checkpoint, which need not have all of the tensors."""
        seen = {name: there for name, there in names.items() if there in below}
        return View(
            below,
            seen,
            label=self.label,
            files=self.files,
            buffers=frozenset(name for name in self.buffers if name in seen),
            strip_prefix=self.strip_prefix,
            add_prefix=self.add_prefix,
        )


def renamed(below: Checkpoint, strip_prefix: str, add_prefix: str) -> View:
    """See a checkpoint under other names.

    Args:
        below: the checkpoint.
        strip_prefix: see only names that start with it, and take it off.
        add_prefix: put in front of every name.
    """
    names = {
        add_prefix + name.removeprefix(strip_prefix): name
        for name in below
        if name.startswith(strip_prefix)
    }
    # Over names that have prefixes already, both together are again one of each.
    there = below.add_prefix
    further = strip_prefix.removeprefix(there) if strip_prefix.startswith(there) else ""
    left = there.removeprefix(strip_prefix) if there.startswith(strip_prefix) else ""
    return View(
        below,
        names,
        strip_prefix=below.strip_prefix + further,
        add_prefix=add_prefix + left,
    )
