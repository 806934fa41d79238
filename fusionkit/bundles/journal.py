"""What an interrupted run has written, so that the next one goes on from there.

The first line tells the run. Each line after it is a record behind a digest of itself and of all
lines before: one that was altered, moved or half written is not believed, nor is any after it.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fusionkit.bundles.part_file import Entry
from fusionkit.bundles.part_writer import PartWriter
from fusionkit.bundles.side_files import folder_of, side_files
from fusionkit.checkpoints.checkpoint import Checkpoint
from fusionkit.codecs.base import DeltaCodec
from fusionkit.registry import to_config
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.processes import Processes

JOURNAL = "journal.jsonl"
PROCESS = "process-"
"""With its rank, the folder of a process that is not the first."""
_DUE = 1 << 24
"""Bytes written after which the journal is brought up to date."""


class Record(NamedTuple):
    """One tensor that is on disk.

    Attributes:
        name: the tensor's name; None for all tensors that are stored whole, which come first.
        files: its parts in each file.
        sums: see `fusionkit.codecs.base.Encoded`.
    """

    name: str | None
    files: list[list[Entry]]
    sums: Tensor | None = None


class Journal:
    """Keeps a record of each tensor that was written, behind the data themselves.

    Args:
        folder: where the files are written.
        identity: of the run; a journal of another one is of no use.
        writers: of the files, in the order of a record's `files`.
    """

    def __init__(self, folder: Path, identity: str, writers: Sequence[PartWriter]) -> None:
        self._path = folder / JOURNAL
        self._identity = identity
        self._writers = writers
        self._due: list[Record] = []
        self._bytes = 0
        self._last = ""

    def resume(self) -> list[Record]:
        """Bring the writers to where an interrupted run was; the records of what is there."""
        kept: list[Record] = []
        for writer in self._writers:
            writer.resume()
        for record in self._read():
            pairs = list(zip(self._writers, record.files, strict=True))
            if not all(writer.holds(entries) for writer, entries in pairs):
                break
            for writer, entries in pairs:
                writer.keep(entries)
            kept.append(record)
        for writer in self._writers:
            writer.cut()
        if not kept:
            for writer in self._writers:
                writer.clear()
        self._last = self._identity
        lines = [json.dumps(self._identity), *map(self._line, kept)]
        self._path.write_text("\n".join(lines) + "\n")
        return kept

    def add(self, record: Record) -> None:
        """Note a tensor that was handed to the writers."""
        self._due.append(record)
        self._bytes += sum(entry.nbytes for entries in record.files for entry in entries)
        if self._bytes >= _DUE:
            self.flush()

    def flush(self) -> None:
        """Bring data and journal up to date."""
        for writer in self._writers:
            writer.flush()
        with self._path.open("a") as file:
            file.writelines(self._line(record) + "\n" for record in self._due)
        self._due, self._bytes = [], 0

    def _line(self, record: Record) -> str:
        text = _text(record)
        self._last = _digest(self._last, text)
        return f"{self._last} {text}"

    def _read(self) -> list[Record]:
        if _identity(self._path) != self._identity:
            return []
        records, last = [], self._identity
        for line in self._path.read_bytes().split(b"\n")[1:]:
            digest, _, text = line.decode(errors="replace").partition(" ")
            last = _digest(last, text)
            if digest != last:
                break
            name, files, sums = json.loads(text)
            entries = [[Entry(*entry) for entry in each] for each in files]
            records.append(Record(name, entries, _tensor(sums)))
        return records


def is_resumable(family: Family) -> bool:
    """Whether another run can be told to be the same: all its models are files."""
    return all(checkpoint.files for checkpoint in (family.base, *family.finetuned.values()))


def identity(family: Family, codec: DeltaCodec, processes: Processes) -> str:
    """What tells one run from another: codec, settings, and the files that are read."""
    checkpoints: Mapping[str, Checkpoint] = {"": family.base, **family.finetuned}
    read = {}
    for task, checkpoint in checkpoints.items():
        beside = side_files(folder_of(checkpoint.files)).values()
        stats = [(path, path.stat()) for path in dict.fromkeys((*checkpoint.files, *beside))]
        files = [[str(path.absolute()), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
        read[task] = [checkpoint.strip_prefix, checkpoint.add_prefix, *files]
    patterns = [family.private_patterns, family.frozen_patterns, bool(family.space)]
    if family.rename or family.ignore:
        patterns += [family.rename, family.ignore]
    own = [processes.rank, processes.count]
    settings = [to_config(codec), repr(codec)]  # which shows what is no setting, too
    return json.dumps([version("fusionkit"), settings, read, patterns, own])


def claim(folder: Path, identity: str) -> None:
    """Empty a folder, unless what it holds is of the same run."""
    known = _identity(folder / JOURNAL)
    for path in folder.iterdir() if known != identity else ():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def tidy(folder: Path) -> None:
    """Remove what is not of the bundle."""
    (folder / JOURNAL).unlink(missing_ok=True)
    for own in folder.glob(f"{PROCESS}*"):
        shutil.rmtree(own)


def _identity(path: Path) -> object:
    try:
        with path.open("rb") as file:
            return json.loads(file.readline())
    except (OSError, ValueError, RecursionError):
        return None


def _digest(before: str, text: str) -> str:
    return hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()[:16]


def _text(record: Record) -> str:
    sums = record.sums
    coded = None
    if sums is not None:
        coded = [str(sums.dtype).removeprefix("torch."), list(sums.shape), _hex(sums)]
    return json.dumps([record.name, record.files, coded])


def _hex(sums: Tensor) -> str:
    return sums.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes().hex()


def _tensor(coded: tuple[str, list[int], str] | None) -> Tensor | None:
    if coded is None:
        return None
    dtype, shape, text = coded
    data = torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
    found: torch.dtype = getattr(torch, dtype)
    return data.view(found).view(shape)
