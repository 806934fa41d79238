"""An adapter held against PEFT's own model: built without weights, and asked."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusionkit.bundles.peft_adapter import Adapter, Shape, module_of, stack_rank
from fusionkit.bundles.peft_modules import blank
from fusionkit.checkpoints.adapters.adapter import CONFIG, LINEARIZED
from fusionkit.checkpoints.adapters.folder import PREFIX
from fusionkit.errors import BundleError, listing

_ENOUGH = 1 << 24
"""Entries of weights that are rebuilt, beside the smallest of each form."""
_TOLERANCE = {"fp32": 1e-3, "fp16": 5e-3, "bf16": 4e-2}
_INSIDE = ".base_layer"


@dataclass(frozen=True)
class Place:
    """Where PEFT has factors.

    Attributes:
        key: what their names begin with.
        swapped: it takes a stack's matrices for (out, in).
    """

    key: str
    swapped: bool = False


@dataclass(frozen=True)
class Fit:
    """What PEFT makes of a config.

    Attributes:
        places: weight, or stack → where its factors are.
        wrong: weights and stacks that it does not adapt, or by factors of other shapes.
    """

    places: Mapping[str, Place]
    wrong: list[str]


def make_config(config: Mapping[str, Any]) -> Any:
    """PEFT's own config of these settings; what it does not know is left out."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    kinds: Any = PEFT_TYPE_TO_CONFIG_MAPPING
    make = kinds["LORA" if config["peft_type"] == LINEARIZED else config["peft_type"]]
    known = {field.name for field in fields(make)}
    settings = {key: value for key, value in config.items() if key in known}
    return make(**{**settings, "inference_mode": True})


def fit(model: nn.Module, adapter: Adapter, config: Mapping[str, Any]) -> Fit:
    """See what PEFT adapts by a config, and by factors of which shapes.

    Args:
        model: the base's module, on the meta device; it is not changed.
        adapter: what is to be adapted.
        config: the config.

    Raises:
        BundleError: PEFT refuses it.
    """
    layers = dict(_layers(_adapted(model, config, adapter.shapes)))
    wrong: list[str] = []
    places: dict[str, Place] = {}
    for name, factors in adapter.factors.items():
        layer = layers.get(name)
        kind = "embedding" if factors.form == "embedding" else "weight"
        found = _factor_shapes(layer[1], kind) if layer else None
        if layer is None or found != (factors.a.shape, factors.b.shape):
            wrong.append(name)
        else:
            places[name] = Place(layer[0])
    for name, products in adapter.stacks.items():
        layer = layers.get(name)
        count, rows, columns = adapter.shapes[name]
        length = count * stack_rank(products)
        found = _factor_shapes(layer[1], "weight") if layer and count > 1 else None
        swapped = bool(layer and getattr(layer[1], "_did_swap_in_out_features", False))
        inputs, outputs = (columns, rows) if swapped else (rows, columns)
        if layer is None or found != ((length, inputs), (outputs, length)):
            wrong.append(name)
        else:
            places[name] = Place(layer[0], swapped)
    return Fit(places, wrong)


def check(
    model: nn.Module,
    folder: Path,
    shapes: Mapping[str, Shape],
    delta_of: Callable[[str], tuple[Tensor, Tensor]],
    dtype: str,
) -> None:
    """Load an adapter into PEFT's own model: no key may be missing, or left over.

    Then weights are rebuilt by PEFT's own layers, and held against the bundle's: the smallest of
    each form at least, all of a small model.

    Args:
        model: the base's module, on the meta device; it is not changed.
        folder: the adapter's.
        shapes: of the task's tensors, where they are not the base's.
        delta_of: a weight's name → the base's tensor, and the task's delta, float32.
        dtype: of the factors.

    Raises:
        BundleError: PEFT would load another model.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    config = json.loads((folder / CONFIG).read_text())
    adapted = _adapted(model, config, shapes)
    layers = {name: layer for name, (_, layer) in _layers(adapted)}
    probes = _probes(layers, shapes)
    deltas = {name: delta_of(name) for name in probes}
    for name, (base, _) in deltas.items():
        owner = layers[name].get_base_layer()
        setattr(owner, name.rpartition(".")[2], nn.Parameter(base.clone(), requires_grad=False))
    weights = load_peft_weights(str(folder), device="cpu")
    with _quiet("can't load it"):
        told: Any = set_peft_model_state_dict(adapted, weights, low_cpu_mem_usage=True)
    marks = (".lora_", ".modules_to_save.", ".ia3_l")
    missing = [key for key in told.missing_keys if any(mark in key for mark in marks)]
    if missing or told.unexpected_keys:
        findings = [f"'{key}' is missing" for key in missing]
        findings += [f"'{key}' is left over" for key in told.unexpected_keys]
        raise BundleError(f"PEFT would not load the adapter whole:{listing(findings)}\n{_MEND}")
    for name, (base, delta) in deltas.items():
        found = layers[name].get_delta_weight("default").to(torch.float32)
        error, size = (found - delta).norm(), delta.norm()
        if error > _TOLERANCE[dtype] * size + 1e-6 * base.to(torch.float32).norm():
            raise BundleError(
                f"PEFT would rebuild another '{name}' (off by {float(error / size):.1e} of its "
                f"delta)\n{_MEND}"
            )


_MEND = "export the whole model (--format model), or give leave_out patterns of these tensors"


def _adapted(model: nn.Module, config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> nn.Module:
    from peft import PeftModel

    model = blank(model)
    for name, tensor in list(model.state_dict(keep_vars=True).items()):
        if name in shapes and tuple(tensor.shape) != tuple(shapes[name]):
            owner, leaf = model.get_submodule(module_of(name)), name.rpartition(".")[2]
            size = torch.empty(shapes[name], dtype=tensor.dtype, device="meta")
            setattr(owner, leaf, nn.Parameter(size) if isinstance(tensor, nn.Parameter) else size)
    with _quiet("can't adapt the model"):
        wrapped: Any = PeftModel
        made: nn.Module = wrapped(model, make_config(config), low_cpu_mem_usage=True)
    return made


@contextmanager
def _quiet(what: str) -> Iterator[None]:
    """Without PEFT's advice; what it refuses is told."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).partition("\n")[0][:300]
        raise BundleError(f"PEFT {what} ({type(error).__name__}: {reason})\n{_MEND}") from error


def _layers(model: nn.Module) -> Iterator[tuple[str, tuple[str, Any]]]:
    """Adapted weights: name, what the names of its factors begin with, and PEFT's layer."""
    from peft.tuners.lora.layer import LoraLayer, MultiheadAttention

    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            joint = "in_proj_weight" if isinstance(module, MultiheadAttention) else "weight"
            leaf = getattr(module, "parameter_name", joint)
            plain = path.removeprefix(PREFIX).replace(_INSIDE, "")
            yield f"{plain}.{leaf}", (path.removeprefix(PREFIX), module)


def _factor_shapes(layer: Any, kind: str) -> tuple[Shape, Shape] | None:
    if kind == "embedding":
        if "default" not in layer.lora_embedding_A:
            return None
        return layer.lora_embedding_A["default"].shape, layer.lora_embedding_B["default"].shape
    if "default" not in layer.lora_A:
        return None
    return layer.lora_A["default"].weight.shape, layer.lora_B["default"].weight.shape


def _probes(layers: Mapping[str, Any], shapes: Mapping[str, Shape]) -> list[str]:
    """Weights to rebuild: the smallest of each kind of layer, and others while they are few."""
    found, kinds, entries = [], set(), 0
    for name in sorted(layers, key=lambda name: torch.Size(shapes[name]).numel()):
        size, kind = torch.Size(shapes[name]).numel(), type(layers[name])
        if kind not in kinds or entries + size <= _ENOUGH:
            found.append(name)
            kinds.add(kind)
            entries += size
    return found


def check_names(adapter: Adapter, config: Mapping[str, Any]) -> None:
    """Where the class is not known: see that PEFT's matching of names finds what is meant.

    Raises:
        BundleError: it would adapt other modules, or by another rank.
    """
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    made = make_config(config)
    modules = {module_of(name) for name in adapter.shapes} - {""}
    found = {module for module in modules if check_target_module_exists(made, module)}
    wrong = found ^ {module_of(name) for name in adapter.factors}
    for module, rank in adapter.ranks.items():
        key = get_pattern_key(made.rank_pattern.keys(), module)
        if made.rank_pattern.get(key, made.r) != rank:
            wrong.add(module)
    if wrong:
        findings = [f"'{module}'" for module in sorted(wrong)]
        raise BundleError(f"PEFT's patterns can't tell these modules:{listing(findings)}\n{_MEND}")
