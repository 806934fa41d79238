"""PEFT adapters as fine-tuned models: equal to what PEFT makes of them, or refused."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_adapters import CONFIGS, net, saved
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from fusionkit import (
    EMR,
    SVD,
    TIES,
    Bundle,
    Checkpoint,
    Dense,
    Family,
    Mean,
    Merged,
    TaskArithmetic,
)
from fusionkit.bundles.compress import compress
from fusionkit.checkpoints.adapters.modules import Adapters
from fusionkit.checkpoints.adapters.with_start import WithStart
from fusionkit.checkpoints.view import View
from fusionkit.codecs.base import DeltaCodec
from fusionkit.errors import CheckpointError, FamilyError
from fusionkit.reuse.module import ReuseModule


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_weights_are_pefts(name: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "a", CONFIGS[name])
    family = Family(net(), {"t": str(tmp_path / "a")})
    merged = model.merge_and_unload().state_dict()
    ours = family.finetuned["t"]
    assert set(ours) == set(merged)
    for key, tensor in merged.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-6, atol=1e-6)
    changed = {k for k, t in net().state_dict().items() if not torch.equal(t, merged[k])}
    assert set(family.names("delta")) >= changed
    assert changed
    for vectors in family:
        torch.testing.assert_close(
            vectors[0], merged[vectors.name] - net().state_dict()[vectors.name]
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model = saved(tmp_path / "a", CONFIGS["rslora"], dtype=dtype)
    ours = Family(net(dtype), {"t": str(tmp_path / "a")}).finetuned["t"]
    for key, tensor in model.merge_and_unload().state_dict().items():
        assert ours[key].dtype == tensor.dtype
        torch.testing.assert_close(ours[key], tensor, rtol=2e-2, atol=2e-2)


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))


class TestBadInput:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        saved(tmp_path / "a", CONFIGS["rslora"])
        return tmp_path / "a"

    def tensors(self, folder: Path, change: Any) -> None:
        path = folder / "adapter_model.safetensors"
        state = load_file(path)
        save_file(change(state), path)

    def refused(self, folder: Path, kind: type[Exception], said: str, base: Any = None) -> None:
        with pytest.raises(kind, match=rf"(?s){folder}.*{said}"):
            Family(base or net(), {"t": str(folder)})

    def test_another_base_by_name(self, folder: Path) -> None:
        base = nn.Sequential(nn.Linear(8, 8))
        self.refused(folder, FamilyError, r"lacks:.*'layer\.1'.*another base\?.*'0\.bias'", base)

    def test_another_base_by_shape(self, folder: Path) -> None:
        base = net()
        base.layer["1"] = nn.Linear(9, 9)
        self.refused(folder, FamilyError, r"'layer\.1'.*\[4, 8\] and \[8, 4\].*\[9, 9\]", base)

    def test_a_missing_factor(self, folder: Path) -> None:
        drop = {"base_model.model.layer.1.lora_B.weight"}
        self.tensors(folder, lambda s: {k: t for k, t in s.items() if k not in drop})
        self.refused(folder, CheckpointError, r"no 'layer\.1\.lora_B\.weight'; save")

    def test_another_rank(self, folder: Path) -> None:
        edit(folder, r=3)
        self.refused(folder, CheckpointError, r"'layer\.1'.*rank 3; mend r or rank_pattern")

    def test_a_damaged_config(self, folder: Path) -> None:
        (folder / "adapter_config.json").write_text("{")
        self.refused(folder, CheckpointError, "not readable as JSON")

    def test_no_tensors(self, folder: Path) -> None:
        (folder / "adapter_model.safetensors").unlink()
        self.refused(folder, CheckpointError, "has adapter_config.json but none of")

    def test_a_truncated_file(self, folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-9])
        self.refused(folder, CheckpointError, "not a whole safetensors file")

    def test_not_a_number(self, folder: Path) -> None:
        name = "base_model.model.layer.1.lora_A.weight"
        self.tensors(folder, lambda s: {**s, name: torch.full_like(s[name], torch.nan)})
        for codec in (SVD(rank=2), EMR()):
            with pytest.raises(FamilyError, match=r"layer\.1\.weight' holds .* NaN"):
                compress(net(), {"t": str(folder)}, codec)

    def test_a_frozen_tensor(self, folder: Path) -> None:
        with pytest.raises(FamilyError, match=r"(?s)declared frozen but differ.*layer\.1\.weight"):
            compress(net(), {"t": str(folder)}, SVD(rank=1), frozen=["layer.*"])


@pytest.mark.parametrize("whole", [False, True], ids=["LoRA", "modules_to_save"])
def test_an_adapter_of_one_of_two_tied_weights_unties_them(tmp_path: Path, whole: bool) -> None:
    """As PEFT has it: its factors, or its copy, lie beside one of the two modules alone."""
    base = nn.ModuleDict(
        {"embed": nn.Embedding(12, 8), "q": nn.Linear(8, 8), "head": nn.Linear(8, 12)}
    )
    base["head"].weight = base["embed"].weight
    more = {"modules_to_save": ["embed"]} if whole else {}
    targets = ["q"] if whole else ["q", "embed"]
    adapted: Any = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=targets, **more)
    )
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape))
    adapted.save_pretrained(tmp_path / "a")
    model = adapted.base_model.model
    with torch.no_grad():  # merged, PEFT's own would change the tensor that both share
        wanted = {
            "embed.weight": model["embed"](torch.arange(12)),
            "head.weight": model["head"](torch.eye(8)).T - base["head"].bias[:, None],
        }
    assert not torch.allclose(wanted["embed.weight"], wanted["head.weight"], atol=0.1)

    family = Family(base, {"t": str(tmp_path / "a")})
    assert family.tied == {}
    module = ReuseModule(base, compress(base, {"t": str(tmp_path / "a")}, Dense("fp32")))
    module.switch("t")
    for name, tensor in wanted.items():
        assert torch.allclose(module.model.state_dict()[name], tensor, atol=1e-5), name
    module.switch(None)
    assert torch.equal(base["head"].weight, base["embed"].weight)


def test_square_matrices_among_layers_of_two_kinds_need_the_class(tmp_path: Path) -> None:
    """PEFT's one flag is that of the last layer; the other kind would be read turned over."""
    config = peft.LoraConfig(r=2, target_modules=["1", "turned", "wide", "fc"])
    wanted = saved(tmp_path / "a", config).merge_and_unload().state_dict()
    with pytest.raises(CheckpointError, match=r"(?s)wrong for 'wide'.*'layer\.1'.*'turned'"):
        Family(net().state_dict(), {"t": str(tmp_path / "a")})
    found = compress(net(), {"t": str(tmp_path / "a")}, Dense("fp32")).state_dict("t")
    assert all(torch.allclose(found[name], wanted[name], atol=1e-5) for name in wanted)


def test_an_adapter_of_an_earlier_transformers_is_read_under_the_class_s_names(
    tmp_path: Path,
) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes))
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False,
        rank_pattern={"q_proj": 3}, modules_to_save=["classifier"],
    )  # fmt: skip
    adapted: Any = peft.get_peft_model(copy.deepcopy(base), config)
    adapted.save_pretrained(tmp_path / "a")
    wanted = adapted.merge_and_unload().state_dict()
    path = tmp_path / "a" / "adapter_model.safetensors"
    old = {"layers.0": "encoder.layer.0", "q_proj": "attention.query", "v_proj": "attention.value"}
    state = load_file(path)
    for new, before in old.items():
        state = {name.replace(new, before): tensor for name, tensor in state.items()}
    assert "encoder.layer.0.attention.attention.query" in " ".join(state)
    save_file(state, path)
    edit(tmp_path / "a", rank_pattern={"query": 3})
    found = compress(base, {"t": str(tmp_path / "a")}, Dense("fp32")).state_dict("t")
    assert all(torch.allclose(found[name], wanted[name], atol=1e-5) for name in wanted)


def test_untouched_tensors_are_frozen_and_families_may_be_mixed(tmp_path: Path) -> None:
    saved(tmp_path / "a", CONFIGS["rslora"])
    adapters = Family(net(), {"t": str(tmp_path / "a")})
    assert set(adapters.names("delta")) == {
        "layer.1.weight",
        "fc.weight",
        "block.fc.weight",
    }
    assert adapters.parameters == 8 * 8 + 10 * 5 + 5 * 7
    full = {name: tensor + 1 for name, tensor in net().state_dict().items()}
    mixed = Family(net(), {"t": str(tmp_path / "a"), "full": full})
    assert mixed.names("frozen") == []
    bundle = compress(net(), mixed.finetuned, Dense("fp32"))
    for task in ("t", "full"):
        for name, tensor in bundle.state_dict(task).items():
            torch.testing.assert_close(tensor, mixed.finetuned[task][name])


SEEN: dict[str, Callable[[Checkpoint], Checkpoint]] = {
    "view": lambda adapter: View(adapter, label="seen"),
    "renamed and back": lambda adapter: Checkpoint.of(Checkpoint.of(adapter, "", "x."), "x."),
    "copy": lambda adapter: adapter.in_memory(),
    "deep copy": copy.deepcopy,
}


@pytest.mark.parametrize("how", SEEN)
@pytest.mark.parametrize("name", ["rslora", "a bias of its own", "whole modules", "ia3 and a head"])
def test_an_adapter_seen_through_another_checkpoint_is_the_same(
    name: str, how: str, tmp_path: Path
) -> None:
    """Roles, vectors to the bit, products and sizes: no callers ask what class it is of."""
    saved(tmp_path / "a", CONFIGS[name])
    private = ["head.*"] if "head" in name or "whole" in name else []
    plain = Family(net(), {"t": str(tmp_path / "a")}, private)
    other = Family(net(), {"t": SEEN[how](plain.finetuned["t"])}, private)
    assert other.roles == plain.roles
    assert "frozen" in plain.roles.values()
    assert other.private == plain.private
    assert other.bits_per_parameter == plain.bits_per_parameter
    for ours, theirs in zip(plain, other, strict=True):
        assert torch.equal(ours[0].view(torch.int32), theirs[0].view(torch.int32))
        assert torch.equal(ours.tuned(0), theirs.tuned(0))
        one, two = ours.low_rank(0), theirs.low_rank(0)
        assert (one is None) == (two is None)
        assert one is None or two is None or all(map(torch.equal, one, two))
    other.check_frozen()


def test_part_of_an_adapter_under_other_names(tmp_path: Path) -> None:
    """What is stored of it is what is seen of it, and its factors."""
    saved(tmp_path / "a", CONFIGS["whole modules"])
    adapter = Family(net(), {"t": str(tmp_path / "a")}).finetuned["t"]
    seen = View(adapter, {"w": "layer.1.weight", "h": "head.weight", "n": "layer.11.weight"})
    factors = {f"layer.1.lora_{side}.weight" for side in "AB"}
    assert set(seen.stored) == {"h", *factors}
    assert torch.equal(seen.stored["h"], adapter["head.weight"])
    assert [name for name in seen if seen.touches(name)] == ["w", "h"]
    assert seen.low_rank("w") is not None
    assert seen.delta("h") is None
    assert torch.equal(seen.delta("n"), torch.zeros(8, 8))  # type: ignore[arg-type]


def test_a_copy_of_an_adapter_does_not_change_with_its_base(tmp_path: Path) -> None:
    saved(tmp_path / "a", CONFIGS["ia3"])
    base = net()
    adapter = Family(base, {"t": str(tmp_path / "a")}).finetuned["t"]
    before = {name: adapter[name].clone() for name in adapter}
    copied = adapter.in_memory()
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(2)
    assert all(torch.equal(copied[name], tensor) for name, tensor in before.items())
    assert not copied.files


@pytest.mark.parametrize("how", ["start", *SEEN])
def test_a_base_is_told_from_the_start_over_it(how: str) -> None:
    base = Checkpoint.of(net())
    over = WithStart(base, {"fc.lora_A.weight": torch.ones(2, 10)})
    seen = SEEN[how](over) if how in SEEN else over
    assert set(seen) == {*base, "fc.lora_A.weight"}
    plain = seen.plain
    assert plain is not seen
    assert plain.plain is plain
    assert set(plain) == set(base)
    assert all(torch.equal(plain[name], base[name]) for name in base)
    assert base.plain is base
    assert base.stored is base
    assert base.touches("fc.weight")
    assert base.delta("fc.weight") is None
    assert base.low_rank("fc.weight") is None


# Adapters themselves ------------------------------------------------------------------------------

CODECS: dict[str, DeltaCodec] = {
    "dense": Dense("fp32"),
    "emr": EMR(dtype="fp32"),
    "mean": Merged(Mean(), "fp32"),
    "task arithmetic": Merged(TaskArithmetic(0.4), "fp32"),
    "ties": Merged(TIES(0.5), "fp32"),
    "svd": SVD(rank=1, dtype="fp32"),
}


@pytest.fixture(params=["rslora", "ia3"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Two adapters: their folders, and their PEFT models."""
    config = CONFIGS[request.param]
    models = {t: saved(tmp_path / t, config, seed) for seed, t in enumerate(("ant", "bee"))}
    return {task: str(tmp_path / task) for task in models}, models


@pytest.mark.parametrize("name", CODECS)
def test_codecs_act_on_the_adapters_own_tensors(name: str, pair: Any, tmp_path: Path) -> None:
    """What PEFT merges, given the decoded tensors, is what the bundle gives back."""
    paths, models = pair
    compress(net(), paths, CODECS[name], tmp_path / "b", adapters="modules")
    bundle = Bundle(tmp_path / "b", net())
    for task, model in models.items():
        decoded = bundle.adapter_tensors(task)
        keys = {
            k.replace(".default", "").removeprefix("base_model.model."): k
            for k in model.state_dict()
            if "lora_" in k or "ia3_l" in k
        }
        assert set(keys) == set(decoded)
        if name == "dense":
            for own, key in keys.items():
                torch.testing.assert_close(decoded[own], model.state_dict()[key])
        model.load_state_dict({keys[own]: t for own, t in decoded.items()}, strict=False)
        merged = model.merge_and_unload().state_dict()
        for key, tensor in bundle.state_dict(task).items():
            torch.testing.assert_close(tensor, merged[key], rtol=1e-5, atol=1e-5)


def test_emr_over_ia3_by_its_equations(tmp_path: Path) -> None:
    models = {t: saved(tmp_path / t, CONFIGS["ia3"], s) for s, t in enumerate("abc")}
    bundle = compress(
        net(), {t: str(tmp_path / t) for t in models}, EMR(dtype="fp32"), adapters="modules"
    )
    names = list(bundle.adapter_tensors("a"))
    raw = {t: load_file(tmp_path / t / "adapter_model.safetensors") for t in models}
    flat = torch.stack(
        [torch.cat([raw[t][f"base_model.model.{n}"].flatten() - 1 for n in names]) for t in models]
    )
    sign = torch.where(flat.sum(0) > 0, 1.0, -1.0)
    unified = sign * torch.where(flat * sign > 0, flat.abs(), 0.0).amax(0)
    for task, own in zip(models, flat, strict=True):
        mask = own * unified > 0
        rescaler = own.abs().sum() / unified[mask].abs().sum()
        expected = 1 + rescaler * mask * unified
        found = torch.cat([bundle.adapter_tensors(task)[n].flatten() for n in names])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adapters", ["merged", "modules"])
def test_switching_gives_pefts_outputs(adapters: Adapters, pair: Any) -> None:
    paths, models = pair
    module = ReuseModule(net(), codec=Dense("fp32"), finetuned=paths, adapters=adapters)
    tokens = torch.arange(24).view(3, 8) % 12
    for task in ("bee", "ant", "bee"):
        module.switch(task)
        torch.testing.assert_close(module(tokens), models[task](tokens), rtol=1e-4, atol=1e-5)
    module.switch(None)
    torch.testing.assert_close(module(tokens), net()(tokens))


class TestWhatMustAgree:
    """Adapters can only be merged themselves where they are alike."""

    def refused(self, tmp_path: Path, second: Any, said: str) -> None:
        saved(tmp_path / "a", CONFIGS["rslora"])
        saved(tmp_path / "b", second)
        paths = {t: str(tmp_path / t) for t in "ab"}
        with pytest.raises(FamilyError, match=rf"(?s)task 'b'.*{said}.*adapters: merged"):
            compress(net(), paths, EMR(), adapters="modules")
        assert compress(net(), paths, EMR()).tasks == ("a", "b")

    def test_rank(self, tmp_path: Path) -> None:
        config = peft.LoraConfig(r=2, target_modules=["1", "fc"], use_rslora=True)
        self.refused(tmp_path, config, r"'layer\.1' has a factor of shape \[2, 8\], not \[4, 8\]")

    def test_modules(self, tmp_path: Path) -> None:
        config = peft.LoraConfig(r=4, lora_alpha=3, target_modules=["1"], use_rslora=True)
        self.refused(tmp_path, config, r"does not adapt 'fc'")

    def test_scaling(self, tmp_path: Path) -> None:
        config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["1", "fc"], use_rslora=True)
        self.refused(tmp_path, config, r"scale=2\.0, .*not .*scale=1\.5")

    def test_kind(self, tmp_path: Path) -> None:
        self.refused(tmp_path, CONFIGS["ia3"], "is of kind ia3, not lora")

    def test_no_adapter(self, tmp_path: Path) -> None:
        with pytest.raises(FamilyError, match=r"no PEFT adapter.*is for adapters alone"):
            compress(net(), {"t": net().state_dict()}, EMR(), adapters="modules")
