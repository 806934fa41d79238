"""Bundles as PEFT adapters: loaded by plain PEFT, they give the bundle's own outputs."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft_adapters import CONFIGS, net, saved
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from fusionkit import EMR, SVD, Bundle, Dense, Family, MagnitudePrune
from fusionkit.bundles import export_peft
from fusionkit.bundles.compress import compress
from fusionkit.bundles.export_peft import export_adapter
from fusionkit.cli import main as cli
from fusionkit.errors import BundleError

TINY: dict[str, Any] = {"num_labels": 3, "attn_implementation": "eager"}


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=20, intermediate_size=24, **sizes, **TINY)
    return BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, pad_token_id=0, **TINY)
    return GPT2ForSequenceClassification(config)


class Conv(nn.Module):
    """Convolution, BatchNorm, and names that end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 8)
        self.block = nn.ModuleDict({"fc": nn.Linear(8, 9, bias=False)})
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.head(self.block["fc"](self.fc(x).relu()))  # type: ignore[no-any-return]


def vit() -> nn.Module:
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes)
    return model


TOKENS = torch.arange(1, 19).view(3, 6)
IMAGES = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
MODELS: dict[str, tuple[Any, Tensor, list[str]]] = {
    "bert": (bert, TOKENS, ["classifier.*"]),
    "gpt2": (gpt2, TOKENS, ["score.*"]),
    "conv": (Conv, IMAGES, ["head.*"]),
}


def made(make: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = make()
    return model.eval()


def tuned(model: nn.Module, rank: int = 2) -> dict[str, Tensor]:
    """Every tensor moved; matrices by so many directions, buffers too."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    state = {}
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            state[name] = tensor
        elif tensor.ndim < 2:
            state[name] = tensor + noise(*tensor.shape).abs()
        else:
            rows = tensor.shape[0]
            delta = noise(rows, rank) @ noise(rank, tensor.numel() // rows)
            state[name] = tensor + delta.view(tensor.shape)
    return state


def logits(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(x)
    return output if isinstance(output, Tensor) else output.logits  # type: ignore[no-any-return]


def loaded(model: nn.Module, folder: Path) -> Any:
    """By plain PEFT, which must not miss a key or know one too many."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = PeftModel.from_pretrained(model, folder).eval()  # type: ignore[arg-type]
    said = [str(each.message) for each in caught]
    assert not [text for text in said if "keys" in text], said
    return adapted


def restored(make: Any, bundle: Bundle, task: str = "t") -> nn.Module:
    model = made(make)
    model.load_state_dict(bundle.state_dict(task))
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_lora_extracted_from_a_full_fine_tune(name: str, dtype: str, tmp_path: Path) -> None:
    make, x, private = MODELS[name]
    base = made(make)
    codec = SVD(rank=2, dtype="fp32")
    bundle = compress(base, {"t": tuned(base)}, codec, tmp_path / "b", private=private)
    export_adapter(bundle, "t", tmp_path / "a", dtype=dtype)
    expected = logits(restored(make, bundle), x)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == "fp32" else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(logits(loaded(made(make), tmp_path / "a"), x), expected, **close)
    assert not torch.allclose(expected, logits(base, x), atol=0.05)
    # And read back by FusionKit itself.
    again = Family(made(make), {"t": str(tmp_path / "a")}, private).finetuned["t"]
    if dtype == "fp32":
        for key, tensor in bundle.state_dict("t").items():
            if not key.endswith(".attn.bias"):
                torch.testing.assert_close(again[key], tensor, rtol=1e-4, atol=1e-5)


def test_ranks_that_differ_and_names_that_end_alike(tmp_path: Path) -> None:
    """PEFT looks ranks up by the ends of names: `fc` must not be taken for `block.fc`."""
    base = made(Conv)
    codec = SVD(rank={"fc.weight": 1, "block.fc.*": 3, "*": 2}, dtype="fp32")
    bundle = compress(base, {"t": tuned(base, 4)}, codec, private=["head.*"])
    export_adapter(bundle, "t", tmp_path / "a", dtype="fp32")
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    assert tensors["base_model.model.fc.lora_A.weight"].shape[0] == 1
    assert tensors["base_model.model.block.fc.lora_A.weight"].shape[0] == 3
    model = loaded(made(Conv), tmp_path / "a")
    torch.testing.assert_close(
        logits(model, IMAGES), logits(restored(Conv, bundle), IMAGES), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["rslora", "patterns", "a bias of its own", "ia3 and a head"])
def test_adapters_go_out_as_they_came(name: str, tmp_path: Path) -> None:
    original = saved(tmp_path / "in", CONFIGS[name])
    bundle = compress(
        net(),
        {"t": str(tmp_path / "in")},
        Dense("fp32"),
        private=["head.*"],
        adapters="modules",
    )
    export_adapter(bundle, "t", tmp_path / "out", dtype="fp32")
    x = TOKENS % 12
    exported = loaded(net(), tmp_path / "out")
    torch.testing.assert_close(logits(exported, x), logits(original, x), rtol=1e-4, atol=1e-5)


def test_a_cut_adapter(tmp_path: Path) -> None:
    """PERU-LoRA's cut, out again: the product's best approximation of that rank."""
    torch.manual_seed(0)
    settings: Any = {"r": 4, "target_modules": ["query", "value"], "init_lora_weights": False}
    original: Any = get_peft_model(made(bert), LoraConfig(**settings))  # type: ignore[arg-type]
    original.save_pretrained(tmp_path / "in")
    bundle = compress(made(bert), {"t": str(tmp_path / "in")}, SVD(rank=2, dtype="fp32"))
    export_adapter(bundle, "t", tmp_path / "out", dtype="fp32")
    exported = loaded(made(bert), tmp_path / "out")
    expected = logits(restored(bert, bundle), TOKENS)
    torch.testing.assert_close(logits(exported, TOKENS), expected, rtol=1e-4, atol=1e-5)
    assert exported.peft_config["default"].r == 2


def test_with_no_factors_at_all_there_is_no_lora(tmp_path: Path) -> None:
    base = made(Conv)
    bundle = compress(base, {"t": tuned(base)}, SVD(rank=9), private=["head.*"])
    with pytest.raises(BundleError, match=r"kept every matrix whole.*give a rank"):
        export_adapter(bundle, "t", tmp_path / "a")
    export_adapter(bundle, "t", tmp_path / "a", rank=6, dtype="fp32")


@pytest.mark.parametrize("codec", [EMR(dtype="fp32"), MagnitudePrune(0.3, dtype="fp32")])
def test_codecs_without_factors_need_a_rank(codec: Any, tmp_path: Path) -> None:
    base = made(bert)
    bundle = compress(base, {"t": tuned(base)}, codec, private=["classifier.*"])
    with pytest.raises(BundleError, match=r"(?s)has no low-rank factors of:.*give a rank"):
        export_adapter(bundle, "t", tmp_path / "a")
    assert not (tmp_path / "a").exists()
    export_adapter(bundle, "t", tmp_path / "a", rank=24, dtype="fp32")
    torch.testing.assert_close(
        logits(loaded(made(bert), tmp_path / "a"), TOKENS),
        logits(restored(bert, bundle), TOKENS),
        rtol=1e-3,
        atol=1e-4,
    )


def test_both_factors_are_well_scaled(tmp_path: Path) -> None:
    """Factors that fp16 can't hold, whose product it can: the scale is shared out evenly."""
    adapted = saved(tmp_path / "in", CONFIGS["rslora"])
    path = tmp_path / "in/adapter_model.safetensors"
    scaled = {
        name: tensor * (1e6 if "lora_A" in name else 1e-6)
        for name, tensor in load_file(path).items()
    }
    save_file(scaled, path)
    bundle = compress(net(), {"t": str(tmp_path / "in")}, Dense("fp32"), adapters="modules")
    export_adapter(bundle, "t", tmp_path / "out")
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    for name, a in tensors.items():
        if "lora_A" in name:
            b = tensors[name.replace("lora_A", "lora_B")]
            torch.testing.assert_close(
                a.float().norm(dim=1), b.float().norm(dim=0), rtol=1e-2, atol=0
            )
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    x = TOKENS % 12
    exported = loaded(net(), tmp_path / "out")
    torch.testing.assert_close(logits(exported, x), logits(adapted, x), rtol=1e-2, atol=1e-2)


def test_lora_only_leaves_the_rest_out_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = made(bert)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    save_file(tuned(base), tmp_path / "t.safetensors")
    compress(
        tmp_path / "base.safetensors",
        {"t": tmp_path / "t.safetensors"},
        SVD(rank=2),
        tmp_path / "b",
        private=["classifier.*"],
    )
    cli.main(
        ["export", str(tmp_path / "b"), "--task=t", f"--out={tmp_path / 'a'}", "--format=peft",
         "--lora_only=true"]
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "left out, as no LoRA can hold them" in said
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    assert all("lora_" in name for name in tensors)
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["modules_to_save"] is None
    assert config["bias"] == "none"
    loaded(made(bert), tmp_path / "a")


def test_a_square_matrix_among_both_layouts_is_refused(tmp_path: Path) -> None:
    base = net()
    bare = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    bundle = compress(bare, {"t": tuned(base, 1)}, SVD(rank=1), private=["head.*"])
    with pytest.raises(BundleError, match=r"both layouts, and 'layer\.1\.weight' does not show"):
        export_adapter(bundle, "t", tmp_path / "a")
    bundle = compress(base, {"t": tuned(base, 1)}, SVD(rank=1, dtype="fp32"), private=["head.*"])
    export_adapter(bundle, "t", tmp_path / "a", dtype="fp32")  # a live model knows
    expected = net()
    expected.load_state_dict(bundle.state_dict("t"))
    x = TOKENS % 12
    torch.testing.assert_close(logits(loaded(net(), tmp_path / "a"), x), logits(expected, x))


def test_tensors_outside_modules_are_refused_by_name(tmp_path: Path) -> None:
    base = made(vit)
    bundle = compress(base, {"t": tuned(base)}, SVD(rank=2), private=["head.*"])
    with pytest.raises(BundleError, match=r"(?s)no place for.*'cls_token'.*set lora_only"):
        export_adapter(bundle, "t", tmp_path / "a")
    left_out = export_adapter(bundle, "t", tmp_path / "a", lora_only=True)
    assert {"cls_token", "pos_embed", "norm.weight", "head.bias"} <= set(left_out)
    loaded(made(vit), tmp_path / "a")


class TestBadInput:
    @pytest.fixture
    def bundle(self, tmp_path: Path) -> Bundle:
        base = made(Conv)
        return compress(base, {"t": tuned(base)}, SVD(rank=2), private=["head.*"])

    def test_unknown_task(self, bundle: Bundle, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match="no task 'u'"):
            export_adapter(bundle, "u", tmp_path / "a")
        assert list(tmp_path.iterdir()) == []

    def test_unknown_dtype(self, bundle: Bundle, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match="unknown dtype 'int8'"):
            export_adapter(bundle, "t", tmp_path / "a", dtype="int8")

    def test_what_is_there_stays(self, bundle: Bundle, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "a/precious").touch()
        with pytest.raises(BundleError, match="exists"):
            export_adapter(bundle, "t", tmp_path / "a")
        with pytest.raises(BundleError, match=r"is not a folder with adapter_config\.json"):
            export_adapter(bundle, "t", tmp_path / "a", overwrite=True)
        assert (tmp_path / "a/precious").exists()
        export_adapter(bundle, "t", tmp_path / "b")
        export_adapter(bundle, "t", tmp_path / "b", overwrite=True)

    def test_too_large_for_fp16(self, tmp_path: Path) -> None:
        base = made(Conv)
        huge = {n: t * 1e12 if t.is_floating_point() else t for n, t in tuned(base).items()}
        bundle = compress(base, {"t": huge}, SVD(rank=2, dtype="fp32"), private=["head.*"])
        with pytest.raises(BundleError, match=r"task 't': factor '.*float16; .*in bf16 or fp32"):
            export_adapter(bundle, "t", tmp_path / "a")
        assert list(tmp_path.iterdir()) == []
        export_adapter(bundle, "t", tmp_path / "a", dtype="bf16")


# --- what the model's class says ----------------------------------------------------------------

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


def llama(tied: bool = False) -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=20, tie_word_embeddings=tied, **SMALL)
    )


def gpt2_lm() -> nn.Module:
    config = GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=20, decoder_start_token_id=0, pad_token_id=0, **sizes)
    )


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=20, num_key_value_heads=2, num_local_experts=3, **SMALL
    )
    return transformers.MixtralForCausalLM(config)


def vit_hf() -> nn.Module:
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=2, **SMALL)
    return transformers.ViTForImageClassification(config)


def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(vocab_size=20, dim=16, n_layers=1, n_heads=2)
    config.hidden_dim = 24
    return transformers.DistilBertForSequenceClassification(config)


def moved(make: Any, rank: int = 2, bare: bool = False) -> Any:
    """Matrices moved by so many directions, experts' too; and, unless bare, all the rest."""
    model, generator = made(make), torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    with torch.no_grad():
        for parameter in model.parameters():
            shape = parameter.shape
            if parameter.ndim in {2, 3} and min(shape) > 1:
                *stack, rows, columns = shape
                left, right = noise(*stack, rows, rank), noise(*stack, rank, columns)
                parameter.add_(left @ right)
            elif not bare:
                parameter.add_(noise(*shape))
    return model


def called(model: Any, x: Tensor, name: str) -> Tensor:
    extra = {"decoder_input_ids": x} if name == "t5" else {}
    with torch.no_grad():
        found: Tensor = model.eval()(x, **extra).logits
    return found


PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CLASSES: dict[str, tuple[Any, Tensor]] = {
    "llama": (llama, TOKENS),
    "llama tied": (lambda: llama(tied=True), TOKENS),
    "gpt2": (gpt2_lm, TOKENS),
    "t5": (t5, TOKENS),
    "mixtral": (mixtral, TOKENS),
    "vit": (vit_hf, PIXELS),
    "distilbert": (distilbert, TOKENS),
}


@pytest.mark.parametrize("live", [False, True], ids=["folder", "live"])
@pytest.mark.parametrize("name", CLASSES)
def test_the_same_outputs_before_and_after_merging(name: str, live: bool, tmp_path: Path) -> None:
    """Ties, layouts, experts, renamed classes: by the class, not by names."""
    make, x = CLASSES[name]
    base, fine = made(make), moved(make)
    given: tuple[Any, Any] = base, fine
    if not live:
        base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
        fine.save_pretrained(tmp_path / "fine")
        given = tmp_path / "base", tmp_path / "fine"
    bundle = compress(given[0], {"t": given[1]}, SVD(rank=2, dtype="fp32"))
    assert export_adapter(bundle, "t", tmp_path / "a", dtype="fp32") == []
    adapted = loaded(made(make), tmp_path / "a")
    expected = called(restored(make, bundle), x, name)
    torch.testing.assert_close(called(adapted, x, name), expected, rtol=1e-4, atol=1e-4)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(called(merged, x, name), expected, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == (None if live else str(tmp_path / "base"))


def test_experts_have_factors(tmp_path: Path) -> None:
    bundle = compress(made(mixtral), {"t": moved(mixtral, bare=True)}, SVD(rank=2, dtype="fp32"))
    export_adapter(bundle, "t", tmp_path / "a", dtype="fp32")
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    layer = "base_model.model.model.layers.0.mlp.experts"
    found = {n.removeprefix(layer): list(t.shape) for n, t in tensors.items() if layer in n}
    assert found == {
        ".lora_A.weight": [6, 24],
        ".lora_B.weight": [16, 6],
        ".base_layer.lora_A.weight": [6, 16],
        ".base_layer.lora_B.weight": [48, 6],
    }


def test_a_small_matrix_kept_whole_is_a_lora_of_full_rank(tmp_path: Path) -> None:
    """The head's two rows, which the codec keeps as they are, need no module of their own."""
    fine = moved(vit_hf, bare=True)
    bundle = compress(made(vit_hf), {"t": fine}, SVD(rank=2, dtype="fp32"))
    assert bundle.factors("t", "classifier.weight") is None
    assert export_adapter(bundle, "t", tmp_path / "a", dtype="fp32", lora_only=True) == []
    adapted = loaded(made(vit_hf), tmp_path / "a")
    torch.testing.assert_close(
        called(adapted, PIXELS, "vit"), called(fine, PIXELS, "vit"), rtol=1e-4, atol=1e-5
    )


def test_the_largest_rank_is_the_rank(tmp_path: Path) -> None:
    codec = SVD(rank={"*q_proj*": 4, "*": 1}, dtype="fp32")
    bundle = compress(made(llama), {"t": moved(llama, 4)}, codec)
    export_adapter(bundle, "t", tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4
    assert set(config["rank_pattern"].values()) == {1}
    loaded(made(llama), tmp_path / "a")


def test_a_tied_embedding_is_no_lora_alone(tmp_path: Path) -> None:
    make = CLASSES["llama tied"][0]
    bundle = compress(made(make), {"t": moved(make, bare=True)}, SVD(rank=2))
    left_out = export_adapter(bundle, "t", tmp_path / "a", lora_only=True)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(left_out)
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    assert not [name for name in tensors if "embed" in name or "lm_head" in name]


SERVED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_for_vllm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(llama).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    moved(llama).save_pretrained(tmp_path / "fine")
    compress(tmp_path / "base", {"t": tmp_path / "fine"}, SVD(rank=2), tmp_path / "b")
    cli.main(
        ["export", str(tmp_path / "b"), "--task=t", f"--out={tmp_path / 'a'}", "--format=peft",
         "--for", "vllm", "--base_name=meta-llama/Llama-3.2-1B"]
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "left out, for vllm" in said
    assert "lm_head.weight" in said
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    assert {name.rpartition(".lora_")[0].rpartition(".")[2] for name in tensors} == SERVED
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "meta-llama/Llama-3.2-1B"
    assert config["modules_to_save"] is None


def test_patterns_leave_out(tmp_path: Path) -> None:
    bundle = compress(made(llama), {"t": moved(llama)}, SVD(rank=2))
    left_out = export_adapter(bundle, "t", tmp_path / "a", leave_out=["lm_head*", "*norm*"])
    assert "lm_head.weight" in left_out
    assert "model.norm.weight" in left_out
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    assert not [name for name in tensors if "lm_head" in name or "norm" in name]
    loaded(made(llama), tmp_path / "a")
    with pytest.raises(BundleError, match=r"(?s)task 't' would change nothing: .*leave out less"):
        export_adapter(bundle, "t", tmp_path / "none", leave_out=["*"])
    assert not (tmp_path / "none").exists()


def test_an_adapter_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    bundle = compress(made(llama), {"t": made(llama)}, SVD(rank=2))
    with pytest.raises(BundleError, match="task 't' does not differ from the base"):
        export_adapter(bundle, "t", tmp_path / "a")


def test_a_wrong_adapter_does_not_appear(tmp_path: Path, monkeypatch: Any) -> None:
    """What PEFT would rebuild otherwise, or not load, is noticed before the folder is there."""
    bundle = compress(made(llama), {"t": moved(llama)}, SVD(rank=2))

    def other(tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
        save_file({n: t.roll(1, 0) for n, t in tensors.items()}, *args, **kwargs)

    def fewer(tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
        kept = [name for name in tensors if "layers.1.mlp.up_proj" not in name]
        save_file({name: tensors[name] for name in kept}, *args, **kwargs)

    for write, message in ((other, "PEFT would rebuild another"), (fewer, "is missing")):
        monkeypatch.setattr(export_peft, "save_file", write)
        with pytest.raises(BundleError, match=message):
            export_adapter(bundle, "t", tmp_path / "a")
        assert list(tmp_path.iterdir()) == []


class Reads(nn.Module):
    """One layer is called; of the other, the weight is read."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.called(x), self.read.weight, self.read.bias)


def test_a_layer_whose_weight_is_read_is_saved_whole(tmp_path: Path) -> None:
    """A LoRA beside it would do nothing."""

    def make() -> nn.Module:
        return nn.Sequential(Reads(), Reads())

    base = made(make)
    bundle = compress(base, {"t": tuned(base)}, SVD(rank=2, dtype="fp32"))
    export_adapter(bundle, "t", tmp_path / "a", dtype="fp32")
    x = torch.randn(3, 6)
    adapted = loaded(made(make), tmp_path / "a")
    torch.testing.assert_close(logits(adapted, x), logits(restored(make, bundle), x))
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["modules_to_save"] == ["0.read", "1.read"]
