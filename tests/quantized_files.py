"""Tiny quantised checkpoints, packed entry by entry as each format is described."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

OUT, IN = 64, 96
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass
class Quantised:
    """What is stored of a model, and what it means.

    Attributes:
        stored: the file's tensors.
        values: the unquantised model's, float32.
        config: the `quantization_config`.
        said: how messages call the method.
    """

    stored: dict[str, Tensor]
    values: dict[str, Tensor]
    config: dict[str, Any]
    said: str
    plain: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = len(self.values["a.weight"]) if "a.weight" in self.values else OUT
        self.plain = {"a.bias": torch.randn(rows), "norm.weight": torch.randn(IN)}
        self.stored = {k: t.contiguous() for k, t in (self.stored | self.plain).items()}

    def save(self, folder: Path, dtype: str | None = "float32") -> Path:
        """Write the folder that transformers would; without a dtype, no config."""
        folder.mkdir(exist_ok=True)
        save_file(self.stored, folder / "model.safetensors")
        if dtype:
            config = {"model_type": "llama", "dtype": dtype, "quantization_config": self.config}
            (folder / "config.json").write_text(json.dumps(config))
        return folder


def bnb_int8() -> Quantised:
    q, scale = torch.randint(-127, 128, (OUT, IN), dtype=torch.int8), torch.rand(OUT) + 0.1
    stored = {"a.weight": q, "a.SCB": scale, "a.weight_format": torch.tensor(0, dtype=torch.uint8)}
    values = q.double() * scale.double()[:, None] / 127
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return Quantised(stored, {"a.weight": values}, config, "bitsandbytes int8")


def bnb_nf4(nested: bool = False, storage: torch.dtype = torch.uint8) -> Quantised:
    code = torch.randint(0, 16, (OUT * IN,))
    packed = torch.tensor([16 * a + b for a, b in code.reshape(-1, 2).tolist()], dtype=torch.uint8)
    absmax = torch.rand(OUT * IN // 64) + 0.5
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "float16",
        "shape": [OUT, IN],
    }
    stored = {"a.weight": packed.view(storage)[:, None], "a.weight.quant_map": torch.tensor(NF4)}
    if nested:
        own = torch.randint(0, 256, absmax.shape, dtype=torch.uint8)
        state |= {"nested_blocksize": 32, "nested_dtype": "float32", "nested_offset": 0.75}
        outer, table = torch.rand(len(own) // 32) * 0.1, torch.linspace(-1, 1, 256)
        stored |= {"a.weight.nested_absmax": outer, "a.weight.nested_quant_map": table}
        absmax = torch.tensor(
            [float(table[int(c)] * outer[i // 32]) + 0.75 for i, c in enumerate(own)]
        )
        stored["a.weight.absmax"] = own
    else:
        stored["a.weight.absmax"] = absmax
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    stored["a.weight.quant_state.bitsandbytes__nf4"] = text
    values = [NF4[c] * float(absmax[i // 64]) for i, c in enumerate(code.tolist())]
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    weight = torch.tensor(values).reshape(OUT, IN)
    return Quantised(stored, {"a.weight": weight}, config, "bitsandbytes nf4")


def pack(values: Tensor, bits: int) -> Tensor:
    """Rows of integers as one stream of bits each, the lowest first, in int32 words."""
    rows = []
    for row in values.tolist():
        stream = sum(int(value) << (bits * i) for i, value in enumerate(row))
        words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(row) * bits // 32))]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def gptq(bits: int = 4, version: int = 1, ordered: bool = True) -> Quantised:
    q = torch.randint(0, 1 << bits, (IN, OUT))
    zero = torch.randint(0, 1 << bits, (IN // 32, OUT))
    scale = (torch.rand(IN // 32, OUT) * 0.1 + 0.01).half()
    group = torch.arange(IN) // 32 if ordered else torch.randint(0, IN // 32, (IN,))
    written = (zero - int(version == 1)) % (1 << bits)
    stored = {
        "a.qweight": pack(q.T, bits).T,
        "a.qzeros": pack(written, bits),
        "a.scales": scale,
        "a.g_idx": group.to(torch.int32),
    }
    if ordered:
        del stored["a.g_idx"]
    values = (q - zero[group]).double() * scale[group].double()
    form = "gptq" if version == 1 else "gptq_v2"
    config = {"quant_method": "gptq", "bits": bits, "checkpoint_format": form}
    return Quantised(stored, {"a.weight": values.T}, config, f"GPTQ, {bits} bits")


def awq() -> Quantised:
    q, zero = torch.randint(0, 16, (IN, OUT)), torch.randint(0, 16, (IN // 32, OUT))
    scale = (torch.rand(IN // 32, OUT) * 0.1 + 0.01).half()
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a word holds column order[i]

    def words(values: Tensor) -> Tensor:
        return pack(values.reshape(len(values), -1, 8)[..., order].reshape(len(values), -1), 4)

    stored = {"a.qweight": words(q), "a.qzeros": words(zero), "a.scales": scale}
    group = torch.arange(IN) // 32
    values = (q - zero[group]).double() * scale[group].double()
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    return Quantised(stored, {"a.weight": values.T}, config, "AWQ, 4 bits")


def fp8(kind: str = "blocks") -> Quantised:
    rows = OUT + 6  # the last block is cut short
    q = torch.randn(rows, IN).to(torch.float8_e4m3fn)
    if kind == "blocks":
        name, scale = "a.weight_scale_inv", torch.rand(-(-rows // 32), IN // 32) + 0.1
        grid = torch.tensor([[scale[r // 32, c // 32] for c in range(IN)] for r in range(rows)])
        config = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    elif kind == "rows":
        name, scale = "a.weight_scale", torch.rand(rows, 1) + 0.1
        grid, config = scale.expand(rows, IN), {"quant_method": "fbgemm_fp8"}
    elif kind == "exponents":
        name, scale = "a.weight_scale", torch.randint(120, 130, (rows, IN // 32), dtype=torch.uint8)
        grid = torch.exp2(scale.double() - 127).repeat_interleave(32, 1)
        config = {"quant_method": "compressed-tensors", "format": "mxfp8-quantized"}
    else:
        name, scale = "a.weight_scale", torch.tensor(0.3)
        grid, config = (
            scale.expand(rows, IN),
            {"quant_method": "fp8", "activation_scheme": "static"},
        )
    stored = {"a.weight": q, name: scale, "a.input_scale": torch.tensor(2.0)}
    return Quantised(stored, {"a.weight": q.double() * grid.double()}, config, "FP8 with scales")


def mxfp4() -> Quantised:
    code = torch.randint(0, 16, (3, OUT, IN))
    power = torch.randint(120, 130, (3, OUT, IN // 32), dtype=torch.uint8)
    pairs = code.reshape(3, OUT, IN // 32, 16, 2)
    stored = {
        "experts.up_blocks": (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8),
        "experts.up_scales": power,
    }
    values = torch.tensor(FP4)[code].double()
    values *= torch.exp2(power.double() - 127).repeat_interleave(32, -1)
    config = {"quant_method": "mxfp4"}
    return Quantised(stored, {"experts.up": values.transpose(1, 2)}, config, "MXFP4")


def packed(bits: int = 4, symmetric: bool = True, ordered: bool = True) -> Quantised:
    half = 1 << (bits - 1)
    q, scale = torch.randint(-half, half, (OUT, IN)), (torch.rand(OUT, IN // 32) + 0.1).bfloat16()
    stored = {
        "a.weight_packed": pack(q + half, bits),
        "a.weight_scale": scale,
        "a.weight_shape": torch.tensor([OUT, IN]),
    }
    group = torch.arange(IN) // 32 if ordered else torch.randint(0, IN // 32, (IN,))
    zero = torch.zeros(OUT, IN // 32, dtype=torch.long)
    if not symmetric:
        zero = torch.randint(-half, half, zero.shape)
        stored["a.weight_zero_point"] = pack((zero + half).T, bits).T
    if not ordered:
        stored["a.weight_g_idx"] = group.to(torch.int32)
    values = (q - zero[:, group]).double() * scale[:, group].double()
    scheme = {"num_bits": bits, "group_size": 32, "strategy": "group", "symmetric": symmetric}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
    }
    return Quantised(stored, {"a.weight": values}, config, "compressed-tensors, pack-quantized")


def int8_scaled() -> Quantised:
    q, scale = torch.randint(-127, 128, (OUT, IN), dtype=torch.int8), torch.rand(OUT, 1) + 0.1
    stored = {"a.weight": q, "a.weight_scale": scale}
    config = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    values = q.double() * scale.double()
    return Quantised(stored, {"a.weight": values}, config, "int8 with scales")


def nvfp4() -> Quantised:
    code, scale = torch.randint(0, 16, (OUT, IN)), (torch.rand(OUT, IN // 16) * 200 + 1)
    pairs, whole = code.reshape(OUT, IN // 2, 2), torch.tensor([300.0])
    scale = scale.to(torch.float8_e4m3fn)
    stored = {
        "a.weight_packed": (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8),
        "a.weight_scale": scale,
        "a.weight_global_scale": whole,
    }
    values = torch.tensor(FP4)[code].double() * (scale.double() / 300).repeat_interleave(16, 1)
    config = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    return Quantised(
        stored, {"a.weight": values}, config, "compressed-tensors, nvfp4-pack-quantized"
    )


FORMATS: dict[str, Callable[[], Quantised]] = {
    "bnb int8": bnb_int8,
    "bnb nf4": bnb_nf4,
    "bnb nf4, nested": lambda: bnb_nf4(nested=True),
    "bnb nf4 in bfloat16": lambda: bnb_nf4(storage=torch.bfloat16),
    "gptq 2": lambda: gptq(2),
    "gptq 3": lambda: gptq(3),
    "gptq 4": gptq,
    "gptq 8": lambda: gptq(8),
    "gptq v2": lambda: gptq(version=2),
    "gptq, by activation": lambda: gptq(ordered=False),
    "awq": awq,
    "fp8, blocks": fp8,
    "fp8, rows": lambda: fp8("rows"),
    "fp8, exponents": lambda: fp8("exponents"),
    "fp8, one scale": lambda: fp8("tensor"),
    "mxfp4": mxfp4,
    "packed 2": lambda: packed(2),
    "packed 4": packed,
    "packed 8": lambda: packed(8),
    "packed, with zero points": lambda: packed(symmetric=False),
    "packed, by activation": lambda: packed(ordered=False),
    "int8 with scales": int8_scaled,
    "nvfp4": nvfp4,
}
