"""What a bundle's files hold beside a codec's payload, as far as its family tells: upper bounds.

For codecs that keep to a number of bytes. A file's header has an entry for each part, the manifest
one for each tensor of the base; see `bundles.part_file` and `bundles.manifest`, which write them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fusionkit.registry import Config
from fusionkit.task_vectors.family import Family

_ENTRY = 75
"""Of a header's entry: what is not its key, nor digits; with the digest in the metadata."""
_HEADER = 90
"""Of a header: what is no entry, and its padding."""
_MANIFEST, _TASK = 1500, 1000
"""Of the manifest: what is of no tensor, and of a task without its name, calibrated ones
included."""
_LARGE, _ROOM = 1 << 26, 8192
"""Bytes of data from which a file's header is padded, and its least room."""


@dataclass(frozen=True)
class Overhead:
    """Bytes beside the payload.

    Attributes:
        manifest: of the whole bundle.
        headers: per task, those of its file's header that no payload adds to.
        whole: per task, those of its private and exact tensors.
        shared: of adapters' initial tensors.
    """

    manifest: int
    headers: Sequence[int]
    whole: Sequence[int]
    shared: int

    @property
    def beside_parameters(self) -> int:
        """What `Bundle.bits_per_parameter` counts."""
        return self.manifest + sum(self.headers) + self.shared

    @property
    def total(self) -> int:
        """All of it."""
        return self.beside_parameters + sum(self.whole)


def entry_bytes(name: str, part: str, nbytes: int) -> int:
    """Bytes of a part's entry in a file's header, if it has one axis.

    Args:
        name: the tensor's.
        part: the part's.
        nbytes: of the file.
    """
    return _ENTRY + _text(f"{name}/{part}") + 3 * len(str(nbytes))


def overhead(family: Family, codec: Config, nbytes: int) -> Overhead:
    """What a bundle of a family holds beside the payload, at most.

    Args:
        family: what is compressed.
        codec: as the manifest records it.
        nbytes: about how large the payload is, over all tasks.
    """
    headers, wholes = [], []
    exact = {name: family.base.specs[name].nbytes for name in family.names("exact")}
    names = [*family.roles, *(name for own in family.private.values() for name in own)]
    room = _ROOM + sum(4 * (140 + _text(name)) for name in names)
    for task, checkpoint in family.finetuned.items():
        own = {name: checkpoint.specs[name].nbytes for name in family.private[task]}
        whole = sum(own.values()) + sum(exact.values())
        header = _HEADER + sum(entry_bytes(n, "tensor", whole) + 40 for n in (*own, *exact))
        headers.append(header + room if whole + nbytes > _LARGE else header)
        wholes.append(whole)
    shared = 0
    if family.space and family.space.stored:
        start = {name: family.base.specs[name].nbytes for name in family.space.layout.tensors}
        shared = _HEADER + sum(
            n + entry_bytes(name, "start:tensor", n) for name, n in start.items()
        )
    return Overhead(_manifest(family, codec), headers, wholes, shared)


def _manifest(family: Family, codec: Config) -> int:
    base = family.base
    known = base.architecture
    content: dict[str, Any] = {
        "codec": codec,
        "source": base.label,
        "tensors": {
            name: {
                "dtype": str(base.specs[name].dtype),
                "shape": list(base.specs[name].shape),
                "role": role,
                "sha256": "0" * 16,
            }
            for name, role in family.roles.items()
        },
        "names": [family.tied, family.stacks, family.rename, family.ignore, base.strip_prefix],
        "space": family.space.to_json() if family.space else None,
        "kinds": dict(known.kinds) if known else {},
        "architecture": dict(known.record) if known else {},
        "patterns": [*family.private_patterns, *family.frozen_patterns],
        "private": family.private,
    }
    indented = len(json.dumps(content, indent=4))
    return _MANIFEST + indented + sum(_TASK + len(task) for task in family.tasks)


def _text(name: str) -> int:
    return len(json.dumps(name, ensure_ascii=False).encode())
