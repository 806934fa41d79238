"""What a bundle's files hold beside a codec's payload, as far as its family tells: upper bounds.

For codecs that keep to a number of bytes. A file's header has an entry for each part, or the index
of its small ones; the manifest one for each tensor of the base; see `bundles.part_writer`,
`bundles.small_parts` and `bundles.manifest`, which write them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fusionkit.checkpoints.json_text import json_text
from fusionkit.codecs.base import WHOLE
from fusionkit.registry import Config
from fusionkit.task_vectors.family import Family

SMALL = 1 << 14
"""Bytes from which a part has an entry of its own in the header, if others are packed."""
PACKED_ENTRY = 9
"""Bytes of a packed part's entry: its tensor's place takes three at most, and its side."""
_INDEX = 64
"""Of a pack's index: what is no entry."""
_DIGEST = 16
_HEADER = 80
"""Of a header: what is no entry, and its padding."""
_LARGE, _ROOM = 1 << 26, 8192
"""Bytes of data from which a file's header is padded, and its least room."""
_NUMBER = 10**12
"""As long as any number of the manifest."""


@dataclass(frozen=True)
class Overhead:
    """Bytes beside the payload.

    Attributes:
        manifest: of the whole bundle; of one that will be calibrated, too.
        headers: of all tasks, those of their files' headers that no payload adds to, and of what
            adapters start from, where that is stored.
        whole: of all tasks, those of their private and exact tensors.
        packs: whether small parts are packed, in the files of a codec that asks for it.
    """

    manifest: int
    headers: int
    whole: int
    packs: bool


def overhead(family: Family, codec: Config, nbytes: int) -> Overhead:
    """What a bundle of a family holds beside the payload, at most.

    Args:
        family: what is compressed.
        codec: as the manifest records it.
        nbytes: how large the payload is, at most, over all tasks.
    """
    exact = [family.base.specs[name] for name in family.names("exact")]
    names = [*family.roles, *(name for own in family.private.values() for name in own)]
    room = _ROOM + sum(4 * (140 + _text(name)) for name in names)
    headers = whole = largest = 0
    for task, checkpoint in family.finetuned.items():
        specs = [*exact, *(checkpoint.specs[name] for name in family.private[task])]
        own = sum(spec.nbytes for spec in specs)
        known = [*family.names("exact"), *family.private[task]]
        headers += _HEADER + entry_bytes("", "packed", own + nbytes) + _INDEX
        headers += room * (own + nbytes > _LARGE)
        largest = max(largest, own + nbytes)
        for name, spec in zip(known, specs, strict=True):
            headers += entry_bytes(name, WHOLE, own + nbytes, list(spec.shape))
        whole += own
    if family.space and family.space.stored:
        headers += _HEADER
        for name in family.space.layout.tensors:
            spec = family.base.specs[name]
            headers += spec.nbytes + entry_bytes(name, "start:" + WHOLE, 1 << 40, list(spec.shape))
    return Overhead(_manifest(family, codec), headers, whole, largest <= _LARGE)


def entry_bytes(name: str, part: str, nbytes: int, shape: Sequence[int] | None = None) -> int:
    """Bytes of a part's entry in a file's header.

    Args:
        name: the tensor's.
        part: the part's.
        nbytes: of the file, at most.
        shape: the part's; by default of one axis, as long as can be.
    """
    shape = [nbytes] if shape is None else list(shape)
    entry = {"dtype": "BF16", "shape": shape, "data_offsets": [nbytes, nbytes]}
    text = json.dumps(entry, separators=(",", ":"))
    return _text(f"{name}/{part}") + len(text) + 2 + _DIGEST


def _manifest(family: Family, codec: Config) -> int:
    base = family.base
    known = base.architecture
    sha = "0" * 64
    file = {"bytes": _NUMBER, "header_sha256": sha, "packed": True}
    numbers = ("shift", "scale", "objective", "method", "rows", "seed", "epochs")
    calibration = dict.fromkeys((*numbers, "loss_before", "loss_after"), 0.12345678901234566)
    content: dict[str, Any] = {
        "format": "fusionkit-bundle",
        "format_version": 6,
        "base_fingerprint": sha,
        "codec": codec,
        "base": {
            "source": base.label,
            "strip_prefix": base.strip_prefix,
            "add_prefix": base.add_prefix,
            "tensors": {
                name: {
                    "dtype": str(base.specs[name].dtype).removeprefix("torch."),
                    "shape": list(base.specs[name].shape),
                    "role": role,
                    "sha256": sha[:16],
                }
                for name, role in family.roles.items()
            },
            "tied": family.tied,
            "space": family.space.to_json() if family.space else {},
            "stacks": family.stacks,
            "rename": family.rename,
            "ignore": family.ignore,
            "kinds": dict(known.kinds) if known else {},
            "architecture": dict(known.record) if known else {},
            "variant": base.variant,
            "dequantized": base.dequantized,
        },
        "private": family.private_patterns,
        "frozen": family.frozen_patterns,
        "shared": file,
        "tasks": {
            task: {
                "file": file,
                "private": family.private[task],
                "private_bytes": _NUMBER,
                "checkpoint_bytes": _NUMBER,
                "calibration": calibration,
            }
            for task in family.tasks
        },
        "checksum": sha,
    }
    return len(json_text(content)) + 1


def _text(name: str) -> int:
    return len(json.dumps(name, ensure_ascii=False).encode())
