"""`fusionkit.load` and `switch`: what transformers would load from the exported folder."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from vocabularies import MODELS, extended, made

import fusionkit
from fusionkit import SVD, Bundle, Checkpoint, Dense
from fusionkit.bundles.export_model import DTYPES
from fusionkit.errors import BundleError, FusionKitError, WrongBaseError


def perturbed(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def folders(models: dict[str, Any], folder: Path) -> dict[str, str]:
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {name: str(folder / name) for name in models}


def family(kind: str, folder: Path, codec: Any = None) -> Bundle:
    base = made(kind)
    models = {"base": base, "same": extended(base, 0, 2), "more": extended(base, 5, 1)}
    paths = folders(models, folder)
    return fusionkit.compress(paths.pop("base"), paths, codec or Dense("fp32"), folder / "b")


def same_model(model: Any, wanted: Any) -> None:
    """Weights, all buffers, and what configurations say."""
    state, other = model.state_dict(), wanted.state_dict()
    assert list(state) == list(other)
    for name, tensor in other.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name
    buffers = dict(model.named_buffers())
    for name, buffer in wanted.named_buffers():
        assert torch.equal(buffers[name], buffer), name
        assert buffers[name].dtype == buffer.dtype, name
    assert len(list(model.parameters())) == len(list(wanted.parameters()))  # ties
    lasting = ("_name_or_path", "transformers_version", "_attn_implementation_autoset")
    said, there = model.config.to_dict(), wanted.config.to_dict()
    assert {k: v for k, v in said.items() if k not in lasting} == {
        k: v for k, v in there.items() if k not in lasting
    }
    assert model.dtype == wanted.dtype
    assert not model.training


def exported(bundle: Bundle, task: str, folder: Path, dtype: Any = None) -> Any:
    shutil.rmtree(folder, ignore_errors=True)
    fusionkit.export_task(bundle, task, folder)
    kind = getattr(transformers, transformers.AutoConfig.from_pretrained(folder).architectures[0])
    return kind.from_pretrained(folder, dtype=dtype or "auto")


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_model_is_that_which_transformers_loads(kind: str, dtype: str, tmp_path: Path) -> None:
    bundle = family(kind, tmp_path, SVD(4))
    for task in ("more", "same"):
        model = fusionkit.load(bundle, task, dtype=dtype)
        same_model(model, exported(bundle, task, tmp_path / "x", DTYPES[dtype]))


@pytest.mark.parametrize("kind", MODELS)
def test_a_switch_makes_it_another_tasks(kind: str, tmp_path: Path) -> None:
    bundle = family(kind, tmp_path)
    model = fusionkit.load(bundle, "same")
    for task in ("more", "same", "more", "same"):
        fusionkit.switch(model, bundle, task)
        same_model(model, exported(bundle, task, tmp_path / "x"))
    fusionkit.switch(model, bundle, None)
    same_model(model, type(model).from_pretrained(tmp_path / "base"))


def test_whatever_was_done_to_the_weights(tmp_path: Path) -> None:
    """Frozen ones, too, and those that another bundle of the base changed."""
    base = made("gpt2")
    first, second = (extended(base, 0, seed) for seed in (1, 2))
    first.transformer.wte.load_state_dict(base.transformer.wte.state_dict())
    paths = folders({"base": base, "first": first, "second": second}, tmp_path)
    one = fusionkit.compress(
        paths["base"],
        {"t": paths["first"]},
        Dense("fp32"),
        tmp_path / "1",
        frozen=["transformer.wte.*"],
    )
    two = fusionkit.compress(paths["base"], {"t": paths["second"]}, Dense("fp32"), tmp_path / "2")
    model = fusionkit.load(one, "t")
    fusionkit.switch(model, two, "t")
    same_model(model, exported(two, "t", tmp_path / "x"))
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    fusionkit.switch(model, one, "t")
    same_model(model, exported(one, "t", tmp_path / "x"))


def classifiers(folder: Path) -> tuple[Bundle, dict[str, Any]]:
    """A bare encoder, and two classifiers with labels of their own."""
    config = made("bert, tied").config
    base = transformers.BertModel(config).eval()
    models = {}
    for place, (task, labels) in enumerate({"three": "abc", "five": "vwxyz"}.items()):
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: n for n, label in config.id2label.items()}
        model = transformers.BertForSequenceClassification(config).eval()
        model.bert.load_state_dict(base.state_dict())
        perturbed(model, place)
        models[task] = model
    paths = folders({"base": base, **models}, folder)
    whole = Checkpoint.of(paths.pop("base"), add_prefix="bert.")
    bundle = fusionkit.compress(whole, paths, Dense("fp32"), folder / "b", private=["classifier.*"])
    return bundle, models


def test_each_classifier_has_its_own_head_and_labels(tmp_path: Path) -> None:
    bundle, _ = classifiers(tmp_path)
    model = fusionkit.load(bundle, "three")
    ids = torch.arange(8)[None]
    for task, labels in (("three", 3), ("five", 5), ("three", 3)):
        fusionkit.switch(model, bundle, task)
        wanted = exported(bundle, task, tmp_path / "x")
        same_model(model, wanted)
        label = torch.tensor([labels - 1])
        found, expected = (m(ids, labels=label) for m in (model, wanted))
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.loss, expected.loss)


def test_what_a_class_makes_itself_is_made(tmp_path: Path) -> None:
    """Marian's sinusoidal positions are in no file."""
    config = transformers.MarianConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
        max_position_embeddings=32, pad_token_id=1, decoder_start_token_id=1,
    )  # fmt: skip
    base = transformers.MarianMTModel(config).eval()
    paths = folders({"base": base}, tmp_path)
    perturbed(base.model.decoder.layers, 1)
    paths |= folders({"t": base}, tmp_path)
    bundle = fusionkit.compress(paths.pop("base"), paths, Dense("fp32"), tmp_path / "b")
    same_model(fusionkit.load(bundle, "t"), exported(bundle, "t", tmp_path / "x"))


def test_compiled_code_and_addresses_outlive_a_switch(tmp_path: Path) -> None:
    base = made("llama, tied")
    models = {"base": base, "one": extended(base, 0, 1), "two": extended(base, 0, 2)}
    paths = folders(models, tmp_path)
    bundle = fusionkit.compress(paths.pop("base"), paths, Dense("fp32"), tmp_path / "b")
    model = fusionkit.load(bundle, "one")
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        compiled(ids)
        torch._dynamo.utils.counters.clear()
        for task in ("two", "one", None, "two"):
            fusionkit.switch(compiled, bundle, task)
            wanted = models[task or "base"](ids).logits
            torch.testing.assert_close(compiled(ids).logits, wanted, rtol=1e-5, atol=1e-5)
    assert not torch._dynamo.utils.counters["stats"].get("unique_graphs")
    assert not torch._dynamo.utils.counters["frames"].get("total")
    assert places == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


def test_each_task_has_its_own_tokenizer_and_generation(tmp_path: Path) -> None:
    bundle = family("llama, tied", tmp_path)
    with pytest.raises(BundleError, match="task 'same' has no tokenizer: none of tokenizer"):
        fusionkit.tokenizer(bundle, "same")
    for name, words in (("base", "abc"), ("more", "xyz")):
        vocabulary = {word: place for place, word in enumerate(["<unk>", *words])}
        made_of = __import__("tokenizers").Tokenizer(
            __import__("tokenizers").models.WordLevel(vocabulary, unk_token="<unk>")
        )
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=made_of, unk_token="<unk>", chat_template=f"{name}"
        ).save_pretrained(tmp_path / name)
    (tmp_path / "more" / "generation_config.json").write_text('{"eos_token_id": 7}')
    paths = {task: str(tmp_path / task) for task in ("same", "more")}
    bundle = fusionkit.compress(str(tmp_path / "base"), paths, Dense("fp32"), tmp_path / "c")
    assert "x" in fusionkit.tokenizer(bundle, "more").get_vocab()
    assert "a" in fusionkit.tokenizer(bundle, "same").get_vocab()
    assert fusionkit.tokenizer(bundle).chat_template == "base"
    model: Any = fusionkit.load(bundle, "same")
    assert model.generation_config.eos_token_id == made("llama, tied").config.eos_token_id
    fusionkit.switch(model, bundle, "more")
    assert model.generation_config.eos_token_id == 7
    fusionkit.switch(model, bundle, "same")
    assert model.generation_config.eos_token_id == made("llama, tied").config.eos_token_id


def test_timm_models_load(tmp_path: Path) -> None:
    import timm
    from timm.models import save_for_hf

    models = {}
    for place, task in enumerate(("base", "t")):
        model = timm.create_model("test_vit", num_classes=3)
        models[task] = model.eval()
        if place:
            model.load_state_dict(models["base"].state_dict())
            perturbed(model, 1)
        save_for_hf(model, tmp_path / task, safe_serialization=True)
    bundle = fusionkit.compress(
        str(tmp_path / "base"), {"t": str(tmp_path / "t")}, Dense("fp32"), tmp_path / "b"
    )
    x = torch.randn(1, *models["t"].pretrained_cfg["input_size"])
    model = fusionkit.load(bundle, "t")
    torch.testing.assert_close(model(x), models["t"](x), rtol=1e-5, atol=1e-5)
    fusionkit.switch(model, bundle, None)
    torch.testing.assert_close(model(x), models["base"](x), rtol=1e-5, atol=1e-5)


def test_what_can_not_be_loaded_is_told(tmp_path: Path) -> None:
    bundle = family("llama, tied", tmp_path)
    with pytest.raises(BundleError, match="has no task 'dogs'; it has same, more"):
        fusionkit.load(bundle, "dogs")
    with pytest.raises(BundleError, match="unknown dtype 'int8'"):
        fusionkit.load(bundle, "same", dtype="int8")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(BundleError, match=r"can't be opened from here.*give it as `base`"):
        fusionkit.load(tmp_path / "b", "same")
    bundle = Bundle(tmp_path / "b", str(tmp_path / "moved"))
    model = fusionkit.load(tmp_path / "b", "same", base=str(tmp_path / "moved"))
    same_model(model, exported(bundle, "same", tmp_path / "x"))
    with pytest.raises(WrongBaseError, match="is not the base"):
        fusionkit.load(tmp_path / "b", "same", base=str(tmp_path / "same"))
    bare = {k: v.contiguous() for k, v in made("llama, untied").state_dict().items()}
    save_file(bare, tmp_path / "bare.safetensors")
    state: dict[str, Tensor] = {name: tensor + 1 for name, tensor in bare.items()}
    alone = fusionkit.compress(str(tmp_path / "bare.safetensors"), {"t": state}, Dense("fp32"))
    with pytest.raises(BundleError, match=r"no config.json is known of its base"):
        fusionkit.load(alone, "t")


def test_a_task_that_does_not_fit_leaves_the_base(tmp_path: Path) -> None:
    bundle, _ = classifiers(tmp_path)
    model = transformers.BertModel(made("bert, tied").config)
    with pytest.raises(FusionKitError, match="have no place in BertModel"):
        fusionkit.switch(model, bundle, "three")
