"""LoRAs of one file, as diffusers and kohya's scripts write them: read, or named."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fusionkit import Bundle, Checkpoint, Dense, Family
from fusionkit.bundles.compress import compress
from fusionkit.errors import CheckpointError, FamilyError, FusionKitError

ALPHA, RANK = 6.0, 2


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Unet(nn.Module):
    """Modules as a small UNet has them, with `_` and `.` in their names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3)
        self.down_blocks = nn.ModuleList([nn.ModuleDict({"attn_1": Attention()})])
        self.proj_in = nn.Conv2d(8, 6, 1)
        self.norm = nn.LayerNorm(6)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(8, 8)
        self.to_out = nn.ModuleList([nn.Linear(8, 5)])


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(6, 6)})])


def make(kind: Callable[[], nn.Module] = Unet) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


TARGETS = ["conv_in", "to_q", "to_out.0", "proj_in"]


def trained(base: nn.Module, targets: list[str], alpha: float = ALPHA, **config: Any) -> Any:
    """A LoRA of a base, at random, and its tensors by module and by what they are to it."""
    settings: Any = {"r": RANK, "lora_alpha": alpha, "target_modules": targets, **config}
    model: Any = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = 0.3 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + noise if "magnitude" in name else noise)
    state = peft.get_peft_model_state_dict(model)
    plain = {n.removeprefix("base_model.model."): t.contiguous() for n, t in state.items()}
    return model, plain


def named(
    tensors: dict[str, Tensor], down: str, up: str, prefix: str, alpha: float | None = None
) -> dict[str, Tensor]:
    """The tensors under other names; kohya's where the prefix ends in `_`."""
    found = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".lora_")
        place = prefix + (module.replace(".", "_") if prefix.endswith("_") else module)
        found[place + (down if leaf.startswith("A") else up)] = tensor
        if alpha is not None:
            found[f"{place}.alpha"] = torch.tensor(alpha)
    return found


NAMES = {
    "diffusers": (".lora_A.weight", ".lora_B.weight", "unet."),
    "diffusers' transformer": (".lora_A.weight", ".lora_B.weight", "transformer."),
    "diffusers, older": (".lora.down.weight", ".lora.up.weight", "unet."),
    "text encoders'": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", "unet."),
    "attention processors": (".lora.down.weight", ".lora.up.weight", ""),
    "kohya": (".lora_down.weight", ".lora_up.weight", "lora_unet_"),
    "kohya with dots": (".lora_down.weight", ".lora_up.weight", "unet."),
    "LyCORIS": (".lora_down.weight", ".lora_up.weight", "lycoris_"),
}


def check(base: nn.Module, model: Any, source: Any) -> Family:
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = model.merge_and_unload().state_dict()
    family = Family(base, {"t": source})
    moved = {name for name, tensor in merged.items() if not torch.equal(tensor, before[name])}
    assert set(family.names("delta")) == moved
    assert moved
    for name, tensor in merged.items():
        torch.testing.assert_close(family.finetuned["t"][name], tensor, rtol=1e-5, atol=1e-5)
    return family


@pytest.mark.parametrize("alpha", [None, ALPHA])
@pytest.mark.parametrize("how", NAMES)
def test_files_are_read_as_peft_merges_their_factors(
    how: str, alpha: float | None, tmp_path: Path
) -> None:
    """With an alpha, it scales; without, it is the rank, and nothing does."""
    base = make()
    model, tensors = trained(base, TARGETS, alpha or RANK)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(named(tensors, *NAMES[how], alpha), path)
    check(base, model, str(path))
    again, _ = trained(base, TARGETS, alpha or RANK)
    check(base, again, tmp_path)  # the folder that holds it


def test_kohyas_old_names_of_attention_processors(tmp_path: Path) -> None:
    base = make()
    model, tensors = trained(base, ["to_q", "to_out.0"], RANK)
    old = {
        name.replace(".to_q.lora_A", ".processor.to_q_lora.down")
        .replace(".to_q.lora_B", ".processor.to_q_lora.up")
        .replace(".to_out.0.lora_A", ".processor.to_out_lora.down")
        .replace(".to_out.0.lora_B", ".processor.to_out_lora.up"): tensor
        for name, tensor in tensors.items()
    }
    torch.save(old, tmp_path / "pytorch_lora_weights.bin")
    check(base, model, str(tmp_path))


@pytest.mark.parametrize("how", ["bin", "mapping", "checkpoint", "kept by its codec"])
def test_it_is_the_same_wherever_it_is(how: str, tmp_path: Path) -> None:
    base = make()
    model, tensors = trained(base, TARGETS)
    state = named(tensors, *NAMES["kohya"], ALPHA)
    torch.save(state, tmp_path / "pets.pt")
    path = str(tmp_path / "pets.pt")
    sources: dict[str, Any] = {"bin": path, "mapping": state, "checkpoint": Checkpoint.of(path)}
    if how in sources:
        check(base, model, sources[how])
        return
    compress(base, {"t": path}, Dense("fp32"), tmp_path / "b", adapters="modules")
    merged = model.merge_and_unload().state_dict()
    for name, tensor in Bundle(tmp_path / "b", base).state_dict("t").items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("component", ["unet", ""])
def test_the_config_in_diffusers_header(component: str, tmp_path: Path) -> None:
    base = make()
    patterns = {"rank_pattern": {"to_q": 3}, "alpha_pattern": {"conv_in": 5}, "use_dora": True}
    model, tensors = trained(base, ["conv_in", "to_q"], **patterns)
    config = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in model.peft_config["default"].to_dict().items()
    }
    prefix = f"{component}." if component else ""
    header = json.dumps({f"{prefix}{key}": value for key, value in config.items()})
    path = tmp_path / "pytorch_lora_weights.safetensors"
    state = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    save_file(state, path, metadata={"format": "pt", "lora_adapter_metadata": header})
    check(base, model, str(path))
    extra = json.dumps({f"{prefix}{key}": v for key, v in {**config, "use_qalora": True}.items()})
    save_file(state, path, metadata={"lora_adapter_metadata": extra})
    refused(base, path, CheckpointError, "use_qalora.*can't merge it")
    save_file(
        {**state, f"{prefix}conv_in.alpha": torch.tensor(1.0)},
        path,
        metadata={"lora_adapter_metadata": header},
    )
    refused(base, path, CheckpointError, "says its scale twice")


def test_factors_of_another_shape_for_one_by_one_convolutions(tmp_path: Path) -> None:
    base = make()
    model, tensors = trained(base, ["proj_in", "to_q"])
    turned = {
        name: tensor.flatten(1) if "proj_in" in name else tensor[..., None, None]
        for name, tensor in tensors.items()
    }
    save_file(named(turned, *NAMES["kohya"], ALPHA), tmp_path / "a.safetensors")
    check(base, model, str(tmp_path / "a.safetensors"))


def test_factors_of_other_components_are_named(tmp_path: Path) -> None:
    """Each is read into its own base; the other is said, and nothing is lost without a word."""
    unet, text = make(), make(Text)
    models, state = {}, {}
    for prefix, base, targets in (("lora_unet_", unet, TARGETS), ("lora_te_", text, ["q_proj"])):
        models[prefix], tensors = trained(base, targets)
        state.update(named(tensors, *NAMES["kohya"][:2], prefix, ALPHA))
    path = str(tmp_path / "pets.safetensors")
    save_file(state, path)
    with pytest.warns(UserWarning, match="factors of lora_te too, .* only those of lora_unet"):
        check(unet, models["lora_unet_"], path)
    with pytest.warns(UserWarning, match="factors of lora_unet too, .* only those of lora_te"):
        check(text, models["lora_te_"], path)


def test_components_that_both_fit_are_refused(tmp_path: Path) -> None:
    base = make(Text)
    _, tensors = trained(base, ["q_proj"])
    state = {
        name: tensor.clone()
        for prefix in ("lora_te1_", "lora_te2_")
        for name, tensor in named(tensors, *NAMES["kohya"][:2], prefix, ALPHA).items()
    }
    path = save(state, tmp_path)
    refused(base, path, FamilyError, "lora_te1 and lora_te2, which all fit the base")


def test_names_that_are_not_the_bases(tmp_path: Path) -> None:
    base = make()
    _, tensors = trained(base, ["to_q"])
    state = named(tensors, *NAMES["kohya"])
    other = {name.replace("down_blocks_0", "input_blocks_1_1"): t for name, t in state.items()}
    said = "'input_blocks_1_1_attn_1_to_q'.*load_lora_weights.*pipe.unet.save_lora_adapter"
    refused(base, save(other, tmp_path), FamilyError, said)
    part = {**state, **{name.replace("to_q", "to_z"): t.clone() for name, t in state.items()}}
    refused(base, save(part, tmp_path), FamilyError, "'down_blocks_0_attn_1_to_z'")
    text = {name.replace("lora_unet", "lora_te"): t for name, t in other.items()}
    refused(base, save(text, tmp_path), FamilyError, "is a LoRA of lora_te.*add_prefix")


def test_a_name_that_several_modules_have(tmp_path: Path) -> None:
    base = nn.ModuleDict({"a_b": nn.Linear(4, 4), "a": nn.ModuleDict({"b": nn.Linear(4, 4)})})
    state = {f"lora_unet_a_b.lora_{side}.weight": torch.ones(4, 4) for side in ("up", "down")}
    refused(base, save(state, tmp_path), FamilyError, "'a_b': a_b or a.b")


def test_factors_that_do_not_make_the_weight(tmp_path: Path) -> None:
    state = {
        "lora_unet_conv_in.lora_down.weight": torch.ones(2, 4, 5, 5),
        "lora_unet_conv_in.lora_up.weight": torch.ones(8, 2, 1, 1),
    }
    said = r"'conv_in': factors \[2, 4, 5, 5\] and \[8, 2, 1, 1\], weight \[8, 4, 3, 3\]"
    refused(make(), save(state, tmp_path), FamilyError, said)


Q = "lora_unet_down_blocks_0_attn_1_to_q"
WHOLE = {f"{Q}.lora_down.weight": torch.ones(2, 8), f"{Q}.lora_up.weight": torch.ones(8, 2)}
BROKEN = {
    "LoHa": ({f"{Q}.hada_{w}": torch.ones(8, 2) for w in ("w1_a", "w1_b")}, "tensors of LoHa"),
    "LoKr": ({f"{Q}.lokr_{w}": torch.ones(8, 2) for w in ("w1", "w2")}, "tensors of LoKr"),
    "a middle": ({**WHOLE, f"{Q}.lora_mid.weight": torch.ones(2, 2)}, "LoCon with a middle"),
    "GLoRA": ({f"{Q}.{w}.weight": torch.ones(8, 2) for w in ("a1", "b1")}, "tensors of GLoRA"),
    "DoRA": ({**WHOLE, f"{Q}.dora_scale": torch.ones(8, 1)}, "tensors of DoRA as LyCORIS"),
    "OFT": ({f"{Q}.oft_blocks": torch.ones(2, 4, 4)}, "tensors of OFT"),
    "whole": ({**WHOLE, f"{Q}.diff_b": torch.ones(8)}, "tensors of whole differences"),
    "IA3": ({f"{Q}.on_input": torch.ones(1), f"{Q}.ia3_l": torch.ones(8)}, r"tensors of \(IA\)³"),
    "half": ({f"{Q}.lora_down.weight": torch.ones(2, 8)}, "lacks its lora_B.weight .*save it"),
    "ranks": ({**WHOLE, f"{Q}.lora_up.weight": torch.ones(8, 3)}, "no rank in common"),
    "alphas": ({**WHOLE, f"{Q}.alpha": torch.ones(2)}, "no single number"),
    "no such": ({**WHOLE, "mood": torch.ones(2)}, "tensors that are no LoRA's"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_read_is_refused_by_name(name: str, tmp_path: Path) -> None:
    state, said = BROKEN[name]
    refused(make(), save(state, tmp_path), CheckpointError, said)


def test_an_alpha_for_some_is_refused(tmp_path: Path) -> None:
    """diffusers and PEFT read such a file in different ways."""
    base = make()
    _, tensors = trained(base, ["to_q", "conv_in"])
    state = named(tensors, *NAMES["diffusers"])
    state["unet.conv_in.alpha"] = torch.tensor(1.0)
    said = "alpha for 'conv_in' and none for 'down_blocks.0.attn_1.to_q'"
    refused(base, save(state, tmp_path), CheckpointError, said)


def test_a_base_whose_names_begin_like_a_component(tmp_path: Path) -> None:
    """GPT-2's are `transformer.h.0…`: these are PEFT's own names, and their scale is not known."""
    base = make(lambda: nn.ModuleDict({"transformer": Attention()}))
    _, tensors = trained(base, ["to_q"])
    said = "is a PEFT LoRA .*without the adapter_config.json"
    refused(base, save(tensors, tmp_path), CheckpointError, said)


# Adapters given as models -------------------------------------------------------------------------


def ia3(base: nn.Module) -> Any:
    config: Any = peft.IA3Config(target_modules=["to_q"], feedforward_modules=[])
    return peft.get_peft_model(copy.deepcopy(base), config)  # type: ignore[arg-type]


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_pefts_file_by_its_own_path_is_its_folder(ending: str, tmp_path: Path) -> None:
    base = make()
    model, _ = trained(base, TARGETS)
    model.save_pretrained(tmp_path / "a", safe_serialization=ending == "safetensors")
    if ending == "bin" and not (tmp_path / "a/adapter_model.bin").is_file():
        state = load_file(tmp_path / "a/adapter_model.safetensors")
        torch.save(state, tmp_path / "a/adapter_model.bin")
        (tmp_path / "a/adapter_model.safetensors").unlink()
    check(base, model, str(tmp_path / f"a/adapter_model.{ending}"))


def as_given(how: str, model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    (folder / "adapter_config.json").unlink()
    torch.save(state, folder / "tensors.pt")
    sources = {
        "file": str(path),
        "folder": str(folder),
        "pickle": str(folder / "tensors.pt"),
        "mapping": state,
        "module": model,
        "state dict": model.state_dict(),
    }
    return sources[how]


HOW = {
    "file": "PEFT .* without the adapter_config.json that says its scale; give the folder",
    "folder": "PEFT .* without the adapter_config.json that says its scale; give the folder",
    "pickle": "PEFT .* without the adapter_config.json that says its scale; give the folder",
    "mapping": "PEFT .* without the adapter_config.json that says its scale; give the folder",
    "module": r"is a live PEFT model.*save_pretrained.*merge_and_unload\(\)",
    "state dict": r"is a live PEFT model.*save_pretrained.*merge_and_unload\(\)",
}


@pytest.mark.parametrize("kind", ["LoRA", "(IA)³"])
@pytest.mark.parametrize("how", HOW)
def test_an_adapter_is_never_kept_as_private_tensors(how: str, kind: str, tmp_path: Path) -> None:
    """Whatever is declared private or frozen: the model that came out would be the base."""
    base = make()
    model = trained(base, TARGETS)[0] if kind == "LoRA" else ia3(base)
    source = as_given(how, model, tmp_path)
    for settings in ({}, {"private": ["*lora_*", "*ia3_l*"], "frozen": ["*"]}):
        with pytest.raises(CheckpointError, match=HOW[how]):
            Family(base, {"t": source}, **settings)
    if kind == "LoRA" and how != "folder":
        with pytest.raises(CheckpointError, match="no base"):
            Family(source, {"t": base})


def test_the_mends_of_a_live_model(tmp_path: Path) -> None:
    base = make()
    model, _ = trained(base, TARGETS)
    model.save_pretrained(tmp_path)
    folder = Family(base, {"t": str(tmp_path)}).finetuned["t"]
    merged = Family(base, {"t": model.merge_and_unload()}).finetuned["t"]
    for name in base.state_dict():
        torch.testing.assert_close(folder[name], merged[name])
    unloaded = trained(base, TARGETS)[0].unload()
    assert Family(unloaded, {"t": str(tmp_path)}).names("delta")


def test_an_adapter_of_any_name_in_a_live_model() -> None:
    base = make()
    config: Any = peft.LoraConfig(r=2, target_modules=["to_q"])
    model = peft.inject_adapter_in_model(config, copy.deepcopy(base), adapter_name="pets")
    with pytest.raises(CheckpointError, match=r"live PEFT model, with '.*lora_A.pets.weight'"):
        Family(base, {"t": model}, private=["*lora*", "*base_layer*"], frozen=["*to_q.weight"])


def test_factors_beside_whole_weights_are_refused() -> None:
    base = make()
    state = {**base.state_dict(), "proj_in.lora_A": torch.ones(2, 8)}
    with pytest.raises(CheckpointError, match=r"'proj_in.lora_A' of a LoRA adapter beside the bas"):
        Family(base, {"t": state}, private=["*lora*"])


def test_a_base_whose_own_class_has_factors_is_a_base() -> None:
    """Phi-4 multimodal's: its LoRAs are tensors of the model like any other."""
    state = {f"q.{name}": torch.ones(4, 4) for name in ("base_layer.weight", "base_layer.bias")}
    state["q.lora_A.vision.weight"] = torch.ones(2, 4)
    moved = {name: tensor + 1 for name, tensor in state.items()}
    assert set(Family(state, {"t": moved}).names("delta")) == set(state)


def save(state: dict[str, Tensor], folder: Path) -> Path:
    save_file(state, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def refused(base: nn.Module, path: Path, kind: type[FusionKitError], said: str) -> None:
    with pytest.raises(kind, match=rf"(?s){path}.*{said}"):
        Family(base, {"t": str(path)})


def test_diffusers_gives_a_file_the_bases_names(tmp_path: Path) -> None:
    """The mend of a name that is not the base's, followed: the same factors, and their scale."""
    diffusers = pytest.importorskip("diffusers")

    def unet() -> Any:
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=4,
            norm_num_groups=4,
        )

    model, tensors = trained(unet(), ["attentions.0.proj_in", "mid_block.resnets.0.conv1"])
    state = named(tensors, *NAMES["kohya"], ALPHA)
    path = save({n.replace("mid_block", "middle_block"): t for n, t in state.items()}, tmp_path)
    refused(unet(), path, FamilyError, "'middle_block_.*unet.save_lora_adapter")
    names = ("vae", "text_encoder", "tokenizer", "scheduler", "safety_checker")
    pipe = diffusers.StableDiffusionPipeline(
        unet=unet(),
        feature_extractor=None,
        requires_safety_checker=False,
        **dict.fromkeys(names),
    )
    pipe.load_lora_weights(str(path), adapter_name="default")
    pipe.unet.save_lora_adapter(str(tmp_path / "named"))
    check(unet(), model, str(tmp_path / "named"))
