"""What is known of a model's class, and checkpoints seen as their class has them."""

import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from fusionkit import Checkpoint
from fusionkit.checkpoints.architecture import Architecture
from fusionkit.checkpoints.conformed import conformed
from fusionkit.checkpoints.from_config import UnknownClassWarning, architecture_of

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GATE = "model.layers.0.mlp.experts.gate_up_proj"


def llama(**more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, **SIZES, **more))


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=20, num_key_value_heads=2, num_local_experts=3, **SIZES)
    return MixtralForCausalLM(config)


def vit() -> ViTForImageClassification:
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **SIZES))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=8))


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert not [name for name in wanted if not torch.equal(found[name], wanted[name])]


def edit(folder: Path, change: Any) -> None:
    """Change what the one file of a folder holds."""
    state = load_file(folder / "model.safetensors")
    save_file(change(state), folder / "model.safetensors", metadata={"format": "pt"})


# --- what a class says ---------------------------------------------------------------------------


def test_what_holds_each_matrix() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 4)
            self.conv = nn.Conv2d(3, 4, 2)
            self.attention = nn.MultiheadAttention(4, 2)
            self.turned = transformers.pytorch_utils.Conv1D(6, 4)
            self.experts = nn.Module()
            self.experts.up = nn.Parameter(torch.zeros(3, 4, 5))
            self.norm = nn.BatchNorm1d(4)

    known = Architecture.of(Net())
    assert known.kinds == {
        "embed.weight": "embedding",
        "conv.weight": "convolution",
        "attention.in_proj_weight": "attention",
        "attention.out_proj.weight": "linear",
        "turned.weight": "transposed",
        "experts.up": "experts",
    }
    assert known.stacks == {"experts.up": 3}
    assert known.buffers == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_ties_and_vocabulary(device: str) -> None:
    with torch.device(device):
        known = Architecture.of(llama(tie_word_embeddings=True))
        apart = Architecture.of(llama())
        bert = Architecture.of(BertForMaskedLM(BertConfig(vocab_size=20, **SIZES)))
    assert known.tied == {HEAD: EMBED}
    assert apart.tied == {}
    assert known.vocabulary == apart.vocabulary == {EMBED, HEAD}
    assert "cls.predictions.decoder.bias" in bert.vocabulary | bert.tied.keys()


def test_old_buffers_are_no_ones_unless_the_class_has_them() -> None:
    known = Architecture.of(llama())
    assert not known.reads("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert known.reads("classifier.weight")  # may be someone's own head
    assert not Architecture.of(gpt2()).reads("transformer.h.0.attn.masked_bias")

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("inv_freq", torch.ones(2))

    assert Architecture.of(Own()).reads("inv_freq")


def test_what_cannot_be_built_is_said_once(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "nobody_s"}))
    with pytest.warns(UnknownClassWarning, match=r"config\.json: its class can't be built here"):
        assert architecture_of(tmp_path) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint = Checkpoint.of(tmp_path)
    same(checkpoint, load_file(tmp_path / "model.safetensors"))


def test_without_transformers_files_are_read_as_they_are_and_that_is_said_once(
    tmp_path: Path,
) -> None:
    for name in ("one", "two"):
        vit().save_pretrained(tmp_path / name)
    code = """
import sys, warnings
sys.modules["transformers"] = None
import fusionkit
names = [set(fusionkit.Checkpoint.of(folder)) for folder in sys.argv[1:]]
assert all("vit.encoder.layer.0.attention.attention.query.weight" in each for each in names)
"""
    run = [sys.executable, "-c", code, str(tmp_path / "one"), str(tmp_path / "two")]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stderr.count("UnknownClassWarning: transformers is not installed") == 1
    assert "pip install transformers" in done.stderr


# --- folders as their class has them ------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, mixtral, vit, gpt2])
@pytest.mark.parametrize("size", ["5GB", "4kB"], ids=["one file", "shards"])
def test_a_folder_is_what_from_pretrained_makes_of_it(make: Any, size: str, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path, max_shard_size=size)
    same(Checkpoint.of(tmp_path), Checkpoint.of(type(model).from_pretrained(tmp_path)))


def test_one_expert_is_read_of_its_own_files_alone(tmp_path: Path) -> None:
    """A stack made of a file's experts is never made for one of them."""
    model = mixtral()
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.of(tmp_path)
    stored = checkpoint.as_stored
    read: list[str] = []

    class Watched(type(stored)):  # type: ignore[misc]
        def __getitem__(self, name: str) -> Tensor:
            read.append(name)
            return super().__getitem__(name)

    stored.__class__ = Watched
    assert torch.equal(checkpoint.row(GATE, 1), model.state_dict()[GATE][1])
    assert read == [
        f"model.layers.0.block_sparse_moe.experts.1.{name}.weight" for name in ("w1", "w3")
    ]


def test_a_tied_head_is_there_whether_stored_or_not(tmp_path: Path) -> None:
    llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert Checkpoint.of(tmp_path).aliases == {HEAD: EMBED}
    edit(tmp_path, lambda state: {**state, HEAD: state[EMBED].clone()})
    assert Checkpoint.of(tmp_path).aliases == {HEAD: EMBED}
    edit(tmp_path, lambda state: {n: t for n, t in state.items() if n != EMBED})
    checkpoint = Checkpoint.of(tmp_path)
    assert checkpoint.aliases == {HEAD: EMBED}
    assert torch.equal(checkpoint[EMBED], checkpoint[HEAD])


def test_a_head_stored_apart_is_apart_whatever_the_config_says(tmp_path: Path) -> None:
    llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    edit(tmp_path, lambda state: {**state, HEAD: state[EMBED] + 1})
    checkpoint = Checkpoint.of(tmp_path)
    assert checkpoint.aliases == {}
    assert torch.equal(checkpoint[HEAD], checkpoint[EMBED] + 1)


def test_a_bare_file_says_by_its_bytes_that_its_head_is_tied(tmp_path: Path) -> None:
    weight = torch.randn(6, 4)
    other = {"layer.weight": weight.clone()}  # equal, and no head
    tensors = {"model.embed_tokens.weight": weight, "lm_head.weight": weight.clone(), **other}
    save_file(tensors, tmp_path / "a.safetensors")
    assert Checkpoint.of(tmp_path / "a.safetensors").aliases == {HEAD: EMBED}
    save_file({**tensors, HEAD: -weight}, tmp_path / "b.safetensors")
    assert Checkpoint.of(tmp_path / "b.safetensors").aliases == {}


def test_what_no_one_reads_is_not_seen_and_what_may_be_someones_is(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    frequencies, own = "model.layers.0.self_attn.rotary_emb.inv_freq", "my_head.weight"
    edit(tmp_path, lambda s: {**s, frequencies: torch.ones(4), own: torch.ones(2, 16)})
    checkpoint = Checkpoint.of(tmp_path)
    assert frequencies not in checkpoint
    assert checkpoint.unread == {frequencies}
    assert own in checkpoint


def test_a_file_that_a_class_cannot_be_made_of_is_refused(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path)
    lost = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    edit(tmp_path, lambda state: {n: t for n, t in state.items() if n != lost})
    with pytest.raises(Exception, match=rf"(?s){tmp_path}.*can't be read into '{GATE}'"):
        Checkpoint.of(tmp_path)


def test_names_of_compiled_and_wrapped_models_are_the_models_own() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    wanted = copy.deepcopy(model.state_dict())
    state = {f"_orig_mod.{name}": tensor for name, tensor in wanted.items()}
    same(Checkpoint.of(state), wanted)
    inner = {name.replace("0.", "0._orig_mod."): tensor for name, tensor in wanted.items()}
    same(Checkpoint.of(inner), wanted)
    compiled: Any = torch.compile(model)
    same(Checkpoint.of(compiled), wanted)
    clash = {"a": torch.zeros(1), "_orig_mod.a": torch.ones(1)}
    same(Checkpoint.of(clash), clash)


def test_a_stranger_s_file_is_conformed_by_another_s_class(tmp_path: Path) -> None:
    """A file without a configuration has the names of the class that its family is of."""
    model = vit()
    model.save_pretrained(tmp_path)
    bare = Checkpoint.of({**load_file(tmp_path / "model.safetensors")})
    assert bare.keys() != model.state_dict().keys()
    same(conformed(bare, Architecture.of(model)), model.state_dict())
