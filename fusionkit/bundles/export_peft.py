"""Write one task as a PEFT adapter: a LoRA extracted from its bundle, whatever it was before."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.export_model import DTYPES
from fusionkit.bundles.peft_adapter import (
    Adapter,
    Factors,
    full_rank,
    lora_keys,
    module_of,
    stacked,
)
from fusionkit.bundles.peft_check import (
    Place,
    check,
    check_names,
    fit,
    make_config,
)
from fusionkit.bundles.peft_modules import forms_of, recorded_forms, structure_of
from fusionkit.bundles.side_files import base_folder
from fusionkit.bundles.space import adapter_needs
from fusionkit.bundles.weights import TaskWeights
from fusionkit.checkpoints.adapters.adapter import CONFIG
from fusionkit.checkpoints.adapters.folder import PREFIX, TENSORS
from fusionkit.checkpoints.adapters.kinds import Form, LoraModule
from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.checkpoints.checkpoint import matches
from fusionkit.checkpoints.disk import Needed, check_space
from fusionkit.checkpoints.output_folder import check_replaceable, new_folder
from fusionkit.checkpoints.paths import open_path
from fusionkit.checkpoints.rounding import rounded
from fusionkit.checkpoints.stacks import row_name, rows_of
from fusionkit.codecs.base import DeltaCodec
from fusionkit.codecs.decomposition import svd_gram
from fusionkit.errors import BundleError, listing
from fusionkit.task_vectors.task_source import folded_tensor

Server = Literal["vllm"]
_LARGEST_SERVED = 512


def export_adapter(
    bundle: Bundle,
    task: str,
    out: str | Path,
    *,
    rank: int | None = None,
    lora_only: bool = False,
    leave_out: Sequence[str] = (),
    for_server: Server | None = None,
    base_name: str | None = None,
    dtype: str = "fp16",
    overwrite: bool = False,
) -> list[str]:
    """Write a task as a folder that `PeftModel.from_pretrained` loads, with the same outputs.

    Weights of linear layers, embeddings and convolutions, and stacks of experts, become LoRA
    factors with alpha = rank, the scale split evenly over both factors; biases of adapted modules
    go along as they are, and what is no LoRA (heads, norms, matrices that the codec kept whole) as
    `modules_to_save`. Of tied weights one has factors, the others are saved whole, so that outputs
    are the same before and after PEFT's `merge_and_unload`. A linearized adapter is folded into a
    plain LoRA, which is exact.

    What holds a weight is the model's own word, where its class is known: by its configuration, or
    since it is live. Then the adapter is loaded into PEFT's own model, without weights, before the
    folder appears: no key may be missing or left over, and weights that PEFT's layers rebuild must
    be the bundle's. Else names and the lengths of biases tell embeddings and layouts, and the
    config alone is held against the names.

    Args:
        bundle: the bundle, its base at hand.
        task: one of its tasks.
        out: the folder to write, of the local disk or a URL; it appears whole or not at all.
        rank: cut the deltas of codecs that have no factors (anything but SVD or adapters) to
            this rank by SVD, which changes outputs.
        lora_only: leave out whatever is not a LoRA; some servers read nothing else. A tied
            embedding is none.
        leave_out: patterns (`*embed_tokens*`) of tensors to leave out.
        for_server: leave out what this server refuses: `vllm` takes the linear layers of a
            language model's attention and MLP alone, of rank 512 at most.
        base_name: what the adapter says that its base is; by default its path.
        dtype: of the factors: fp32, fp16 or bf16; what is stored whole keeps its own.
        overwrite: replace an adapter that is there.

    Returns:
        the names of the tensors that were left out.

    Raises:
        BundleError: the codec has no factors and no rank is given, a tensor fits neither a LoRA
            nor a module (and `lora_only` is not set), a square matrix's layout can't be told, a
            factor is too large for fp16, the adapter would change nothing, PEFT would not load
            it whole, or the folder exists.
        WrongBaseError: the base at hand is another model.
    """
    if dtype not in DTYPES:
        raise BundleError(f"unknown dtype '{dtype}'; expected {', '.join(DTYPES)}")
    if for_server not in (None, "vllm"):
        raise BundleError(f"unknown server '{for_server}'; expected vllm")
    out = open_path(out)
    check_replaceable(out, overwrite, known_by=CONFIG)
    weights = TaskWeights(bundle, task)
    check_space(out, adapter_needs(bundle, [task], rank, DTYPES[dtype], leave_out))
    model = structure_of(bundle)
    adapter = Adapter(_shapes(bundle, task, weights, model), bundle.tied)
    if bundle.space:
        _take_adapter(adapter, bundle, task)
    else:
        _take_weights(adapter, bundle, task, rank, model)
    _leave_out_rows(adapter, bundle, task, leave_out, lora_only or for_server is not None)
    adapter.leave_out(n for n in _names(adapter) if matches(n, leave_out))
    if for_server:
        adapter.leave_out(n for n in _names(adapter) if not adapter.is_served(n))
    config, places = _fitted(adapter, bundle, task, model, lora_only or for_server is not None)
    if for_server and config["r"] > _LARGEST_SERVED:
        raise BundleError(
            f"task '{task}' needs rank {config['r']}, and vLLM takes {_LARGEST_SERVED} at most; "
            f"compress with SVD(rank={_LARGEST_SERVED}) or less"
        )
    config["base_model_name_or_path"] = base_name or _base_name(bundle)
    what = f"{bundle.path}: task '{task}': factor"
    tensors = dict(_tensors(adapter, weights, places, DTYPES[dtype], what))
    taken = sum(tensor.nbytes for tensor in tensors.values())
    with new_folder(out, overwrite, CONFIG, needed=Needed(taken, taken)) as folder:
        save_file(tensors, folder / TENSORS[0], metadata={"format": "pt"})
        make_config(config).save_pretrained(str(folder))
        if model is not None:
            moved = {n: s for n, s in adapter.shapes.items() if n in adapter.whole}
            shapes = {**adapter.shapes, **moved}
            check(model, folder, shapes, _deltas(adapter, bundle, task, places), dtype)
        elif not adapter.own:
            check_names(adapter, config)
    return sorted(adapter.left_out)


def _leave_out_rows(
    adapter: Adapter, bundle: Bundle, task: str, leave_out: Sequence[str], lora_only: bool
) -> None:
    """Rows that a task added to the vocabulary, which no adapter of the base has a place for.

    Raises:
        BundleError: there are some, and they may not be left out.
    """
    added = bundle.added(task)
    kept = [name for name in added if not lora_only and not matches(name, leave_out)]
    if kept:
        raise BundleError(
            f"task '{task}' adds rows to the vocabulary, which an adapter of a base without them "
            f"has no place for:{listing([repr(name) for name in kept])}\nexport the whole model, "
            "or set lora_only to leave out all that is not a LoRA"
        )
    adapter.left_out.update(added)


def _fitted(
    adapter: Adapter, bundle: Bundle, task: str, model: nn.Module | None, lora_only: bool
) -> tuple[dict[str, Any], Mapping[str, Place]]:
    """Bring an adapter to what PEFT can hold of this model.

    Returns:
        the adapter's config, and where PEFT has stacks of experts.

    Raises:
        BundleError: there is nothing to adapt, or a tensor has no place.
    """
    while True:
        adapter.tie(model)
        if lora_only:
            adapter.leave_out(adapter.whole)
        homeless = adapter.complete()
        if homeless:
            raise BundleError(
                f"a PEFT adapter has no place for tensors outside a module of their own:"
                f"{listing([repr(name) for name in homeless])}\nset lora_only to leave out all "
                "that is not a LoRA"
            )
        if adapter.is_empty:
            raise _nothing(adapter, bundle, task)
        config = _config(adapter, bundle)
        if model is None or adapter.own:
            return config, {n: Place(module_of(n)) for n in adapter.factors}
        fitting = fit(model, adapter, config)
        if not fitting.wrong:
            return config, fitting.places
        adapter.save_whole(fitting.wrong)


def _nothing(adapter: Adapter, bundle: Bundle, task: str) -> BundleError:
    if adapter.left_out:
        return BundleError(
            f"the adapter of task '{task}' would change nothing: all that differs from the base is "
            f"left out:{listing([repr(name) for name in sorted(adapter.left_out)])}\nleave out "
            "less, or export the whole model"
        )
    if adapter.whole:
        return BundleError(
            f"{bundle.codec!r} has kept every matrix whole, so that there is no LoRA to write; "
            "give a rank to cut them to"
        )
    return BundleError(
        f"task '{task}' does not differ from the base, so that its adapter would change nothing; "
        "use the base"
    )


def _shapes(
    bundle: Bundle, task: str, weights: TaskWeights, model: nn.Module | None
) -> dict[str, tuple[int, ...]]:
    """The task's tensors, all names of tied ones among them → shape."""
    base = bundle.whole_base
    known = {} if model is None else model.state_dict()
    found = {name: tuple(tensor.shape) for name, tensor in known.items()}
    found.update({name: tuple(base.specs[name].shape) for name in weights if name in base})
    found.update({a: found[to] for a, to in bundle.tied.items() if to in found})
    found.update({name: tuple(t.shape) for name, t in bundle.private_tensors(task)})
    return found


def _take_adapter(adapter: Adapter, bundle: Bundle, task: str) -> None:
    """The adapter itself, as the bundle gives it back."""
    space = bundle.space
    assert space is not None
    tensors = bundle.adapter_tensors(task)
    if space.layout.kind == "ia3":
        adapter.own = tensors
    for module in space.layout.modules:
        if isinstance(module, LoraModule):
            name = module.targets[0]
            product = module.low_rank(tensors, bundle.initial)
            adapter.factors[name] = Factors.of(module.form, product, adapter.shapes[name])
            adapter.whole.update(module.targets[1:])
        elif space.layout.kind != "ia3":
            adapter.whole.update(module.targets)
    adapter.whole.update(_moved(bundle, task, set(space.layout.tensors)))


def _take_weights(
    adapter: Adapter, bundle: Bundle, task: str, rank: int | None, model: nn.Module | None
) -> None:
    """Factors of every matrix that can have them, and the rest whole."""
    forms = forms_of(model) if model is not None else recorded_forms(bundle)
    rows = rows_of(bundle.stacks) if model is not None else {}
    has_factors = type(bundle.codec).factors is not DeltaCodec.factors
    kept: dict[str, Tensor] = {}
    lacking = []
    for name in bundle.manifest.base.names("delta"):
        if name not in forms and name not in rows:
            continue
        product = bundle.factors(task, name)
        delta = bundle.delta(task, name) if product is None else None
        if delta is not None and delta.any():
            matrix = delta.reshape(delta.shape[0], -1)
            if rank is not None:
                product = svd_gram(matrix, rank).cut(min(rank, *matrix.shape))
                adapter.cut.add(rows[name][0] if name in rows else name)
            elif has_factors:
                kept[name] = matrix
            else:
                lacking.append(f"'{name}'")
        if product is not None:
            _put(adapter, bundle, name, forms, product)
    if lacking:
        raise BundleError(
            f"{bundle.codec!r} has no low-rank factors of:{listing(lacking)}\n"
            "give a rank to cut them to, or compress with SVD"
        )
    most = max(adapter.ranks.values(), default=0)
    for name, matrix in kept.items():
        if min(matrix.shape) <= most:
            _put(adapter, bundle, name, forms, full_rank(matrix))
        elif name in rows:
            adapter.save_whole([rows[name][0]])
        else:
            adapter.whole.add(name)
    done = {*adapter.factors, *adapter.stacks, *kept}
    adapter.whole.update(_moved(bundle, task, done))


def _put(
    adapter: Adapter, bundle: Bundle, name: str, forms: Mapping[str, Form], product: LowRank
) -> None:
    """Add a product, unless it is zero."""
    if not (product.left.any() and product.right.any()):
        return
    for stack, count in bundle.stacks.items():
        if name.startswith(f"{stack}[") and stack not in adapter.whole:
            products = adapter.stacks.setdefault(stack, [None] * count)
            products[[row_name(stack, i) for i in range(count)].index(name)] = product
            return
    if name in forms:
        adapter.factors[name] = Factors.of(forms[name], product, adapter.shapes[name])


def _moved(bundle: Bundle, task: str, done: set[str]) -> Iterator[str]:
    """Tensors that are the task's own, or differ from the base's."""
    yield from bundle.manifest.tasks[task].private
    rows = rows_of(bundle.stacks)
    for name in bundle.manifest.base.names("delta"):
        whole = rows[name][0] if name in rows else name
        if name not in done and whole not in done:
            delta = bundle.delta(task, name)
            if delta is not None and delta.any():
                yield whole
    yield from (name for name, _ in bundle.exact(task))


def _names(adapter: Adapter) -> list[str]:
    return [*adapter.factors, *adapter.stacks, *adapter.whole]


def _config(adapter: Adapter, bundle: Bundle) -> dict[str, Any]:
    space = bundle.space
    kept = ("task_type", "revision")
    if space and adapter.own:
        saved = {"modules_to_save": adapter.modules_to_save or None}
        return {**space.config, **saved}
    own = {key: space.config.get(key) for key in kept} if space else {}
    return {**own, **adapter.config()}


def _base_name(bundle: Bundle) -> str | None:
    """What the base is called: by its adapters, by its path, or by the live model."""
    record = bundle.manifest.base
    named = record.space.config.get("base_model_name_or_path") if record.space else None
    if named:
        return str(named)
    source = bundle.base.label if bundle.base.files else record.source
    if bundle.base.files or base_folder(bundle) is not None:
        return source.removeprefix("hf://")
    known = bundle.base.architecture
    config = getattr(known.skeleton if known else None, "config", None)
    return getattr(config, "_name_or_path", None) or None


def _tensors(
    adapter: Adapter,
    weights: TaskWeights,
    places: Mapping[str, Place],
    dtype: torch.dtype,
    what: str,
) -> Iterator[tuple[str, Tensor]]:
    """The adapter's tensors under PEFT's names."""
    for name, place in places.items():
        if name in adapter.factors:
            found = adapter.factors[name]
            keys, made = lora_keys(place.key, found.form), (found.a, found.b)
        else:
            keys = lora_keys(place.key, "linear")
            made = stacked(adapter.stacks[name], adapter.shapes[name], place.swapped)
        for key, tensor in zip(keys, made, strict=True):
            yield PREFIX + key, rounded(tensor, dtype, f"{what} '{key}'").contiguous()
    for name, tensor in adapter.own.items():
        yield PREFIX + name, rounded(tensor, dtype, f"{what} '{name}'").contiguous()
    for name in sorted(adapter.whole):
        known = adapter.tied.get(name, name)
        if known in weights:
            yield PREFIX + adapter.key_of(name), weights[known].clone()


def _deltas(adapter: Adapter, bundle: Bundle, task: str, places: Mapping[str, Place]) -> Any:
    """For the check: a weight's name → the base's tensor, and the delta that is meant."""
    base, initial = bundle.base, bundle.initial

    def one(name: str) -> tuple[Tensor, Tensor]:
        start = base[name]
        whole = folded_tensor(bundle, task, name, start, initial)
        return start, whole.to(torch.float32) - start.to(torch.float32)

    def cut(name: str) -> tuple[Tensor, Tensor]:
        product = adapter.factors[name]
        a, b = product.a.flatten(1), product.b.flatten(1)
        delta = b @ a
        if product.form in {"transposed", "embedding"}:
            delta = delta.mT
        return base[name], delta.reshape(adapter.shapes[name])

    def of(name: str) -> tuple[Tensor, Tensor]:
        count = bundle.stacks.get(name)
        if count is None:
            return cut(name) if name in adapter.cut else one(name)
        rows = [one(row_name(name, i)) for i in range(count)]
        start = torch.stack([row[0] for row in rows])
        if name not in adapter.cut:
            return start, torch.stack([row[1] for row in rows])
        products = adapter.stacks[name]
        shape = torch.Size(start.shape[1:])
        zero = torch.zeros(shape)
        return start, torch.stack([zero if p is None else p.dense(shape) for p in products])

    return of
