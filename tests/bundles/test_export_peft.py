"""Bundles as PEFT adapters: loaded by plain PEFT, they give the bundle's own outputs."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_adapters import CONFIGS, net, saved
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from fusionkit import EMR, SVD, Bundle, Dense, Family, MagnitudePrune
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
    from safetensors.torch import save_file

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
    from safetensors.torch import save_file

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
        with pytest.raises(BundleError, match="does not fit into fp16; export it in bf16 or fp32"):
            export_adapter(bundle, "t", tmp_path / "a")
        assert list(tmp_path.iterdir()) == []
        export_adapter(bundle, "t", tmp_path / "a", dtype="bf16")
