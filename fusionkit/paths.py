"""Paths that recipes may name."""

from importlib.util import find_spec
from pathlib import Path

from fusionkit.errors import FusionKitError

_SCHEME = "package:"


def resolve_package_path(path: str) -> str:
    """Turn `package:NAME/FOLDER` into the folder of the installed package; leave others alone.

    Raises:
        FusionKitError: the package is not installed.
    """
    if not path.startswith(_SCHEME):
        return path
    name, _, inside = path.removeprefix(_SCHEME).partition("/")
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FusionKitError(
            f"{path}: no package '{name}' is installed; pip install {name.replace('_', '-')}"
        )
    return str(Path(spec.submodule_search_locations[0]) / inside)
