"""A bundle's files, changed so that their checksums agree again, as whoever means harm would."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def sign(folder: Path, manifest: Json) -> None:
    """Write a manifest whose checksum agrees."""
    manifest.pop("checksum", None)
    text = json.dumps(manifest, sort_keys=True)
    manifest["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit(folder: Path, change: Callable[[Json], object]) -> None:
    """Change a manifest, and sign it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    sign(folder, manifest)


def replace_payload(folder: Path, name: str, header: bytes, data: bytes) -> None:
    """Write a file of parts, and its size and its header's digest into the manifest."""
    (folder / name).write_bytes(len(header).to_bytes(8, "little") + header + data)
    manifest: Json = json.loads((folder / "manifest.json").read_text())
    task = name.removeprefix("task-").removesuffix(".safetensors")
    shared = name.startswith("shared")
    record = manifest["shared"] if shared else manifest["tasks"][task]["file"]
    record["bytes"] = 8 + len(header) + len(data)
    record["header_sha256"] = hashlib.sha256(header).hexdigest()
    sign(folder, manifest)
