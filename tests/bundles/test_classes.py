"""Models of the wild through a bundle: experts in stacks, ties that a task breaks, other names."""

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

from fusionkit import EMR, SVD, Bundle, Dense, Family, add_tasks, compress
from fusionkit.bundles.weight_error import weight_error
from fusionkit.errors import BundleError, CheckpointError, FamilyError, WrongBaseError
from fusionkit.reuse.module import ReuseModule
from fusionkit.task_vectors.checks import SettingsWarning

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
IDS = torch.arange(8).view(2, 4)
GATE, DOWN = (f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=20, num_key_value_heads=2, num_local_experts=3, **SIZES)
    return MixtralForCausalLM(config).eval()


def llama(**more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, **SIZES, **more)).eval()


def moved(model: nn.Module, seed: int = 1) -> nn.Module:
    tuned, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return tuned


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def size(bundle: Bundle) -> int:
    """Bytes of what the codec made; without the configuration that a folder brings along."""
    return sum(t.file.bytes - t.private_bytes for t in bundle.manifest.tasks.values())


# --- stacks of experts ---------------------------------------------------------------------------


@pytest.fixture
def experts(tmp_path: Path) -> tuple[MixtralForCausalLM, nn.Module, Path]:
    """A base and a fine-tune, live and in folders: experts one by one, and joined as in memory."""
    base = mixtral()
    tuned = moved(base)
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(tmp_path / name)  # type: ignore[operator]
        joined = tmp_path / f"{name} joined"
        joined.mkdir()
        shutil.copy(tmp_path / name / "config.json", joined)
        save_file(model.state_dict(), joined / "model.safetensors")
    return base, tuned, tmp_path


def test_every_form_of_a_stack_makes_the_same_bundle(
    experts: tuple[MixtralForCausalLM, nn.Module, Path],
) -> None:
    base, tuned, folder = experts
    forms: list[tuple[Any, Any]] = [
        (folder / "base", folder / "tuned"),
        (folder / "base joined", folder / "tuned joined"),
        (folder / "base", folder / "tuned joined"),
        (base, tuned),
        (base, folder / "tuned"),
    ]
    for codec in (SVD(rank=2), EMR()):
        bundles = [compress(start, {"t": end}, codec) for start, end in forms]
        sizes = [size(bundle) for bundle in bundles]
        assert max(sizes) <= 1.05 * min(sizes)  # headers of small files, which name offsets
        assert len({bundle.manifest.base.fingerprint for bundle in bundles}) == 1


def test_codecs_see_matrices_and_others_stacks(
    experts: tuple[MixtralForCausalLM, nn.Module, Path],
) -> None:
    base, tuned, folder = experts
    family = Family(folder / "base", {"t": folder / "tuned"})
    assert family.stacks == {GATE: 3, DOWN: 3}
    assert family.vectors(f"{GATE}[2]").shape == (48, 16)
    wanted = tuned.state_dict()[GATE] - base.state_dict()[GATE]
    assert torch.equal(family.vectors(f"{GATE}[2]")[0], wanted[2])

    bundle = compress(folder / "base", {"t": folder / "tuned"}, SVD(rank=2, dtype="fp32"))
    best = torch.stack([_best(matrix, 2) for matrix in wanted])  # of each expert by itself
    delta = bundle.delta("t", GATE)
    assert delta is not None
    assert torch.allclose(delta, best, atol=1e-5)
    assert bundle.state_dict("t").keys() == base.state_dict().keys()
    assert bundle.manifest.base.parameters == sum(p.numel() for p in base.parameters())


def test_errors_of_weights_are_of_all_matrices(
    experts: tuple[MixtralForCausalLM, nn.Module, Path],
) -> None:
    base, tuned, folder = experts
    family = Family(folder / "base", {"t": folder / "tuned"})
    bundle = compress(folder / "base", {"t": folder / "tuned"}, SVD(rank=2))
    before, after = base.state_dict(), tuned.state_dict()
    deltas = {name: (after[name] - before[name]).double() for name in before}
    lost = {name: deltas[name] - _zero_if_none(bundle.delta("t", name)) for name in deltas}
    found = weight_error(bundle, family, "t")
    assert found.energy == pytest.approx(sum(float(d.square().sum()) for d in deltas.values()))
    assert found.error == pytest.approx(sum(float(d.square().sum()) for d in lost.values()))


def _zero_if_none(delta: Tensor | None) -> Tensor:
    return torch.zeros(()) if delta is None else delta


def _best(matrix: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix)
    return u[:, :rank] * s[:rank] @ v[:rank]


@pytest.mark.parametrize("cached", [0, 1 << 20])
def test_a_live_model_of_experts_is_switched(
    experts: tuple[MixtralForCausalLM, nn.Module, Path], tmp_path: Path, cached: int
) -> None:
    base, tuned, folder = experts
    out = tmp_path / "b"
    compress(folder / "base", {"t": folder / "tuned"}, Dense("fp32"), out)
    other = moved(base, seed=2)
    bundle = Bundle(out)
    add_tasks(bundle, {"u": other})
    module = ReuseModule(mixtral(), bundle, cache_bytes=cached)
    for task, model in (("t", tuned), ("u", other), ("t", tuned)):
        module.switch(task)
        assert torch.allclose(logits(module.model), logits(model), atol=1e-5)
    module.switch(None)
    assert torch.equal(logits(module.model), logits(base))


def test_a_stack_is_frozen_or_private_as_a_whole(
    experts: tuple[MixtralForCausalLM, nn.Module, Path],
) -> None:
    base, tuned, _ = experts
    with torch.no_grad():
        tuned.get_parameter(GATE).copy_(base.get_parameter(GATE))
    bundle = compress(base, {"t": tuned}, SVD(rank=1), frozen=["*gate_up_proj"], private=[DOWN])
    assert bundle.manifest.tasks["t"].private == [DOWN]
    assert {t.role for n, t in bundle.manifest.base.tensors.items() if GATE in n} == {"frozen"}
    module = ReuseModule(copy.deepcopy(base), bundle)
    module.switch("t")
    assert torch.equal(module.model.get_parameter(DOWN), tuned.get_parameter(DOWN))


# --- ties --------------------------------------------------------------------------------------


def test_a_task_that_unties_its_head_is_switched_to_and_from() -> None:
    base = llama(tie_word_embeddings=True)
    apart = llama(tie_word_embeddings=False)
    apart.load_state_dict(moved(base).state_dict())
    with torch.no_grad():
        apart.lm_head.weight.add_(1)
    tied = moved(base, seed=2)
    bundle = compress(base, {"apart": apart, "tied": tied}, Dense("fp32"))
    assert bundle.tied == {}
    module = ReuseModule(copy.deepcopy(base), bundle)
    for task, model in (("apart", apart), ("tied", tied), ("apart", apart)):
        module.switch(task)
        assert torch.allclose(logits(module.model), logits(model), atol=1e-5)
    module.switch(None)
    assert torch.equal(logits(module.model), logits(base))


def test_a_live_model_that_holds_a_tied_head_apart_gets_it_too(tmp_path: Path) -> None:
    base = llama(tie_word_embeddings=True)
    tuned = moved(base)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")  # type: ignore[operator]
    bundle = compress(tmp_path / "base", {"t": tmp_path / "tuned"}, Dense("fp32"))
    assert bundle.tied
    apart = llama(tie_word_embeddings=False)
    apart.load_state_dict(base.state_dict())
    module = ReuseModule(apart, bundle, cache_bytes=1 << 20)
    for _ in range(2):
        module.switch("t")
        assert torch.allclose(logits(module.model), logits(tuned), atol=1e-5)
        module.switch(None)
        assert torch.equal(logits(module.model), logits(base))


# --- names -------------------------------------------------------------------------------------


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})


def renamed_to(state: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): tensor for name, tensor in state.items()}


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)


@pytest.mark.parametrize("wrapped", ["base", "tuned", "both", "inside"])
def test_a_wrapper_s_name_is_no_part_of_a_tensor_s(wrapped: str, tmp_path: Path) -> None:
    base, tuned = net().state_dict(), moved(net()).state_dict()
    start, end = dict(base), dict(tuned)
    if wrapped in ("base", "both"):
        start = {f"module.{name}": tensor for name, tensor in base.items()}
    if wrapped in ("tuned", "both"):
        end = {f"module.{name}": tensor for name, tensor in tuned.items()}
    if wrapped == "inside":
        end = renamed_to(tuned, "body.", "body.module.")
    save_file(start, tmp_path / "base.safetensors")
    save_file(end, tmp_path / "tuned.safetensors")
    out = tmp_path / "b"
    compress(tmp_path / "base.safetensors", {"t": tmp_path / "tuned.safetensors"}, Dense(), out)
    module = ReuseModule(net(), bundle=out)
    module.switch("t")
    assert all(torch.allclose(t, tuned[n], atol=1e-3) for n, t in module.model.state_dict().items())
    assert Bundle(out).state_dict("t").keys() == (
        start.keys() if wrapped == "both" else base.keys()
    )


def test_a_module_of_one_s_own_may_be_called_module() -> None:
    model = nn.ModuleDict({"module": nn.Linear(3, 3)})
    tuned = moved(model)
    equal(compress(model, {"t": tuned}, Dense("fp32")).state_dict("t"), tuned.state_dict())


def test_names_of_one_s_own_are_renamed_and_what_no_one_needs_is_ignored(tmp_path: Path) -> None:
    base, tuned = net().state_dict(), moved(net()).state_dict()
    old = renamed_to(dict(tuned), "body.", "encoder.trunk.")
    settings: Any = {"rename": {r"^encoder\.trunk\.": "body."}, "ignore": ["ema.*"]}
    finetuned = {"t": {**old, "ema.body": torch.ones(3)}}
    with pytest.raises(FamilyError, match=r"ema\.body"):
        compress(base, finetuned, Dense(), rename=settings["rename"])
    out = tmp_path / "b"
    compress(base, finetuned, Dense("fp32"), out, **settings)
    equal(Bundle(out, base).state_dict("t"), tuned)
    # The base, too, may be given under the names that are renamed.
    other = renamed_to(dict(base), "body.", "encoder.trunk.")
    equal(Bundle(out, other).state_dict("t"), tuned)
    add_tasks(bundle := Bundle(out, base), {"u": finetuned["t"]})
    equal(bundle.state_dict("u"), tuned)


@pytest.mark.parametrize(
    ("rename", "said"),
    [({"(": "x"}, "no regular expression"), ({r"weight|bias": "w"}, "'body.w'")],
)
def test_a_renaming_that_cannot_be_is_refused(rename: dict[str, str], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        Family(net(), {"t": moved(net())}, rename=rename)


def test_a_bundle_of_a_renamed_class_opens_over_all_its_forms(tmp_path: Path) -> None:
    """The names in a bundle are the class's; one from before has those of the files."""
    base = mixtral()
    tuned = moved(base)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")  # type: ignore[operator]
    out = tmp_path / "b"
    compress(tmp_path / "base", {"t": tmp_path / "tuned"}, Dense("fp32"), out)
    wanted = tuned.state_dict()
    bare = tmp_path / "bare.safetensors"
    shutil.copy(tmp_path / "base" / "model.safetensors", bare)
    for form in (None, tmp_path / "base", base, bare, load_file(bare)):
        equal(Bundle(out, form).state_dict("t"), wanted)
    stored = load_file(tmp_path / "tuned" / "model.safetensors")
    before = compress(load_file(bare), {"t": stored}, Dense("fp32"), tmp_path / "old")
    manifest = json.loads((tmp_path / "old" / "manifest.json").read_text())
    assert set(manifest["base"]["tensors"]) == set(stored)
    equal(Bundle(before.path, tmp_path / "base").state_dict("t"), stored)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_the_base_that_no_fine_tuned_class_has_needs_no_word(
    tied: bool, tmp_path: Path
) -> None:
    """A causal model's head, and fine-tunes that classify."""
    llama(tie_word_embeddings=tied, pad_token_id=0).save_pretrained(tmp_path / "base")
    make = LlamaForSequenceClassification.from_pretrained
    tuned = moved(make(tmp_path / "base", num_labels=3)).eval()
    tuned.save_pretrained(tmp_path / "tuned")  # type: ignore[operator]
    sources = {"t": tmp_path / "tuned"}
    bundle = compress(tmp_path / "base", sources, Dense("fp32"), private=["score.*"])
    module = ReuseModule(make(tmp_path / "base", num_labels=3).eval(), bundle)
    module.switch("t")
    assert torch.allclose(logits(module.model), logits(tuned), atol=1e-5)


def test_a_fine_tune_that_computes_otherwise_is_told_of(tmp_path: Path) -> None:
    """Weights fit, and mean something else; labels and the like do not."""
    base = llama()
    base.save_pretrained(tmp_path / "base")
    tuned = moved(base)
    tuned.config.id2label = {0: "yes"}
    tuned.config.attention_dropout = 0.5
    tuned.config.rms_norm_eps = 9.9999999747e-07  # as GGUF files have it
    tuned.save_pretrained(tmp_path / "tuned")  # type: ignore[operator]
    with warnings.catch_warnings():
        warnings.simplefilter("error", SettingsWarning)
        compress(tmp_path / "base", {"t": tmp_path / "tuned"}, Dense())
    tuned.config.rms_norm_eps = 0.25
    tuned.save_pretrained(tmp_path / "tuned")  # type: ignore[operator]
    said = r"(?s)tuned \(task 't'\) is configured otherwise.*rms_norm_eps: 0\.25, not 1e-06"
    with pytest.warns(SettingsWarning, match=said):
        compress(tmp_path / "base", {"t": tmp_path / "tuned"}, Dense())


def test_a_live_model_over_the_bundle_s_is_switched_whole(tmp_path: Path) -> None:
    """Its body lies deeper than the bundle's, as of a classifier over a bare encoder."""
    encoder = llama().model
    tuned = moved(encoder)
    for name, model in (("base", encoder), ("tuned", tuned)):
        model.save_pretrained(tmp_path / name)  # type: ignore[operator]
    bundle = compress(tmp_path / "base", {"t": tmp_path / "tuned"}, Dense("fp32"))
    whole = llama()
    with pytest.raises(WrongBaseError, match="other"):
        ReuseModule(moved(whole), bundle)
    whole.model.load_state_dict(encoder.state_dict())
    head = whole.lm_head.weight.clone()
    module = ReuseModule(whole, bundle)
    module.switch("t")
    for name, tensor in tuned.state_dict().items():
        assert torch.equal(whole.model.state_dict()[name], tensor)
    assert torch.equal(whole.lm_head.weight, head)
    module.switch(None)
    assert torch.equal(whole.model.norm.weight, encoder.norm.weight)  # type: ignore[union-attr]


def test_a_bare_encoder_that_has_moved(tmp_path: Path) -> None:
    """Given from another place, it has the names that the classifiers over it have, as before."""
    config = BertConfig(vocab_size=20, max_position_embeddings=8, **SIZES)
    encoder = BertModel(config)
    model = BertForSequenceClassification(config)
    model.bert.load_state_dict(encoder.state_dict())
    encoder.save_pretrained(tmp_path / "base")
    moved(model).save_pretrained(tmp_path / "tuned")
    paths = {"t": tmp_path / "tuned"}
    bundle = compress(
        tmp_path / "base", paths, Dense("fp32"), tmp_path / "b", private=["classifier.*"]
    )
    expected = bundle.state_dict("t")
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    for given in (tmp_path / "elsewhere", BertModel.from_pretrained(tmp_path / "elsewhere")):
        found = Bundle.load(tmp_path / "b", given).state_dict("t")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_fine_tuned_files_alone_without_what_they_never_changed(tmp_path: Path) -> None:
    """A bare encoder's folder, and files of classifiers over it, embeddings left out."""
    torch.manual_seed(0)
    bare = BertModel(BertConfig(vocab_size=20, **SIZES), add_pooling_layer=False)
    bare.save_pretrained(tmp_path / "base")
    tuned = BertForSequenceClassification(BertConfig(vocab_size=20, **SIZES))
    kept = {n: t for n, t in tuned.state_dict().items() if not n.startswith("bert.embeddings.")}
    (tmp_path / "cats").mkdir()
    save_file(kept, tmp_path / "cats/model.safetensors")
    private = ["classifier.*", "*pooler.*"]
    with pytest.raises(FamilyError, match="misses tensor 'embeddings"):
        Family(tmp_path / "base", {"cats": tmp_path / "cats"}, private)
    family = Family(tmp_path / "base", {"cats": tmp_path / "cats"}, private, ["embeddings.*"])
    name = "encoder.layer.0.output.dense.weight"
    difference = kept[f"bert.{name}"] - bare.state_dict()[name]
    assert torch.equal(family.vectors(name)[0], difference)


def test_a_live_model_that_the_bundle_s_is_over_is_never_switched_in_part(tmp_path: Path) -> None:
    """Its body lies higher than the bundle's, whose head has no place in it."""
    base = llama()
    bundle = compress(base, {"t": moved(base)}, Dense("fp32"))
    with pytest.raises(WrongBaseError, match="is missing"):
        ReuseModule(base.model, bundle)


@pytest.mark.parametrize("live", [True, False])
def test_layers_that_a_fine_tune_lacks_are_not_the_base_s(live: bool, tmp_path: Path) -> None:
    sizes = {**SIZES, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))
    pruned = LlamaForCausalLM(LlamaConfig(vocab_size=20, **SIZES))
    base.save_pretrained(tmp_path / "base")
    pruned.save_pretrained(tmp_path / "pruned")
    forms: Any = (base, pruned) if live else (tmp_path / "base", tmp_path / "pruned")
    with pytest.raises(FamilyError, match=r"misses tensor 'model\.layers\.1"):
        compress(forms[0], {"t": forms[1]}, Dense())


def test_a_task_that_holds_a_tied_head_apart_is_not_added_beside_tied_ones() -> None:
    base = llama(tie_word_embeddings=True)
    bundle = compress(base, {"t": moved(base)}, Dense("fp32"))
    apart = llama(tie_word_embeddings=False)
    with pytest.raises(BundleError, match=r"(?s)'lm_head\.weight' apart from .*together"):
        add_tasks(bundle, {"u": apart})


def test_a_tied_model_takes_a_base_that_holds_the_head_apart(tmp_path: Path) -> None:
    base = llama(tie_word_embeddings=False)
    base.save_pretrained(tmp_path / "base")
    module = ReuseModule(llama(tie_word_embeddings=True), base=str(tmp_path / "base"))
    assert torch.equal(logits(module.model), logits(base))


def test_a_renaming_may_swap_names(tmp_path: Path) -> None:
    base = {"a": torch.randn(3, 3), "b": torch.randn(3, 3)}
    tuned = {name: tensor + 1 for name, tensor in base.items()}
    save_file(base, tmp_path / "base.safetensors")
    swap = {"^a$": "c", "^b$": "a", "^c$": "b"}
    bundle = compress(tmp_path / "base.safetensors", {"t": tuned}, Dense("fp32"), rename=swap)
    bundle.save(tmp_path / "b")
    for opened in (bundle, Bundle(tmp_path / "b"), Bundle(tmp_path / "b", base)):
        equal(opened.state_dict("t"), {"b": tuned["a"], "a": tuned["b"]})
