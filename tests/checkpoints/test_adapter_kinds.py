"""Kinds of adapters beside plain LoRA and (IA)³: equal to what PEFT itself merges, or refused."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_adapters import net
from torch import Tensor, nn

from fusionkit import SVD, Checkpoint, Dense, Family
from fusionkit.bundles.compress import compress
from fusionkit.checkpoints.adapters.folder import AdapterFolder
from fusionkit.checkpoints.adapters.layout import AdapterLayout
from fusionkit.checkpoints.stacks import split_tensors, unsplit
from fusionkit.errors import CheckpointError, FamilyError


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Experts(nn.Module):
    """Stacks of experts, (E, out, in); as gpt-oss has them, (E, in, out)."""

    def __init__(self, transposed: bool = False, down: tuple[int, int] = (8, 5)) -> None:
        super().__init__()
        self.is_transposed = transposed
        shapes = {"gate_up_proj": (10, 8), "down_proj": down}
        for name, shape in shapes.items():
            lies = shape[::-1] if transposed else shape
            self.register_parameter(name, nn.Parameter(torch.randn(3, *lies)))
        self.router = nn.Parameter(torch.randn(3, 8))


class Zoo(nn.Module):
    """What PEFT adapts in ways of its own."""

    def __init__(self, experts: Experts | None = None) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out_proj = nn.Linear(8, 8)
        self.conv1 = nn.Conv1d(3, 4, 2)
        self.conv3 = nn.Conv3d(2, 4, 2)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.experts = experts or Experts()


def zoo(experts: Experts | None = None) -> Zoo:
    torch.manual_seed(0)
    return Zoo(experts).eval()


def saved(folder: Path, base: nn.Module, config: Any, scale: float = 0.3) -> Any:
    """Save an adapter of a base whose trained tensors were moved at random; PEFT's model."""
    model: Any = peft.get_peft_model(copy.deepcopy(base), config)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model.eval()


def same_as_peft(base: nn.Module, model: Any, folder: Path) -> Family:
    """Weights and deltas are those of PEFT's merge, all of which moved by more than rounding."""
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    family = Family(base, {"t": str(folder)})
    before = split_tensors(state, family.stacks)
    expected_state = model.merge_and_unload().state_dict()
    merged = split_tensors(expected_state, family.stacks)
    ours = family.finetuned["t"]
    assert set(ours) == set(merged)
    for name, tensor in expected_state.items():  # stacks of experts whole, too
        torch.testing.assert_close(unsplit(ours)[name], tensor, rtol=1e-5, atol=1e-5)
    moved = {name for name, tensor in merged.items() if not torch.equal(tensor, before[name])}
    assert set(family.names("delta")) == moved
    for name, tensor in merged.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-5)
    for vectors in family:
        expected = merged[vectors.name] - before[vectors.name]
        assert expected.norm() > 0.01 * before[vectors.name].norm()
        torch.testing.assert_close(vectors[0], expected, rtol=1e-4, atol=1e-5)
        if product := vectors.low_rank(0):
            torch.testing.assert_close(product.dense(expected.shape), expected, atol=1e-5, rtol=0)
    bundle = compress(base, {"t": str(folder)}, Dense("fp32"))
    for name, tensor in bundle.state_dict("t").items():
        torch.testing.assert_close(tensor, expected_state[name], rtol=1e-5, atol=1e-5)
    return family


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
READ = {
    "attention": peft.LoraConfig(r=2, lora_alpha=5, target_modules=["attn"]),
    "attention and a pattern": peft.LoraConfig(
        r=2, target_modules=["attn"], rank_pattern={"attn": 3}, alpha_pattern={"attn": 4}
    ),
    "out_proj alone": peft.LoraConfig(r=2, target_modules=["out_proj"]),
    "convolutions": peft.LoraConfig(r=2, target_modules=["conv1", "conv3"]),
    "experts": peft.LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=EXPERTS),
    "experts by pattern": peft.LoraConfig(
        r=2,
        use_rslora=True,
        target_modules=["conv1"],
        target_parameters=EXPERTS,
        rank_pattern={"experts.down_proj": 1},
        alpha_pattern={"gate_up_proj": 5},
    ),
    "a router": peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.router"]),
    "three parameters": peft.LoraConfig(
        r=2, target_modules=[], target_parameters=[*EXPERTS, "experts.router"]
    ),
    "dora of convolutions": peft.LoraConfig(r=2, target_modules=["conv1", "conv3"], use_dora=True),
}


@pytest.mark.parametrize("name", READ)
def test_merged_weights_are_pefts(name: str, tmp_path: Path) -> None:
    base = zoo()
    same_as_peft(base, saved(tmp_path / "a", base, READ[name]), tmp_path / "a")


def test_experts_that_lie_the_other_way(tmp_path: Path) -> None:
    base = zoo(Experts(transposed=True))
    same_as_peft(base, saved(tmp_path / "a", base, READ["experts"]), tmp_path / "a")


DORA = {
    "all layers": {"target_modules": ["embed", "conv", "1", "11", "fc"], "lora_alpha": 7},
    "rslora": {"target_modules": ["1", "fc"], "use_rslora": True},
    "turned": {"target_modules": ["turned", "wide"], "fan_in_fan_out": True},
    "a head": {"target_modules": ["1"], "modules_to_save": ["head"]},
}


@pytest.mark.parametrize("name", DORA)
def test_dora_is_pefts(name: str, tmp_path: Path) -> None:
    base = net()
    config = peft.LoraConfig(r=3, use_dora=True, **DORA[name])
    same_as_peft(base, saved(tmp_path / "a", base, config), tmp_path / "a")


def test_dora_in_half_precision(tmp_path: Path) -> None:
    base = net(torch.bfloat16)
    config = peft.LoraConfig(r=3, use_dora=True, target_modules=["1", "fc"])
    merged = saved(tmp_path / "a", base, config).merge_and_unload().state_dict()
    ours = Family(base, {"t": str(tmp_path / "a")}).finetuned["t"]
    for name, tensor in merged.items():
        assert ours[name].dtype == tensor.dtype
        torch.testing.assert_close(ours[name], tensor, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("missing", ["lora_magnitude_vector", "use_dora"])
def test_half_a_dora_is_refused(missing: str, tmp_path: Path) -> None:
    """Without its magnitudes, or the word that they are some, it would be another model."""
    from safetensors.torch import load_file, save_file

    saved(tmp_path, net(), peft.LoraConfig(r=3, use_dora=True, target_modules=["1"]))
    if missing == "use_dora":
        edit(tmp_path, use_dora=False)
    else:
        state = load_file(tmp_path / "adapter_model.safetensors")
        kept = {name: tensor for name, tensor in state.items() if missing not in name}
        save_file(kept, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)use_dora.*(is missing|is not set)"):
        Family(net(), {"t": str(tmp_path)})


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_start_out_of_the_base_is_made_again(
    start: Any, transposed: bool, tmp_path: Path
) -> None:
    """Over the base as it was, as PEFT itself loads such an adapter."""
    names = ["turned", "wide"] if transposed else ["1", "fc"]
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=names, init_lora_weights=start, fan_in_fan_out=transposed
    )
    if transposed and start == "olora":
        config = peft.LoraConfig(r=2, target_modules=["turned"], fan_in_fan_out=True)
        saved(tmp_path / "a", net(), config)
        edit(tmp_path / "a", init_lora_weights="olora")
        with pytest.raises(CheckpointError, match=r"olora on 'turned' .transposed. is not known"):
            Family(net(), {"t": str(tmp_path / "a")})
        return
    trained = saved(tmp_path / "a", net(), config).merge_and_unload().state_dict()
    loaded: Any = peft.PeftModel.from_pretrained(net(), str(tmp_path / "a"))
    family = same_as_peft(net(), loaded, tmp_path / "a")
    for name in family.names("delta"):
        torch.testing.assert_close(family.finetuned["t"][name], trained[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_a_changed_base_that_peft_converted_is_a_plain_lora(start: Any, tmp_path: Path) -> None:
    """The mend of the refusal below, followed: the initial adapter is subtracted by PEFT."""
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["1"], init_lora_weights=start)
    model: Any = peft.get_peft_model(net(), config)  # type: ignore[arg-type]
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape) * parameter.requires_grad)
    if start == "pissa_niter_4":
        model.save_pretrained(tmp_path / "plain")
        with pytest.raises(CheckpointError, match="path_initial_model_for_weight_conversion"):
            Family(net(), {"t": str(tmp_path / "plain")})
    model.save_pretrained(
        tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    merged = model.merge_and_unload().state_dict()
    ours = Family(net(), {"t": str(tmp_path / "a")}).finetuned["t"]
    for name, tensor in merged.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-5)


def test_singular_values_that_are_equal_are_refused(tmp_path: Path) -> None:
    base = net()
    base.layer["1"].weight.data = torch.eye(8)
    config = peft.LoraConfig(r=2, target_modules=["1"], init_lora_weights="pissa")
    saved(tmp_path, base, config)
    with pytest.raises(CheckpointError, match=r"'layer.1.weight' has singular values 2 and 3"):
        compress(base, {"t": str(tmp_path)}, Dense("fp32"))


def test_a_grouped_convolution_is_refused_with_the_reason(tmp_path: Path) -> None:
    base = zoo()
    model = saved(tmp_path, base, peft.LoraConfig(r=2, target_modules=["grouped"]))
    with pytest.raises(NotImplementedError):
        model.merge_and_unload()
    with pytest.raises(FamilyError, match=r"'grouped', a convolution of 2 groups.*can't merge"):
        Family(base, {"t": str(tmp_path)})


def test_experts_whose_factors_fit_two_ways_are_refused(tmp_path: Path) -> None:
    """Square ones, say, where files don't tell rows from columns; PEFT merges them."""
    base = zoo(Experts(down=(8, 8)))
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
    model = saved(tmp_path, base, config)
    with pytest.raises(CheckpointError, match=r"(?s)'experts'.*in several ways.*merge it into"):
        Family(base, {"t": str(tmp_path)})
    merged = model.merge_and_unload()
    assert Family(base, {"t": merged}).names("delta")


def test_parameters_of_another_base_are_refused(tmp_path: Path) -> None:
    base = zoo()
    saved(tmp_path, base, READ["experts"])
    with pytest.raises(FamilyError, match=r"'experts' .*fit none of 'experts.gate_up_proj' \[3"):
        Family(zoo(Experts(down=(8, 6))), {"t": str(tmp_path)})


def test_an_attentions_bias_is_refused(tmp_path: Path) -> None:
    """PEFT adds out_proj's, and not in_proj's; its merge is the mend."""
    base = zoo()
    model = saved(tmp_path, base, peft.LoraConfig(r=2, target_modules=["attn"], lora_bias=True))
    with pytest.raises(CheckpointError, match=r"lora_B.bias': lora_bias .*merge it into its base"):
        Family(base, {"t": str(tmp_path)})
    names = Family(base, {"t": model.merge_and_unload()}).finetuned["t"]
    assert not torch.equal(names["attn.out_proj.bias"], base.attn.out_proj.bias)


NEW = {
    "attention": (zoo, READ["attention"], "LoraModule|'attn': Lora of an attention"),
    "experts": (zoo, READ["experts"], "'experts': Parameter"),
    "dora": (net, peft.LoraConfig(target_modules=["1"], use_dora=True), "'layer.1': Dora"),
    "pissa": (
        net,
        peft.LoraConfig(r=2, target_modules=["1"], init_lora_weights="pissa"),
        "'layer.1': Replacing",
    ),
}


@pytest.mark.parametrize("name", NEW)
def test_adapters_themselves_are_for_plain_products(name: str, tmp_path: Path) -> None:
    make, config, said = NEW[name]
    base = make()
    saved(tmp_path, base, config)
    with pytest.raises(FamilyError, match=rf"(?s){said}.*use adapters: merged"):
        compress(base, {"t": str(tmp_path)}, Dense(), adapters="modules")
    assert compress(base, {"t": str(tmp_path)}, Dense(), adapters="merged").tasks == ("t",)


@pytest.mark.parametrize("name", NEW)
def test_layouts_come_back_from_json(name: str, tmp_path: Path) -> None:
    make, config, _ = NEW[name]
    base = make()
    saved(tmp_path, base, config)
    layout = AdapterFolder(tmp_path).layout(Checkpoint.of(base))
    assert AdapterLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_an_adapter_that_changes_nothing(tmp_path: Path) -> None:
    base = zoo()
    saved(tmp_path, base, READ["experts"], scale=0)
    family = Family(base, {"t": str(tmp_path)})
    for name, tensor in base.state_dict().items():
        assert torch.equal(unsplit(family.finetuned["t"])[name], tensor)
    assert compress(base, {"t": str(tmp_path)}, SVD(rank=1)).tasks == ("t",)


def test_each_expert_has_a_product_of_its_own(tmp_path: Path) -> None:
    """SVD keeps it as it is, without forming it."""
    base = zoo()
    saved(tmp_path, base, READ["experts"])
    family = Family(base, {"t": str(tmp_path)})
    products = [vectors.low_rank(0) for vectors in family]
    assert len(products) == 6
    assert all(product is not None and product.left.shape[1] == 2 for product in products)
    bundle = compress(base, {"t": str(tmp_path)}, SVD(rank=2, dtype="fp32"))
    for name, tensor in unsplit(family.finetuned["t"]).items():
        torch.testing.assert_close(bundle.state_dict("t")[name], tensor, rtol=1e-4, atol=1e-4)


def test_a_product_is_only_given_where_it_is_one(tmp_path: Path) -> None:
    """DoRA's change is none of low rank; SVD then decomposes the weight's change itself."""
    base = net()
    saved(tmp_path, base, peft.LoraConfig(r=3, use_dora=True, target_modules=["1"]))
    family = Family(base, {"t": str(tmp_path)})
    assert family.finetuned["t"].low_rank("layer.1.weight") is None
    bundle = compress(base, {"t": str(tmp_path)}, SVD(rank=8, dtype="fp32"))
    expected: Tensor = family.finetuned["t"]["layer.1.weight"]
    torch.testing.assert_close(
        bundle.state_dict("t")["layer.1.weight"], expected, rtol=1e-4, atol=1e-4
    )


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
