"""The packages, and what each may import: the docs' table, held to by the code's own imports."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = ROOT / "fusionkit"
PAGE = (ROOT / "docs/architecture.md").read_text()
ROWS = re.findall(r"^\| `(\w+)(?:/|\.py)` \| [^|]+ \| ([^|]+) \|$", PAGE, re.MULTILINE)
"""Package, and what the page says that it may import: names, or all above it."""
LIGHTNING = {"tasks", "reuse", "calibration", "cli"}


def allowed() -> dict[str, set[str]]:
    """Package → the packages it may import."""
    found: dict[str, set[str]] = {}
    for name, text in ROWS:
        above, named = set(found), set(re.findall(r"`(\w+)`", text))
        but = set(re.findall(r"`(\w+)`", text.partition("not ")[2]))
        may = above - but if text.startswith("all above") else named
        found[name] = {name, "errors", *may}
    return found


def imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it, but for the eyes of a type checker alone."""
    tree, found = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def modules() -> dict[str, Path]:
    """Every module of FusionKit by its dotted name."""
    files = {path.relative_to(ROOT).with_suffix(""): path for path in CODE.rglob("*.py")}
    return {".".join(name.parts).removesuffix(".__init__"): path for name, path in files.items()}


def package(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_the_table_names_every_package() -> None:
    parts = {p.stem for p in CODE.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert {name for name, _ in ROWS} == parts - {"__init__", "__pycache__"}
    assert [name for name, _ in ROWS][-1] == "cli"


def test_each_imports_only_what_the_table_says() -> None:
    may = allowed()
    wrong = [
        f"{module} imports {found}"
        for module, path in modules().items()
        for found in imports(path)
        if found.startswith("fusionkit.") and package(module)
        if package(found) not in may[package(module)]
    ]
    assert not wrong


def test_there_is_no_circle() -> None:
    """Among modules, whether imported at the start of a file or within a function."""
    known = modules()
    graph = {m: sorted(imports(path) & known.keys() - {m}) for m, path in known.items()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"circle: {' → '.join((*way, module))}"
        if module not in done:
            for each in graph[module]:
                if not module.startswith(f"{each}."):  # its own package's __init__
                    visit(each, (*way, module))
            done.add(module)

    for module in known:
        if known[module].name != "__init__.py":
            visit(module, ())


@pytest.mark.parametrize("module", sorted(modules()))
def test_lightning_is_where_training_is(module: str) -> None:
    if package(module) not in LIGHTNING:
        own = {name.split(".")[0] for name in imports(modules()[module])}
        assert not own & {"lightning", "torchmetrics"}


def test_the_start_is_quick() -> None:
    """By what it leaves out: each of these takes as long as all the rest."""
    slow = ("lightning", "torchmetrics", "transformers", "numba", "torch.distributed.tensor")
    code = f"import sys, fusionkit; print([m for m in {slow} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_are_small() -> None:
    lines = {m: len(path.read_text().splitlines()) for m, path in modules().items()}
    assert not {module: count for module, count in lines.items() if count > 400}


def test_functions_are_small() -> None:
    """Their docstrings apart."""

    def lines(node: ast.FunctionDef) -> int:
        first = node.body[0]
        text = first.value if isinstance(first, ast.Expr) else None
        said = (first.end_lineno or 0) - first.lineno + 1 if isinstance(text, ast.Constant) else 0
        return (node.end_lineno or 0) - node.lineno + 1 - said

    long = {
        f"{module}.{node.name}": lines(node)
        for module, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert not {name: count for name, count in long.items() if count > 60}
