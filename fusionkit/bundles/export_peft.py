"""Write one task as a PEFT adapter: a LoRA extracted from its bundle, whatever it was before."""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.export_model import DTYPES
from fusionkit.checkpoints.adapters.adapter import CONFIG, LINEARIZED
from fusionkit.checkpoints.adapters.folder import PREFIX, TENSORS
from fusionkit.checkpoints.adapters.kinds import Form, LoraModule
from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.checkpoints.output_folder import check_replaceable, new_folder
from fusionkit.checkpoints.paths import open_path
from fusionkit.checkpoints.rounding import rounded
from fusionkit.codecs.base import DeltaCodec
from fusionkit.codecs.decomposition import svd_gram
from fusionkit.errors import BundleError, listing

_EMBEDDINGS = re.compile(r"embed|(^|[._])w[tp]e$", re.IGNORECASE)


@dataclasses.dataclass
class _Adapter:
    """What goes into the folder; names as the base has them."""

    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    ranks: dict[str, int] = dataclasses.field(default_factory=dict)
    whole: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    has_bias: bool = False
    transposed: bool = False


def export_adapter(
    bundle: Bundle,
    task: str,
    out: str | Path,
    *,
    rank: int | None = None,
    lora_only: bool = False,
    dtype: str = "fp16",
    overwrite: bool = False,
) -> list[str]:
    """Write a task as a folder that `PeftModel.from_pretrained` loads, with the same outputs.

    Matrices become LoRA factors with alpha = rank, the scale split evenly over both factors;
    biases of adapted modules go along as they are, and what is no LoRA (heads, norms, matrices
    that the codec kept whole) as `modules_to_save`. A linearized adapter is folded into a plain
    LoRA, which is exact. Whether a matrix is an embedding is told by its name (`embed`, `wte`,
    `wpe`), and whether the model lays matrices out as (in, out), as GPT-2 does, by the lengths of
    its biases.

    Args:
        bundle: the bundle, its base at hand.
        task: one of its tasks.
        out: the folder to write, of the local disk or a URL; it appears whole or not at all.
        rank: cut the deltas of codecs that have no factors (anything but SVD or adapters) to
            this rank by SVD, which changes outputs.
        lora_only: leave out whatever is not a LoRA; some servers read nothing else.
        dtype: of the factors: fp32, fp16 or bf16; what is stored whole keeps its own.
        overwrite: replace an adapter that is there.

    Returns:
        the names of the tensors that were left out, where `lora_only` is set.

    Raises:
        BundleError: the codec has no factors and no rank is given, a tensor fits neither a LoRA
            nor a module (and `lora_only` is not set), a square matrix's layout can't be told, a
            factor is too large for fp16, or the folder exists.
        WrongBaseError: the base at hand is another model.
    """
    if dtype not in DTYPES:
        raise BundleError(f"unknown dtype '{dtype}'; expected {', '.join(DTYPES)}")
    out = open_path(out)
    check_replaceable(out, overwrite, known_by=CONFIG)
    space = bundle.manifest.base.space
    made = _of_space(bundle, task) if space else _of_weights(bundle, task, rank)
    if bundle.added(task) and not lora_only:
        raise BundleError(
            f"task '{task}' adds rows to the vocabulary, which an adapter of a base without them "
            f"has no place for:{listing([repr(name) for name in bundle.added(task)])}\nexport the "
            "whole model, or set lora_only to leave out all that is not a LoRA"
        )
    left_out = sorted({*made.whole, *bundle.added(task)}) if lora_only else []
    if lora_only:
        made.whole, made.has_bias = {}, False
    config = _config(bundle, made)
    what = f"{bundle.path}: task '{task}': factor"
    tensors = {
        PREFIX + name: rounded(tensor, DTYPES[dtype], f"{what} '{name}'").contiguous()
        for name, tensor in made.tensors.items()
    }
    for name, tensor in made.whole.items():
        module, _, leaf = name.rpartition(".")
        own = f"{module}.base_layer.{leaf}" if module in made.ranks else name
        tensors[PREFIX + own] = tensor.contiguous()
    with new_folder(out, overwrite, known_by=CONFIG) as folder:
        save_file(tensors, folder / TENSORS[0], metadata={"format": "pt"})
        _write_config(folder, config)
    return left_out


def _config(bundle: Bundle, made: _Adapter) -> dict[str, Any]:
    """PEFT's config of what was made.

    Raises:
        BundleError: a tensor that is stored whole is in no module of its own.
    """
    homeless = [
        f"'{name}'"
        for name in made.whole
        if _module(name) not in made.ranks and ("." not in name or _crowded(name, bundle))
    ]
    if homeless:
        raise BundleError(
            f"a PEFT adapter has no place for tensors outside a module of their own:"
            f"{listing(homeless)}\nset lora_only to leave out all that is not a LoRA"
        )
    space = bundle.manifest.base.space
    is_ia3 = space is not None and space.layout.kind == "ia3"
    config = dict(space.config) if space and is_ia3 else _lora_config(bundle, made)
    saved = {m for name in made.whole if (m := _module(name)) not in made.ranks}
    config["modules_to_save"] = sorted(saved) or None
    if made.has_bias:
        config["bias"] = "all"
    return config


def _of_space(bundle: Bundle, task: str) -> _Adapter:
    """The adapter itself, as the bundle gives it back."""
    space = bundle.manifest.base.space
    assert space is not None
    tensors, made = bundle.adapter_tensors(task), _Adapter()
    if space.layout.kind == "ia3":
        made.tensors = tensors
    for module in space.layout.modules:
        if isinstance(module, LoraModule):
            _put(made, module, module.low_rank(tensors, bundle.initial), bundle)
            if module.bias:
                base = bundle.base[module.targets[1]]
                made.whole[module.targets[1]] = base + module.delta(
                    module.targets[1], base, tensors, bundle.initial
                )
                made.has_bias = True
    made.whole.update(_changed_whole(bundle, task, set(space.layout.tensors)))
    return made


def _of_weights(bundle: Bundle, task: str, rank: int | None) -> _Adapter:
    """Factors of every matrix, and the rest whole."""
    made = _Adapter()
    specs = bundle.manifest.base.tensors
    layouts = _Layouts({name: record.shape for name, record in specs.items()})
    keeps_whole = type(bundle.codec).factors is not DeltaCodec.factors
    lacking = []
    for name in bundle.manifest.base.names("delta"):
        shape = torch.Size(specs[name].shape)
        module, _, leaf = name.rpartition(".")
        if len(shape) < 2 or leaf != "weight" or not module:
            continue
        factors = bundle.factors(task, name)
        if factors is None:
            delta = bundle.delta(task, name)
            if delta is None or not delta.any():
                continue
            if rank is None and keeps_whole:
                continue
            if rank is None:
                lacking.append(f"'{name}'")
                continue
            matrix = delta.reshape(shape[0], -1)
            factors = svd_gram(matrix, rank).cut(min(rank, *matrix.shape))
        form: Form = "conv"
        if len(shape) == 2:
            embeds = _EMBEDDINGS.search(module.rpartition(".")[2])
            form = "embedding" if embeds else layouts.of(name)
        _put(made, LoraModule(module, form, 1.0), factors, bundle)
    if lacking:
        raise BundleError(
            f"{bundle.codec!r} has no low-rank factors of:{listing(lacking)}\n"
            "give a rank to cut them to, or compress with SVD"
        )
    if not made.ranks:
        raise BundleError(
            f"{bundle.codec!r} has kept every matrix whole, so that there is no LoRA to write; "
            "give a rank to cut them to"
        )
    adapted = {f"{module}.weight" for module in made.ranks}
    made.whole = _changed_whole(bundle, task, adapted)
    made.has_bias = any(_module(name) in made.ranks for name in made.whole)
    return made


def _put(made: _Adapter, module: LoraModule, factors: LowRank, bundle: Bundle) -> None:
    left, right = _balanced(factors)
    if module.form in {"transposed", "embedding"}:
        left, right = right, left
    a, b = right.mT, left
    if module.form == "conv":
        shape = bundle.manifest.base.tensors[module.targets[0]].shape
        a, b = a.reshape(-1, *shape[1:]), b.reshape(*b.shape, *[1] * (len(shape) - 2))
    names = dataclasses.replace(module, bias=False).tensors
    made.tensors.update(zip(names, (a, b), strict=True))
    made.transposed |= module.form == "transposed"
    made.ranks[module.name] = a.shape[0]


def _balanced(factors: LowRank) -> LowRank:
    """The same product, each direction's scale split evenly over both factors (for fp16)."""
    left, right = (part.norm(dim=0) for part in factors)
    root = torch.where((left > 0) & (right > 0), (right / left).sqrt(), 1.0)
    return LowRank(factors.left * root, factors.right / root)


def _changed_whole(bundle: Bundle, task: str, adapted: set[str]) -> dict[str, Tensor]:
    """Tensors that are the task's own or differ from the base's, with all of their modules."""
    base = bundle.base
    whole = dict(bundle.private_tensors(task))
    for name in bundle.manifest.base.names("delta"):
        if name not in adapted and (own := bundle.tensor(task, name, base[name])) is not None:
            what = f"{bundle.path}: task '{task}': tensor '{name}'"
            mend = "compress again, with the base in"
            whole[name] = rounded(own, base[name].dtype, what, mend)
    whole.update(bundle.exact(task))
    modules = {_module(name) for name in whole} - {_module(name) for name in adapted}
    for name in bundle.manifest.base.tensors:
        if _module(name) in modules:
            whole.setdefault(name, base[name])
    return whole


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _crowded(name: str, bundle: Bundle) -> bool:
    """Whether a tensor's module holds modules too, which PEFT would have to save with it."""
    prefix = _module(name) + "."
    space = bundle.manifest.base.space
    names = bundle.manifest.base.tensors.keys() - set(space.layout.tensors if space else [])
    return any(n.startswith(prefix) and _module(n) != _module(name) for n in names)


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
                "declare it private to have it stored whole"
            )
        return next(iter(found))


def _lora_config(bundle: Bundle, made: _Adapter) -> dict[str, Any]:
    """A LoraConfig: alpha = rank everywhere, so that the scaling is 1."""
    space = bundle.manifest.base.space
    names = sorted(made.ranks)
    most = Counter(made.ranks.values()).most_common(1)
    rank = most[0][0] if most else 1
    others = {_pattern(n, names): made.ranks[n] for n in names if made.ranks[n] != rank}
    all_modules = {_module(name) for name in bundle.manifest.base.tensors}
    ambiguous = any(m.endswith("." + name) for name in names for m in all_modules - set(names))
    kept = ("task_type", "base_model_name_or_path", "revision")
    return {
        **({key: space.config.get(key) for key in kept} if space else {}),
        "peft_type": "LORA",
        "target_modules": "|".join(map(re.escape, names)) if ambiguous else names,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "bias": "none",
        "fan_in_fan_out": made.transposed,
    }


def _pattern(name: str, names: list[str]) -> str:
    """A name as PEFT's patterns match it; from the start where others end like it."""
    escaped = re.escape(name).replace(r"\_", "_")
    return f"^{escaped}" if any(n.endswith("." + name) for n in names) else escaped


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = config["peft_type"]
    kinds: Any = PEFT_TYPE_TO_CONFIG_MAPPING
    make = kinds["LORA" if kind == LINEARIZED else kind]
    known = {field.name for field in dataclasses.fields(make)}
    settings = {key: value for key, value in config.items() if key in known}
    made = make(**{**settings, "inference_mode": True})
    made.save_pretrained(str(folder))
