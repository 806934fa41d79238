"""How each format of quantised weights is told: by names, dtypes, shapes and siblings.

A finder is asked about every tensor, and answers about the one that a weight is stored in.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta, Struct

from fusionkit.checkpoints.checkpoint import Checkpoint, TensorSpec
from fusionkit.checkpoints.json_text import parsed_json
from fusionkit.checkpoints.quantized_weights import (
    AWQ,
    GPTQ,
    BnbFourBit,
    BnbInt8,
    MXFP4Experts,
    PackedFP4,
    PackedIntegers,
    QuantizedWeight,
    Scaled,
    Unreadable,
    blocks_of,
)
from fusionkit.checkpoints.safetensors_file import Size

_FLOAT8 = {
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
}
_BYTES = {torch.int8, torch.uint8, torch.qint8, torch.quint8}
INTEGERS = _FLOAT8 | _BYTES | {torch.int16, torch.int32, torch.uint16, torch.uint32, torch.qint32}
"""Dtypes in which quantised weights are stored; int64 and booleans are ids, counts and masks."""

_ACTIVATIONS = (
    "input_scale",
    "input_scale_ub",
    "input_zero_point",
    "input_global_scale",
    "output_scale",
    "output_zero_point",
    "activation_scale",
    "activation_scale_inv",
)
_TRANSPOSED = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
"""Models whose weights have another layout (Conv1D's) than quantisers give them."""
_CONV1D = {"c_attn", "c_proj", "c_fc", "q_attn"}
_BNB_STATE = ".quant_state.bitsandbytes__"
_FROM_TRANSFORMERS = (
    "load it with transformers, call model.dequantize(), save it with save_pretrained, and give "
    "that folder; or give the unquantised model"
)


@dataclass(frozen=True)
class Clues:
    """What finders look at.

    Attributes:
        checkpoint: the checkpoint.
        quantization: what its config says on quantisation.
        model_type: the kind of model, by its config.
    """

    checkpoint: Checkpoint
    quantization: Mapping[str, Any]
    model_type: str

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Shape and dtype of every tensor."""
        return self.checkpoint.specs

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a weight with these scales has."""
        dtype = self.specs[name].dtype
        return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.bfloat16

    def parts(self, names: Mapping[str, str]) -> dict[str, str]:
        """Those of some tensors that are there."""
        return {part: name for part, name in names.items() if name in self.specs}

    def activations(self, module: str) -> tuple[str, ...]:
        """Names of a layer's tensors that say how its activations are quantised."""
        names = (f"{module}.{each}" for each in _ACTIVATIONS)
        return tuple(name for name in names if name in self.specs)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Rows and columns under one scale, where the config says one for all weights."""
        if told := self.quantization.get("weight_block_size"):
            return tuple(told)
        groups = self.quantization.get("config_groups") or {}
        weights = [group.get("weights") or {} for group in groups.values()]
        said = {(*(each.get("block_structure") or ()), each.get("group_size")) for each in weights}
        if len(said) != 1:
            return ()
        *block, group = said.pop()
        return tuple(block) if block else ((1, group) if group and group > 0 else ())


Finder = Callable[[Clues, str], QuantizedWeight | None]


def _words(clues: Clues, name: str) -> QuantizedWeight | None:
    """GPTQ and AWQ: `qweight`, `qzeros`, `scales`, `g_idx`."""
    if name.rpartition(".")[2] != "qweight":
        return None
    prefix = name.removesuffix("qweight")
    names = ("qweight", "qzeros", "scales", "g_idx")
    parts = clues.parts({each: prefix + each for each in names})
    shapes = [clues.specs[parts[each]].shape for each in names[:3] if each in parts]
    if clues.specs[name].dtype != torch.int32 or [len(shape) for shape in shapes] != [2, 2, 2]:
        reason = "it has no int32 'qzeros' and 'scales' beside it"
        return _unreadable(clues, name, "GPTQ or AWQ", reason)
    (rows, columns), zeros, (groups, out) = shapes
    dtype, weight = clues.dtype(parts["scales"]), f"{prefix}weight"
    if "g_idx" not in parts and columns * 8 == out and zeros == (groups, columns):
        if rows % groups:
            return _unreadable(clues, name, "AWQ", "its groups don't divide its rows")
        return AWQ(weight, "AWQ, 4 bits", parts, (out, rows), dtype)
    bits = 32 * zeros[1] // out if out >= 32 else clues.quantization.get("bits", 0)
    form = clues.quantization.get("checkpoint_format") or "gptq"
    if columns != out or bits not in (2, 3, 4, 8) or form not in ("gptq", "gptq_v2"):
        reason = f"it is packed in a way that is not known (format '{form}')"
        return _unreadable(clues, name, "GPTQ or AWQ", reason)
    count = clues.specs[parts["g_idx"]].numel if "g_idx" in parts else 32 * rows // bits
    shift = 0 if form == "gptq_v2" else 1
    return GPTQ(weight, f"GPTQ, {bits} bits", parts, (out, count), dtype, bits, shift)


class _BnbState(Struct, frozen=True):
    """What bitsandbytes says of a weight of 4 bits."""

    shape: list[Size]
    dtype: str
    blocksize: Annotated[int, Meta(gt=0, lt=1 << 31)]
    nested_blocksize: Annotated[int, Meta(ge=0, lt=1 << 31)] | None = None
    nested_offset: float | None = None


def _bnb_four_bit(clues: Clues, name: str) -> QuantizedWeight | None:
    """The 4 bits of bitsandbytes: `weight` in bytes, `weight.absmax`, `weight.quant_state.…`."""
    weight, state, kind = name.partition(_BNB_STATE)
    if not state or weight not in clues.specs:
        return None
    method = f"bitsandbytes {kind}"
    said = parsed_json(bytes(clues.checkpoint[name].reshape(-1).tolist()))
    told = msgspec.convert(said, _BnbState)
    parts = clues.parts(
        {
            "weight": weight,
            "absmax": f"{weight}.absmax",
            "map": f"{weight}.quant_map",
            "nested_absmax": f"{weight}.nested_absmax",
            "nested_map": f"{weight}.nested_quant_map",
            "state": name,
        }
    )
    if not {"absmax", "map"} <= parts.keys():
        return _unreadable(clues, weight, method, "it has no 'absmax' and 'quant_map' beside it")
    return BnbFourBit(
        weight,
        method,
        parts,
        tuple(told.shape),
        getattr(torch, told.dtype.removeprefix("torch.")),
        told.blocksize,
        told.nested_blocksize or 0,
        told.nested_offset or 0.0,
    )


def _bnb_int8(clues: Clues, name: str) -> QuantizedWeight | None:
    """The int8 of bitsandbytes: `weight`, `SCB`, `weight_format`."""
    prefix, own = name.removesuffix("weight"), clues.specs[name]
    scale = f"{prefix}SCB"
    if name.rpartition(".")[2] != "weight" or own.dtype != torch.int8 or scale not in clues.specs:
        return None
    method = "bitsandbytes int8"
    parts = clues.parts({"weight": name, "scale": scale, "format": f"{prefix}weight_format"})
    if len(own.shape) != 2 or clues.specs[scale].numel != own.shape[0]:
        return _unreadable(clues, name, method, "'SCB' has not one scale for each row")
    if "format" in parts and int(clues.checkpoint[parts["format"]]) != 0:
        return _unreadable(clues, name, method, "it is in a layout of one kind of GPU")
    return BnbInt8(name, method, parts, own.shape, clues.dtype(scale))


def _scaled(clues: Clues, name: str) -> QuantizedWeight | None:
    """Float8 with scales, and int8 of compressed-tensors: `weight`, `weight_scale[_inv]`."""
    own = clues.specs[name]
    kind = "FP8" if own.dtype in _FLOAT8 else "int8" if own.dtype == torch.int8 else ""
    scale = next((n for n in (f"{name}_scale_inv", f"{name}_scale") if n in clues.specs), "")
    if not kind or not scale or (kind == "int8" and not name.endswith("weight")):
        return None
    method = f"{kind} with scales"
    told = clues.blocks or ((128, 128) if scale.endswith("_inv") else ())
    blocks = blocks_of(own.shape, clues.specs[scale].shape, told)
    if kind == "int8" and scale.endswith("_inv"):
        return _unreadable(clues, name, method, "its bytes may be two values each")
    if blocks is None:
        return _unreadable(clues, name, method, f"the blocks of '{scale}' are not known")
    parts = clues.parts(
        {"weight": name, "scale": scale, "zero": f"{name}_zero_point", "groups": f"{name}_g_idx"}
    )
    dropped = clues.activations(name.rpartition(".")[0])
    return Scaled(name, method, parts, own.shape, clues.dtype(scale), blocks, dropped=dropped)


def _packed(clues: Clues, name: str) -> QuantizedWeight | None:
    """What compressed-tensors packs: `weight_packed`, `weight_scale`, `weight_shape`."""
    weight = name.removesuffix("_packed")
    if weight == name or f"{weight}_scale" not in clues.specs:
        return None
    own, scale = clues.specs[name], f"{weight}_scale"
    said = str(clues.quantization.get("format", "")) or f"packed in {str(own.dtype)[6:]}"
    method, dtype = f"compressed-tensors, {said}", clues.dtype(scale)
    parts = clues.parts(
        {
            "weight": name,
            "scale": scale,
            "shape": f"{weight}_shape",
            "zero": f"{weight}_zero_point",
            "groups": f"{weight}_g_idx",
            "global": f"{weight}_global_scale",
        }
    )
    dropped = clues.activations(weight.rpartition(".")[0])
    if own.dtype == torch.uint8 and len(own.shape) == 2 and "zero" not in parts:
        shape: tuple[int, ...] = (own.shape[0], 2 * own.shape[1])
        if blocks_of(shape, clues.specs[scale].shape):
            return PackedFP4(weight, method, parts, shape, dtype, dropped=dropped)
    elif own.dtype == torch.int32 and len(own.shape) == 2 and "shape" in parts:
        shape = tuple(clues.checkpoint[parts["shape"]].tolist())
        bits = 32 * own.shape[1] // shape[1] if shape[1] >= 32 else 0
        blocks = blocks_of(shape, clues.specs[scale].shape, clues.blocks)
        if bits in (2, 4, 8) and blocks:
            return PackedIntegers(
                weight, method, parts, shape, dtype, blocks, bits, dropped=dropped
            )
    return _unreadable(clues, name, method, "it is packed in a way that is not known")


def _mxfp4_experts(clues: Clues, name: str) -> QuantizedWeight | None:
    """The experts of gpt-oss: `gate_up_proj_blocks`, `gate_up_proj_scales`."""
    weight = name.removesuffix("_blocks")
    scales, own = f"{weight}_scales", clues.specs[name]
    if weight == name or scales not in clues.specs or own.dtype != torch.uint8:
        return None
    parts = {"blocks": name, "scales": scales}
    if len(own.shape) != 4 or clues.specs[scales].shape != own.shape[:-1]:
        return _unreadable(clues, name, "MXFP4", "it is no stack of experts")
    experts, out, *rest = own.shape
    shape = (experts, 2 * prod(rest), out)
    return MXFP4Experts(weight, "MXFP4", parts, shape, torch.bfloat16)


_FINDERS: tuple[Finder, ...] = (_words, _bnb_four_bit, _bnb_int8, _scaled, _packed, _mxfp4_experts)
"""One for each way to store quantised weights."""


def find(clues: Clues) -> Iterator[QuantizedWeight]:
    """What of a checkpoint is quantised, in its order; last, what no format explains.

    Args:
        clues: what is known of the checkpoint.
    """
    spent: set[str] = set()
    for name in clues.specs:
        weight = next((found for each in _FINDERS if (found := each(clues, name))), None)
        if weight is None:
            continue
        spent |= {*weight.parts.values(), *weight.dropped}
        if clues.model_type in _TRANSPOSED and _CONV1D & set(weight.name.split(".")):
            reason = f"{clues.model_type} has it transposed in files that are not quantised"
            weight = _unreadable(clues, weight.tensor, weight.method, reason)
        yield weight
    yield from _bare(clues, spent)


def _bare(clues: Clues, spent: set[str]) -> Iterator[QuantizedWeight]:
    """Weights in integers or float8 whose scales are not among the tensors.

    Args:
        clues: what is known of the checkpoint.
        spent: names of the tensors that quantised weights were found in, or beside.
    """
    for name, spec in clues.specs.items():
        if name in spent or spec.numel < 2:
            continue
        dtype = str(spec.dtype).removeprefix("torch.")
        if spec.dtype in _FLOAT8:
            mend = "save the model in bfloat16, model.to(torch.bfloat16), if these are its values"
            yield _unreadable(clues, name, dtype, "it has no scales beside it", mend)
        elif spec.dtype in _BYTES and len(spec.shape) > 1 and name.split(".")[-1] == "weight":
            yield _unreadable(clues, name, dtype, "it has no scales beside it that are known")


def _unreadable(
    clues: Clues, name: str, method: str, reason: str, mend: str = _FROM_TRANSFORMERS
) -> Unreadable:
    spec = clues.specs[name]
    return Unreadable(
        name, method, {"weight": name}, spec.shape, torch.bfloat16, reason=reason, mend=mend
    )
