"""Quantised checkpoints: read as the unquantised model, tensor by tensor, or refused by name."""

import copy
import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import jsonargparse
import peft
import pytest
import torch
from quantized_files import FORMATS, IN, OUT, Quantised, bnb_int8, bnb_nf4, fp8, gptq, mxfp4
from safetensors.torch import save_file
from torch import Tensor, nn

from fusionkit import EMR, SVD, Bundle, Checkpoint, Dense, Family, Mean, Merged, compress
from fusionkit.checkpoints.checkpoint import TensorSpec
from fusionkit.checkpoints.in_memory import TensorMapping
from fusionkit.checkpoints.quantized import Dequantized, dequantized, unquantized
from fusionkit.errors import CheckpointError, WrongBaseError
from fusionkit.tasks.finetune import Finetune

TASKS = ("ant", "bee")


@pytest.fixture(params=FORMATS)
def quantised(request: pytest.FixtureRequest) -> Quantised:
    torch.manual_seed(0)
    return FORMATS[request.param]()


class Net(nn.Module):
    """What the tiny files but mxfp4's are checkpoints of."""

    def __init__(self, out: int = OUT) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(IN, out), nn.LayerNorm(IN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.norm(x))


def says(*words: str) -> str:
    return "(?s)" + ".*".join(map(re.escape, words))


# --- values, names, dtypes ------------------------------------------------------------------


def test_it_is_the_unquantised_model(quantised: Quantised, tmp_path: Path) -> None:
    checkpoint = Checkpoint.of(quantised.save(tmp_path / "q"), dequantize=True)
    assert checkpoint.dequantized
    assert set(checkpoint) == {*quantised.values, *quantised.plain}
    for name, values in quantised.values.items():
        assert checkpoint.specs[name] == TensorSpec(tuple(values.shape), torch.float32)
        assert checkpoint[name].shape == values.shape
        torch.testing.assert_close(checkpoint[name].double(), values.double(), rtol=3e-7, atol=0)
    for name, tensor in quantised.plain.items():
        assert torch.equal(checkpoint[name], tensor)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_the_dtype_that_the_config_says(
    quantised: Quantised, tmp_path: Path, dtype: str
) -> None:
    checkpoint = Checkpoint.of(quantised.save(tmp_path / "q", dtype), dequantize=True)
    for name, values in quantised.values.items():
        tensor = checkpoint[name]
        assert tensor.dtype == checkpoint.specs[name].dtype == getattr(torch, dtype)
        assert torch.equal(tensor, values.float().to(tensor.dtype)) or quantised.said.startswith(
            "bitsandbytes"  # which multiplies twice
        )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("bnb int8", "float32"), ("bnb nf4", "float16"), ("gptq 4", "float16"), ("mxfp4", "bfloat16")],
)
def test_without_a_config_the_scales_say(tmp_path: Path, name: str, dtype: str) -> None:
    quantised = FORMATS[name]()
    folder = quantised.save(tmp_path / "q", dtype=None)
    checkpoint = Checkpoint.of(folder / "model.safetensors", dequantize=True)
    for weight, values in quantised.values.items():
        assert checkpoint[weight].dtype == getattr(torch, dtype)
        torch.testing.assert_close(checkpoint[weight].double(), values.double(), rtol=8e-3, atol=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_mxfp4_is_transformers(dtype: str) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored, kind = mxfp4().stored, getattr(torch, dtype)
    theirs = convert_moe_packed_tensors(
        stored["experts.up_blocks"], stored["experts.up_scales"], dtype=kind
    )
    assert torch.equal(dequantized(TensorMapping(stored))["experts.up"].to(kind), theirs)


@pytest.mark.parametrize("kind", ["blocks", "rows", "tensor", "exponents"])
def test_fp8_is_transformers(kind: str, tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    quantised = fp8(kind)
    if kind == "blocks":  # transformers' has no cut blocks
        stored = quantised.stored
        stored["a.weight"] = stored["a.weight"][:OUT].contiguous()
        stored["a.weight_scale_inv"] = stored["a.weight_scale_inv"][: OUT // 32].contiguous()
    scale = next(t for n, t in quantised.stored.items() if "weight_scale" in n)
    theirs = Fp8Dequantize(SimpleNamespace())._dequantize_one(
        quantised.stored["a.weight"], scale, torch.float32
    )
    ours = Checkpoint.of(quantised.save(tmp_path / "q"), dequantize=True)["a.weight"]
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_integers_are_compressed_tensors(bits: int, symmetric: bool, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=32
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    scale = torch.rand(OUT, IN // 32) * 0.02 + 0.01
    module = {"weight": torch.randn(OUT, IN), "weight_scale": scale}
    if not symmetric:
        module["weight_zero_point"] = torch.randint(-4, 4, scale.shape, dtype=torch.int8)
    compressed = PackedQuantizationCompressor.compress(module, scheme)
    theirs = PackedQuantizationCompressor.decompress(compressed, scheme)["weight"]
    path = tmp_path / "model.safetensors"
    save_file({f"a.{name}": tensor for name, tensor in compressed.items()}, path)
    ours = Checkpoint.of(path, dequantize=True)["a.weight"]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert ours.unique().numel() > bits


@pytest.mark.parametrize("kind", ["NVFP4PackedCompressor", "MXFP4PackedCompressor"])
def test_packed_fp4_is_compressed_tensors(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors import compressors
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    group = 16 if kind.startswith("NV") else 32
    strategy = "tensor_group" if group == 16 else "group"
    args = QuantizationArgs(
        num_bits=4, type="float", symmetric=True, strategy=strategy, group_size=group
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    scale = torch.full((OUT, IN // group), 64.0) * 2.0 ** torch.randint(-3, 3, (OUT, 1))
    module = {"weight": torch.randn(OUT, IN), "weight_scale": scale}
    if group == 16:
        module["weight_global_scale"] = torch.tensor([256.0])
    else:
        module["weight_scale"] = scale / 256
    compressor = getattr(compressors, kind)
    compressed = compressor.compress(module, scheme)
    theirs = compressor.decompress(compressed, scheme)["weight"]
    path = tmp_path / "model.safetensors"
    save_file({f"a.{name}": tensor.contiguous() for name, tensor in compressed.items()}, path)
    ours = Checkpoint.of(path, dequantize=True)["a.weight"]
    assert torch.equal(ours, theirs.to(ours.dtype))
    assert ours.unique().numel() > 4


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_four_bits_are_bitsandbytes(kind: str, nested: bool, dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(OUT, 128, dtype=dtype)  # on CPUs, its blocks may not cross rows
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type=kind, compress_statistics=nested
    )
    stored = {"a.weight": packed}
    stored |= {f"a.weight.{name}": t for name, t in state.as_dict(packed=True).items()}
    ours = dequantized(TensorMapping(stored))["a.weight"]
    assert torch.equal(ours, functional.dequantize_4bit(packed, state))


def test_int8_is_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    quantised = bnb_int8()
    q, scale = quantised.stored["a.weight"], quantised.stored["a.SCB"]
    ours = dequantized(TensorMapping(quantised.stored))["a.weight"]
    assert torch.equal(ours, functional.int8_vectorwise_dequant(q, scale))


# --- laziness -------------------------------------------------------------------------------


class Watched(TensorMapping):
    """Keeps what is read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.read: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        self.read.append(name)
        return super().__getitem__(name)


def test_only_what_is_asked_for_is_read(quantised: Quantised, tmp_path: Path) -> None:
    stored = {f"{k}.{n}": t for k in "xy" for n, t in quantised.stored.items()}
    watched = Watched(stored)
    watched.files = (quantised.save(tmp_path / "q") / "model.safetensors",)
    checkpoint = dequantized(watched)
    assert not {n for n in watched.read if stored[n].numel() > 256}
    watched.read.clear()
    name = next(iter(quantised.values))
    checkpoint[f"x.{name}"]
    assert watched.read
    assert all(read.startswith("x.") for read in watched.read)
    assert not {f"x.{each}" for each in quantised.plain} & set(watched.read)
    watched.read.clear()
    checkpoint["y.a.bias"]
    assert watched.read == ["y.a.bias"]
    gone = next(iter(stored.keys() - checkpoint.keys()), "x.no")
    with pytest.raises(KeyError, match="no tensor"):
        checkpoint[gone]


def test_it_can_be_shards_a_pickle_or_a_live_model(tmp_path: Path) -> None:
    quantised = gptq()
    values = quantised.values["a.weight"].half()
    torch.save(quantised.stored, tmp_path / "model.pt")
    folder = tmp_path / "shards"
    folder.mkdir()
    names = sorted(quantised.stored)
    for number, own in enumerate((names[::2], names[1::2])):
        save_file({n: quantised.stored[n] for n in own}, folder / f"{number}.safetensors")
    places = {n: f"{k}.safetensors" for k, own in enumerate((names[::2], names[1::2])) for n in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    live = nn.Module()
    live.a = nn.Module()
    for name, tensor in quantised.stored.items():
        if name.startswith("a."):
            live.a.register_buffer(name.removeprefix("a."), tensor)
    for source in (tmp_path / "model.pt", folder, live):
        assert torch.equal(Checkpoint.of(source, dequantize=True)["a.weight"], values)
        with pytest.raises(CheckpointError, match=says("is quantised (GPTQ, 4 bits")):
            unquantized(Checkpoint.of(source))


def test_names_may_be_changed_after() -> None:
    stored = {f"model.{name}": tensor for name, tensor in gptq().stored.items()}
    checkpoint = Checkpoint.of(stored, strip_prefix="model.", add_prefix="lm.", dequantize=True)
    assert set(checkpoint) == {"lm.a.weight", "lm.a.bias", "lm.norm.weight"}
    assert checkpoint.dequantized
    assert checkpoint.in_memory().dequantized


def test_what_is_not_quantised_comes_back_as_it_is() -> None:
    net = Net()
    checkpoint = Checkpoint.of(net, dequantize=True)
    assert not checkpoint.dequantized
    assert torch.equal(checkpoint["a.weight"], net.a.weight)


# --- bundles --------------------------------------------------------------------------------


def finetuned(base: Checkpoint) -> dict[str, dict[str, Tensor]]:
    return {
        task: {n: t + 0.1 * torch.randn(t.shape).to(t.dtype) for n, t in base.items()}
        for task in TASKS
    }


def test_a_bundle_opens_its_base_as_it_was(quantised: Quantised, tmp_path: Path) -> None:
    folder = quantised.save(tmp_path / "q", dtype="bfloat16")
    base = Checkpoint.of(folder, dequantize=True)
    made = compress(base, finetuned(base), EMR(), tmp_path / "b")
    record = json.loads((tmp_path / "b" / "manifest.json").read_text())["base"]
    assert record["dequantized"] is True
    wanted = made.state_dict("ant")
    for given in (None, folder, base):
        state = Bundle.load(tmp_path / "b", given).state_dict("ant")
        assert state.keys() == wanted.keys() == base.keys()
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_an_unquantised_base_is_recorded_as_ever(tmp_path: Path) -> None:
    net = Net()
    save_file(net.state_dict(), tmp_path / "base.safetensors")
    compress(tmp_path / "base.safetensors", finetuned(Checkpoint.of(net)), EMR(), tmp_path / "b")
    record = json.loads((tmp_path / "b" / "manifest.json").read_text())["base"]
    assert "dequantized" not in record


def test_a_quantised_live_model_is_not_the_dequantised_base(tmp_path: Path) -> None:
    quantised = gptq()
    base = Checkpoint.of(quantised.save(tmp_path / "q", "float16"), dequantize=True)
    bundle = compress(base, finetuned(base), EMR())
    with pytest.raises(WrongBaseError, match=says("'a.weight' is missing", "dequantize=True)")):
        bundle.attach_base(Checkpoint.of(quantised.stored))
    bundle.attach_base(Checkpoint.of(quantised.stored, dequantize=True).in_memory())


def adapter(base: Checkpoint, folder: Path) -> dict[str, Tensor]:
    """Save a LoRA; the state of PEFT's model with it merged into the dequantised base."""
    net = Net(base.specs["a.weight"].shape[0])
    net.load_state_dict(dict(base))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, target_modules=["a"])
        model = peft.get_peft_model(copy.deepcopy(net), config)
        with torch.no_grad():
            model.base_model.model.a.lora_B["default"].weight.normal_()
        model.save_pretrained(folder)
        merged: dict[str, Tensor] = model.merge_and_unload().state_dict()
    return merged


@pytest.mark.parametrize("name", ["bnb nf4", "gptq 4", "awq", "fp8, rows", "packed 4", "nvfp4"])
def test_a_lora_means_what_it_means_over_the_dequantised_model(name: str, tmp_path: Path) -> None:
    quantised = FORMATS[name]()
    folder = quantised.save(tmp_path / "q")
    base = Checkpoint.of(folder, dequantize=True)
    wanted = adapter(base, tmp_path / "lora")
    for codec in (Dense("fp32"), SVD(4, dtype="fp32")):
        state = compress(base, {"t": str(tmp_path / "lora")}, codec).state_dict("t")
        for each, tensor in wanted.items():
            torch.testing.assert_close(state[each], tensor, rtol=1e-4, atol=1e-4)
    assert not torch.equal(wanted["a.weight"], base["a.weight"])
    with pytest.raises(CheckpointError, match=says("(the base) is quantised (", "dequantize=True")):
        compress(folder, {"t": str(tmp_path / "lora")}, SVD(4))


def test_int8_of_bitsandbytes_is_dequantised_unasked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = bnb_int8().save(tmp_path / "base")
    base = Checkpoint.of(folder, dequantize=True)
    wanted = adapter(base, tmp_path / "lora")
    bundle = compress(folder, {"t": str(tmp_path / "lora")}, Dense("fp32"), tmp_path / "b")
    assert bundle.manifest.base.tensors["a.weight"].role == "delta"
    state = Bundle.load(tmp_path / "b").state_dict("t")
    torch.testing.assert_close(state["a.weight"], wanted["a.weight"], rtol=1e-5, atol=1e-5)
    tuned = {task: bnb_int8().save(tmp_path / task) for task in TASKS}
    merged = compress(folder, tuned, Merged(Mean()))
    one, other = (merged.state_dict(task)["a.weight"] for task in TASKS)
    assert torch.equal(one, other)
    mean = sum(Checkpoint.of(path, dequantize=True)["a.weight"] for path in tuned.values()) / 2
    torch.testing.assert_close(one, mean, rtol=2e-3, atol=2e-3)  # kept in 16 bits


def test_a_model_is_filled_with_values_not_with_codes(tmp_path: Path) -> None:
    folder = bnb_int8().save(tmp_path / "q")
    net = Net()
    Finetune(net, "t", base=folder)
    assert torch.equal(net.a.weight, Checkpoint.of(folder, dequantize=True)["a.weight"])
    with pytest.raises(CheckpointError, match=says("is quantised (FP8")):
        Finetune(Net(OUT + 6), "t", base=fp8().save(tmp_path / "f"))


# --- refusals -------------------------------------------------------------------------------


def test_base_and_fine_tunes_are_refused_by_name(quantised: Quantised, tmp_path: Path) -> None:
    folder = quantised.save(tmp_path / "q")
    plain = Checkpoint.of(folder, dequantize=True)
    if quantised.said == "bitsandbytes int8":
        return
    with pytest.raises(
        CheckpointError,
        match=says(str(folder), f"(the base) is quantised ({quantised.said}: '", "dequantize=True"),
    ):
        Family(folder, {"ant": plain})
    with pytest.raises(
        CheckpointError, match=says(str(folder), f"(task 'ant') is quantised ({quantised.said}: '")
    ):
        Family(plain, {"ant": folder})
    Family(plain, {"ant": Checkpoint.of(folder, dequantize=True)})


BARE = {
    "int8": (torch.int8, "unquantised model"),
    "uint8": (torch.uint8, "unquantised model"),
    "float8_e4m3fn": (torch.float8_e4m3fn, "save the model in bfloat16"),
    "float8_e5m2": (torch.float8_e5m2, "save the model in bfloat16"),
}


@pytest.mark.parametrize("name", BARE)
def test_weights_without_scales_can_only_be_refused(name: str, tmp_path: Path) -> None:
    dtype, mend = BARE[name]
    stored = {n: t.to(dtype) if t.ndim > 1 else t for n, t in Net().state_dict().items()}
    save_file(stored, tmp_path / "q.safetensors")
    for source in (tmp_path / "q.safetensors", stored):
        with pytest.raises(
            CheckpointError, match=says(f"is quantised ({name}: 'a.weight')", "has no scales", mend)
        ):
            Family(source, {"t": Net()})
        with pytest.raises(CheckpointError, match=says("'a.weight'", "can't be dequantised", mend)):
            Checkpoint.of(source, dequantize=True)


def test_the_mend_for_bare_float8_works() -> None:
    stored = {n: t.to(torch.float8_e4m3fn) for n, t in Net().state_dict().items()}
    mended = {name: tensor.to(torch.bfloat16) for name, tensor in stored.items()}
    Family(mended, {"t": mended})


@pytest.mark.parametrize(
    "method", ["aqlm", "hqq", "eetq", "quanto", "spqr", "vptq", "bitnet", "gptq", "xyz"]
)
def test_a_method_that_is_not_known_is_named(method: str, tmp_path: Path) -> None:
    quantised = bnb_int8()
    quantised.stored["a.codes"] = quantised.stored.pop("a.weight")
    quantised.config = {"quant_method": method}
    folder = quantised.save(tmp_path / "q")
    with pytest.raises(CheckpointError, match=says(f"is quantised ({method}: 'a.codes')")):
        Family(folder, {"t": Net()})
    with pytest.raises(CheckpointError, match=says("can't be dequantised", "the way it is stored")):
        Checkpoint.of(folder, dequantize=True)


def test_a_half_of_a_format_is_refused(tmp_path: Path) -> None:
    for quantised, part in ((gptq(), "a.qzeros"), (bnb_nf4(), "a.weight.absmax")):
        del quantised.stored[part]
        with pytest.raises(CheckpointError, match="can't be dequantised here"):
            Checkpoint.of(quantised.stored, dequantize=True)
    planar = gptq()
    planar.config["checkpoint_format"] = "gptq_p"
    with pytest.raises(CheckpointError, match=says("not known (format 'gptq_p')")):
        Checkpoint.of(planar.save(tmp_path / "p"), dequantize=True)
    stored = mxfp4().stored
    stored["experts.up_blocks"] = stored["experts.up_blocks"][0]
    with pytest.raises(CheckpointError, match="no stack of experts"):
        Checkpoint.of(stored, dequantize=True)


def test_transposed_layers_are_refused(tmp_path: Path) -> None:
    stored = {f"h.0.attn.c_{n}": t for n, t in bnb_int8().stored.items()}
    stored = {name.replace("c_a.", "c_attn."): tensor for name, tensor in stored.items()}
    save_file(stored, tmp_path / "model.safetensors")
    config = {"model_type": "gpt2", "quantization_config": {"quant_method": "bitsandbytes"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=says("gpt2 has it transposed")):
        Checkpoint.of(tmp_path, dequantize=True)


@pytest.mark.parametrize(
    "name", ["attn.bias", "mask", "position_ids", "token_type_ids", "steps", "lut.weight"]
)
def test_honest_integers_are_no_quantised_weights(name: str, tmp_path: Path) -> None:
    shape = (8,) if name == "lut.weight" else (8, 8)
    for dtype in (torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool):
        state: dict[str, Tensor] = {**Net().state_dict(), name: torch.ones(shape, dtype=dtype)}
        path = tmp_path / f"{dtype}.safetensors"
        save_file(state, path)
        family = Family(path, {"t": path})
        assert family.roles[name] == "exact"
        assert not Checkpoint.of(path, dequantize=True).dequantized


def test_a_config_alone_quantises_nothing(tmp_path: Path) -> None:
    """What is left behind when a QLoRA is merged."""
    save_file(Net().state_dict(), tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    Family(tmp_path, {"t": Net()})


def test_a_config_that_is_not_json_is_named(tmp_path: Path) -> None:
    folder = gptq().save(tmp_path / "q")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=says("config.json: not readable as JSON")):
        Checkpoint.of(folder, dequantize=True)


def test_a_dequantised_checkpoint_can_be_asked_for_in_a_recipe(tmp_path: Path) -> None:
    def take(base: Checkpoint) -> Checkpoint:
        return base

    folder = gptq().save(tmp_path / "q")
    own = {
        "class_path": "fusionkit.Checkpoint.of",
        "init_args": {"source": str(folder), "dequantize": True},
    }
    made = jsonargparse.CLI(take, as_positional=False, args=["--base", json.dumps(own)])
    assert isinstance(made, Dequantized)
    assert Checkpoint.of(made, dequantize=True) is made
