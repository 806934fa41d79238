"""The plugins of this repository: distributions of their own that use the public API alone."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from fusionkit.registry import GROUPS, load, origin

FOLDERS = sorted((Path(__file__).parents[1] / "plugins").glob("fusionkit-*"))
PUBLIC = {
    "fusionkit",
    "fusionkit.codecs.decomposition",
    "fusionkit.codecs.layout",
    "fusionkit.codecs.merged",
    "fusionkit.codecs.operands",
    "fusionkit.codecs.packing",
    "fusionkit.codecs.values",
    "fusionkit.errors",
    "fusionkit.task_vectors",
    "fusionkit.testing",
}
"""As the README lists them."""


def project(folder: Path) -> dict[str, object]:
    content: dict[str, object] = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return content


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def plugin(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.param
    try:
        distribution(folder.name)
    except PackageNotFoundError:
        pytest.skip(f"not installed: pip install ./plugins/{folder.name}")
    return folder


def test_they_are_all_here() -> None:
    names = {"bitdelta", "compeft", "dare", "jd", "lossless", "tallmask", "tsv"}
    assert {folder.name for folder in FOLDERS} == {f"fusionkit-{name}" for name in names}


def test_it_has_what_a_distribution_needs(plugin: Path) -> None:
    content = project(plugin)
    assert content["name"] == plugin.name
    assert (plugin / "README.md").read_text().startswith(f"# {plugin.name}\n")
    assert f"pip install ./plugins/{plugin.name}" in (plugin / "README.md").read_text()
    assert list((plugin / "tests").glob("test_*.py"))


def test_what_it_registers_loads_from_the_installed_distribution(plugin: Path) -> None:
    points = project(plugin)["entry-points"]
    assert isinstance(points, dict)
    assert points.keys() <= set(GROUPS)
    for group, names in points.items():
        for name in names:
            assert origin(load(group, name)) == (plugin.name, project(plugin)["version"])


def test_it_uses_the_public_api_alone(plugin: Path) -> None:
    [path] = plugin.glob("*.py")
    own = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fusionkit"):
            assert node.module in PUBLIC, f"{path.name} imports from {node.module}"
            assert not [a.name for a in node.names if a.name.startswith("_")], path.name
        if isinstance(node, ast.Import):
            assert all(alias.name in PUBLIC for alias in node.names if "fusionkit" in alias.name)
        if isinstance(node, ast.FunctionDef):
            own.add(node.name)
        private = isinstance(node, ast.Attribute) and re.match("_(?!_)", node.attr)
        if isinstance(node, ast.Attribute) and private:
            assert isinstance(node.value, ast.Name), ast.unparse(node)
            assert node.value.id == "self", ast.unparse(node)
    assert own


def test_listing_imports_none_of_them() -> None:
    """Names are found without importing a plugin, or what it needs."""
    code = (
        "import sys; from fusionkit.registry import GROUPS, names\n"
        "assert all(names(group) for group in GROUPS)\n"
        "assert not [m for m in sys.modules if m.startswith('fusionkit_')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
