"""What a plugin's source says of its class, read and not run: its imports alone take seconds.

Read is what is written as a plugin is as a rule: a dataclass at the top of its file, its id as
text, every module that the file imports installed. Of whatever is written otherwise nothing is
said here, so that it is imported, and the import's own error shown.
"""

import ast
from collections.abc import Iterable
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path

import fusionkit


def summary_in_source(point: EntryPoint) -> str | None:
    """The first line of a plugin's docstring; None where only an import can say it.

    Args:
        point: its entry point.
    """
    try:
        spec = _found(point.module)
        if spec is None or not (spec.origin or "").endswith(".py"):
            return None
        tree = ast.parse(Path(spec.origin or "").read_bytes())
    except (ImportError, OSError, SyntaxError, ValueError):
        return None
    own = [each for each in tree.body if isinstance(each, ast.ClassDef) and each.name == point.attr]
    if len(own) != 1 or not _is_dataclass(own[0]) or _id_of(own[0]) != point.name:
        return None
    if not all(map(_is_there, _imports(tree))):
        return None
    return (ast.get_docstring(own[0]) or "").partition("\n")[0]


def _found(module: str) -> ModuleSpec | None:
    """Where a module is; unlike `find_spec` it imports no package that the module is in."""
    first, *inside = module.split(".")
    spec, name = find_spec(first), first
    for each in inside:
        name = f"{name}.{each}"
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(name, spec.submodule_search_locations)
    return spec


def _is_dataclass(node: ast.ClassDef) -> bool:
    names = {ast.unparse(each).partition("(")[0] for each in node.decorator_list}
    return bool(names & {"dataclass", "dataclasses.dataclass"})


def _id_of(node: ast.ClassDef) -> object:
    """The text that a class's `id` is set to."""
    for each in node.body:
        targets = each.targets if isinstance(each, ast.Assign) else [getattr(each, "target", None)]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        value = getattr(each, "value", None)
        if names == ["id"] and isinstance(value, ast.Constant):
            return value.value
    return None


def _imports(tree: ast.Module) -> Iterable[tuple[str, tuple[str, ...]]]:
    """The modules that a file imports as it is imported itself, and the names from each."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, tuple(alias.name for alias in node.names)


def _is_there(wanted: tuple[str, tuple[str, ...]]) -> bool:
    module, names = wanted
    if module == fusionkit.__name__ and not {*names} <= {*fusionkit.__all__}:
        return False
    try:
        return _found(module) is not None
    except (ImportError, ValueError):
        return False
