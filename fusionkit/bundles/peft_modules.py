"""Which modules of a model PEFT's LoRA layers can stand in for, with the same outputs.

A LoRA layer calls the module that it wraps, and adds its own product. That is the module's output
where the module is of exactly one of the classes that PEFT knows, and nothing but its call is
used: code that reads `self.proj.weight` itself goes past the LoRA.
"""

import ast
import copy
import inspect
import re
import textwrap
from collections.abc import Hashable, Iterator, Mapping
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from fusionkit.bundles.bundle import Bundle
from fusionkit.checkpoints.adapters.kinds import Form
from fusionkit.checkpoints.from_config import from_record
from fusionkit.errors import BundleError

_FORMS: dict[type[nn.Module], Form] = {
    nn.Linear: "linear",
    nn.Embedding: "embedding",
    nn.Conv1d: "conv",
    nn.Conv2d: "conv",
    nn.Conv3d: "conv",
}
_EMBEDDINGS = re.compile(r"embed|(^|[._])(w[tp]e|shared)$", re.IGNORECASE)
_KINDS: Mapping[str, Form] = {
    "linear": "linear",
    "transposed": "transposed",
    "embedding": "embedding",
    "convolution": "conv",
}
_HARMLESS = {"dtype", "device", "shape", "ndim", "size", "dim", "is_meta", "numel"}
"""What may be read of a module's weight."""
_KEPT = {"in_features", "out_features", "training", "forward"}
"""What PEFT's layers have, as the modules that they wrap."""
_BEFORE = re.compile(
    r"__init__|_?(init|reset|tie|untie|set|resize|prune|load|save|quantize|fuse|unfuse)_?\w*"
)
"""Methods that are called before a model is used."""


def structure_of(bundle: Bundle) -> nn.Module | None:
    """The base's module, without weights, on the meta device; None where it is not known.

    Its names are those that the bundle has.
    """
    known = bundle.base.architecture
    if known is None:
        record = bundle.manifest.base.architecture
        known = from_record(record, str(bundle.path)) if record else None
    if known is None or known.module is None:
        return None
    names = known.module.state_dict().keys()
    here = {name for name in bundle.whole_base if name in names}
    return blank(known.module) if here else None


def blank(module: nn.Module) -> nn.Module:
    """A copy of a module without its values, which take no memory: on the meta device."""
    memo: dict[int, object] = {}
    for parameter in module.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo)


def forms_of(model: nn.Module) -> dict[str, Form]:
    """Names of the weights that a LoRA can be put on → how they lie."""
    direct = read_directly(model)
    found: dict[str, Form] = {}
    for path, module in model.named_modules():
        form = _form(module)
        if form and path and path not in direct:
            found[f"{path}.weight"] = form
    return found


def recorded_forms(bundle: Bundle) -> dict[str, Form]:
    """How weights lie, as the bundle has it on record, or as names and shapes tell."""
    record = bundle.manifest.base
    known = {name: _KINDS[kind] for name, kind in record.kinds.items() if kind in _KINDS}
    shapes = {name: tensor.shape for name, tensor in record.tensors.items()}
    layouts = None if record.kinds else _Layouts(shapes)
    found: dict[str, Form] = {}
    for name in record.names("delta"):
        module, _, leaf = name.rpartition(".")
        if len(shapes[name]) < 2 or leaf != "weight" or not module:
            continue
        if layouts is None:
            if name in known:
                found[name] = known[name]
        elif len(shapes[name]) > 2:
            found[name] = "conv"
        elif _EMBEDDINGS.search(module.rpartition(".")[2]) and f"{module}.bias" not in shapes:
            found[name] = "embedding"
        else:
            found[name] = layouts.of(name)
    return found


class _Layouts:
    """Whether matrices lie as (out, in) or (in, out): by the biases beside those not square."""

    def __init__(self, shapes: Mapping[str, list[int]]) -> None:
        self._known: dict[str, Form] = {
            name: "transposed" if shapes[bias][0] == shape[1] else "linear"
            for name, shape in shapes.items()
            if len(shape) == 2 and shape[0] != shape[1] and name.endswith(".weight")
            if (bias := name.removesuffix("weight") + "bias") in shapes
        }

    def of(self, name: str) -> Form:
        """One matrix's; a square one, or one without bias, is as all others are."""
        if name in self._known:
            return self._known[name]
        found = set(self._known.values()) or {"linear"}
        if len(found) > 1:
            raise BundleError(
                f"the model has matrices of both layouts, and '{name}' does not show which it has; "
                "give the base as a folder with its config.json, or as a live model"
            )
        return next(iter(found))


def read_directly(model: nn.Module) -> set[str]:
    """Modules whose tensors or settings are read by the code of others, as far as it can be seen.

    `self.proj.weight` in a method of the class that has `proj`, say.
    """
    found = set()
    for path, module in model.named_modules():
        for chain in _chains(cast(Hashable, type(module))):
            at, names = module, list(chain)
            where = [path] if path else []
            while names and isinstance(child := at._modules.get(names[0]), nn.Module):
                at, where = child, [*where, names.pop(0)]
            if at is not module and names and not _is_harmless(at, names):
                found.add(".".join(where))
    return found


def _form(module: nn.Module) -> Form | None:
    if type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers."):
        return "transposed"
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups != 1:
        return None
    form = _FORMS.get(type(module))
    if form is None and isinstance(module, nn.Linear | nn.Embedding) and _acts_as_its_base(module):
        return "linear" if isinstance(module, nn.Linear) else "embedding"
    return form


def _acts_as_its_base(module: nn.Linear | nn.Embedding) -> bool:
    """Whether a subclass of a layer gives the layer's own output; tried on a few values."""
    tried = copy.copy(module)
    weight = nn.Parameter(torch.randn(5, 3))
    has_bias = module._parameters.get("bias") is not None
    bias = nn.Parameter(torch.randn(5)) if has_bias else None
    tried._parameters = {**module._parameters, "weight": weight}
    if has_bias:
        tried._parameters["bias"] = bias
    try:
        with torch.no_grad():
            if isinstance(module, nn.Linear):
                x = torch.randn(2, 3)
                found, expected = tried(x), nn.functional.linear(x, weight, bias)
            else:
                ids = torch.tensor([[1, 4, 2]])
                found, expected = tried(ids), nn.functional.embedding(ids, weight)
    except Exception:  # it is called otherwise, or looks at its sizes
        return False
    return isinstance(found, Tensor) and torch.equal(found, expected)


def _is_harmless(module: nn.Module, names: list[str]) -> bool:
    name, *rest = names
    if name in module._parameters:
        return bool(rest) and rest[0] in _HARMLESS
    return name in _KEPT or callable(getattr(type(module), name, None))


@lru_cache(maxsize=4096)
def _chains(kind: Any) -> frozenset[tuple[str, ...]]:
    """Attributes of attributes that a class's methods read: `("proj", "weight")`."""
    found: set[tuple[str, ...]] = set()
    for each in kind.__mro__:
        if each.__module__.startswith("torch.") or each in (nn.Module, object):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(each)))
        except (OSError, TypeError, SyntaxError):
            continue  # made by code, or in a notebook that is gone
        for method in ast.walk(tree):
            if isinstance(method, ast.FunctionDef) and not _BEFORE.fullmatch(method.name):
                found |= set(_reads(method))
    return frozenset(found)


def _reads(node: ast.AST) -> Iterator[tuple[str, ...]]:
    """Whole chains, `self.proj.weight.dtype` once; not those whose class alone is asked for."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        asked = node.func.id in {"isinstance", "hasattr"}
        for argument in node.args[1:] if asked else node.args:
            yield from _reads(argument)
        for keyword in node.keywords:
            yield from _reads(keyword.value)
    elif chain := _chain(node):
        if len(chain) > 1:
            yield chain
    else:
        for child in ast.iter_child_nodes(node):
            yield from _reads(child)


def _chain(node: ast.AST) -> tuple[str, ...]:
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return tuple(names) if isinstance(node, ast.Name) and node.id == "self" else ()
