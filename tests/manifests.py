"""A bundle's manifest, changed so that its checksum agrees again, as whoever means harm would."""

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
