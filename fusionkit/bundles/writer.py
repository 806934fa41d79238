"""A family's payload on its way into a folder: what each process writes, and how it is joined."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from fusionkit.bundles.format import ADDED, INITIAL, SHARED, SIDE_FILE, task_file
from fusionkit.bundles.journal import PROCESS, Journal, Record, identity
from fusionkit.bundles.manifest import TaskRecord
from fusionkit.bundles.part_file import Entry, FileRecord
from fusionkit.bundles.part_writer import Part, PartWriter
from fusionkit.bundles.side_files import as_tensor, own_files
from fusionkit.bundles.small_parts import Names
from fusionkit.codecs.base import WHOLE, WHOLE_MODEL, DeltaCodec, Encoded, Parts, SharedParts
from fusionkit.codecs.payload import encode
from fusionkit.errors import BundleError, CodecError
from fusionkit.task_vectors.family import Family

Segment = tuple[str, int, list[Entry]]
"""A file of parts: its path, where in it the data start, and its entries."""


class EncodedTensor(NamedTuple):
    """One tensor's payload, ready to be written.

    Attributes:
        name: the tensor's name, or `WHOLE_MODEL`.
        files: its parts in the file that tasks share, then in each task's own.
        sums: see `Encoded`.
    """

    name: str
    files: list[list[Part]]
    sums: Tensor | None

    @classmethod
    def of(cls, encoded: Encoded) -> "EncodedTensor":
        """Bytes and digests of what a codec encoded; called where it was encoded, in a thread."""
        files = [_parts(encoded.name, parts) for parts in (encoded.shared, *encoded.tasks)]
        return cls(encoded.name, files, encoded.sums)


class BundleWriter:
    """Encodes a family into the files of a folder; each process its share of the tensors.

    Every process writes what it encodes into files of its own. The first one then puts those of
    the others behind its own: the files are those that one process alone would have written.

    Args:
        folder: where to; the same for all processes.
        family: what is encoded.
        codec: what encodes.
        resumable: keep a journal, and go on from one that is there.
        names: of the bundle's base, where it is there already; by default the family's.
    """

    def __init__(
        self,
        folder: Path,
        family: Family,
        codec: DeltaCodec,
        resumable: bool,
        names: Iterable[str] | None = None,
    ) -> None:
        self._family, self._codec = family, codec
        self._processes = family.workers.processes
        rank = self._processes.rank
        own = folder / f"{PROCESS}{rank}" if rank else folder
        own.mkdir(exist_ok=True)
        files = [SHARED, *(task_file(task) for task in family.tasks)]
        of_base = family.roles if names is None else names
        all_names = [*of_base, *(n for names in family.private.values() for n in names)]
        packed = Names(of_base) if codec.packs else None
        self._writers = [PartWriter(own / file, all_names, packed) for file in files]
        self._journal: Journal | None = None
        if resumable:
            known = identity(family, codec, self._processes)
            self._journal = Journal(own, known, self._writers)

    def write(
        self, shared: SharedParts | None = None, adding: bool = False
    ) -> tuple[FileRecord | None, dict[str, TaskRecord]]:
        """Encode what is not there yet, and join what all processes have.

        Args:
            shared: the shared parts to encode against, where tasks are added to a bundle.
            adding: whether the bundle is there already, with all that is stored once.

        Returns:
            for the manifest, the shared file's record (None: nothing is shared) and the tasks';
            empty in all processes but the first.
        """
        family, codec = self._family, self._codec
        if self._processes.rank == 0:
            family.check_frozen()
        done = self._resume()
        if self._processes.rank == 0 and None not in done:
            self._add_whole_tensors(adding)
        sums = {name: each for name, each in done.items() if name is not None}
        last: EncodedTensor | None = None
        for encoded in encode(codec, family, EncodedTensor.of, shared, sums):
            if encoded.files[0] and shared is not None:
                raise CodecError(f"{codec!r} encoded shared parts of '{encoded.name}' anew")
            if encoded.name == WHOLE_MODEL:
                last = encoded
            else:
                self._add(encoded)
        self._join()
        if self._processes.rank:
            return None, {}
        if last:
            self._add(last)
        return self._finish()

    def _resume(self) -> dict[str | None, Tensor | None]:
        """What is there already: the tensors' names, and what they add to the sums."""
        if self._journal is None:
            return {}
        return {record.name: record.sums for record in self._journal.resume()}

    def _add(self, encoded: EncodedTensor) -> None:
        for writer, parts in zip(self._writers, encoded.files, strict=True):
            for part in parts:
                writer.add(part)
        if self._journal and encoded.name != WHOLE_MODEL:
            entries = [[part.entry for part in parts] for parts in encoded.files]
            self._journal.add(Record(encoded.name, entries, encoded.sums))

    def _add_whole_tensors(self, adding: bool) -> None:
        """First, as they are the cheapest to check: adapters' start, and what is a task's own."""
        family = self._family
        common, *own = self._writers
        if family.space and family.space.stored and not adding:
            for name in family.space.layout.tensors:
                common.add(Part.of(f"{INITIAL}{name}/{WHOLE}", family.base[name]))
        for task, writer in zip(family.tasks, own, strict=True):
            for tensors in (family.private_tensors(task), family.exact(task)):
                for name, tensor in tensors:
                    writer.add(Part.of(f"{name}/{WHOLE}", tensor))
            for name, content in own_files(family.base, family.finetuned[task]).items():
                writer.add(Part.of(f"{SIDE_FILE}{name}/{WHOLE}", as_tensor(content)))
            for name, rows in family.added_rows(task):
                writer.add(Part.of(f"{ADDED}{name}/{WHOLE}", rows))
        if self._journal:
            self._journal.add(Record(None, [writer.entries for writer in self._writers]))

    def _join(self) -> None:
        """Put what the other processes wrote behind what the first one did."""
        if self._journal:
            self._journal.flush()
        stored: list[Segment] = []
        for writer in self._writers:
            writer.flush()
            path, start = writer.stored
            stored.append((str(path), start, writer.entries))
        for files in self._processes.gather(stored)[1:]:
            if self._processes.rank == 0:
                for writer, (file, start, entries) in zip(self._writers, files, strict=True):
                    self._append(writer, Path(file), start, entries)

    def _append(self, writer: PartWriter, path: Path, start: int, entries: list[Entry]) -> None:
        if entries and not path.is_file():
            raise BundleError(
                f"{path}: written by another process, and not to be seen by the first one; the "
                "bundle's folder must be on a disk that all of them share"
            )
        for entry in entries:
            writer.add_stored(entry, path, start)
            start += entry.nbytes

    def _finish(self) -> tuple[FileRecord | None, dict[str, TaskRecord]]:
        family = self._family
        common, *own = self._writers
        records = {}
        for task, writer in zip(family.tasks, own, strict=True):
            whole = sum(e.nbytes for e in writer.entries if e.key.rpartition("/")[2] == WHOLE)
            nbytes = family.finetuned[task].nbytes
            own_names, added = family.private[task], family.added(task)
            records[task] = TaskRecord(writer.finish(), own_names, whole, nbytes, added=added)
        return common.finish() if common.entries else None, records


def _parts(name: str, parts: Parts) -> list[Part]:
    order = sorted(parts, key=lambda part: (-parts[part].dtype.itemsize, part))
    return [Part.of(f"{name}/{part}", parts[part]) for part in order]
