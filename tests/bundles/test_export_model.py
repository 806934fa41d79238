"""A task's model as a folder: `from_pretrained` is the judge."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from fusionkit import SVD, Bundle, Dense, ReuseModule
from fusionkit.bundles import export_folder
from fusionkit.bundles.add_tasks import add_tasks
from fusionkit.bundles.compress import compress
from fusionkit.bundles.export_folder import IncompleteFolderWarning, shard_bytes
from fusionkit.bundles.export_model import export_task
from fusionkit.bundles.side_files import stored_files
from fusionkit.cli import main as cli
from fusionkit.errors import BundleError

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
IDS = {"input_ids": torch.arange(4, 20).view(2, 8)}
PIXELS = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}


def llama(**settings: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **SIZES, **settings))


def vit(labels: int = 2) -> Any:
    config = ViTConfig(image_size=8, patch_size=4, num_labels=labels, **SIZES)
    return ViTForImageClassification(config)


def mixtral() -> Any:
    return MixtralForCausalLM(
        MixtralConfig(vocab_size=40, num_key_value_heads=2, num_local_experts=3, **SIZES)
    )


def gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    )


def t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=40, **sizes))


FAMILIES: dict[str, tuple[Any, dict[str, Tensor]]] = {
    "llama tied": (lambda: llama(tie_word_embeddings=True), IDS),
    "llama": (llama, IDS),
    "vit": (vit, PIXELS),
    "mixtral": (mixtral, IDS),
    "gpt2": (gpt2, IDS),
    "t5": (t5, {**IDS, "decoder_input_ids": IDS["input_ids"]}),
}


def made(make: Any) -> Any:
    torch.manual_seed(0)
    return make().eval()


def tuned(make: Any) -> Any:
    model = made(make)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**inputs).logits
    return found


def loaded(kind: type, folder: Path, **settings: Any) -> Any:
    """By `from_pretrained`, which must find every tensor, and no other."""
    model, told = kind.from_pretrained(folder, output_loading_info=True, **settings)  # type: ignore[attr-defined]
    assert not any(told.values()), told
    return model


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found.update(load_file(path))
    return found


@pytest.mark.parametrize("live", [False, True], ids=["folder", "live"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:no tokenizer")
def test_from_pretrained_loads_what_was_written(name: str, live: bool, tmp_path: Path) -> None:
    make, inputs = FAMILIES[name]
    base, fine = made(make), tuned(make)
    base.save_pretrained(tmp_path / "base")
    fine.save_pretrained(tmp_path / "fine")
    given = (base, fine) if live else (tmp_path / "base", tmp_path / "fine")
    bundle = compress(given[0], {"t": given[1]}, Dense("fp32"), tmp_path / "b")
    export_task(bundle, "t", tmp_path / "out", max_shard_size="10KB")
    found, wanted = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "fine")
    assert found.keys() == wanted.keys()
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    model = loaded(type(base), tmp_path / "out")
    torch.testing.assert_close(logits(model, inputs), logits(fine, inputs), rtol=1e-4, atol=1e-5)
    # And it is a base, or a fine-tune, like any other.
    again = compress(tmp_path / "base", {"t": tmp_path / "out"}, Dense("fp32"))
    for key, tensor in again.state_dict("t").items():
        torch.testing.assert_close(tensor, bundle.state_dict("t")[key], rtol=1e-5, atol=1e-6)


def tokenizer(words: int) -> PreTrainedTokenizerFast:
    vocabulary = {"[UNK]": 0, **{f"w{n}": n for n in range(1, words)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


def test_what_is_the_tasks_own_outlives_its_folder(tmp_path: Path) -> None:
    """Labels, tokenizer, chat template: from the bundle, once the fine-tune's folder is gone."""
    base, fine = made(vit), tuned(lambda: vit(5))
    fine.config.id2label = dict(enumerate("abcde"))
    base.save_pretrained(tmp_path / "base")
    fine.save_pretrained(tmp_path / "fine")
    tokenizer(6).save_pretrained(tmp_path / "base")
    (tmp_path / "base/added_tokens.json").write_text('{"old": 5}')
    own = tokenizer(9)
    own.chat_template = "{{ messages }}"
    own.save_pretrained(tmp_path / "fine")
    (tmp_path / "fine/preprocessor_config.json").write_text('{"size": 8}')
    (tmp_path / "fine/optimizer.pt").write_bytes(b"large")
    compress(
        tmp_path / "base",
        {"t": tmp_path / "fine", "same": tmp_path / "base"},
        SVD(2),
        tmp_path / "b",
        private=["classifier.*"],
    )
    shutil.rmtree(tmp_path / "fine")
    bundle = Bundle.load(tmp_path / "b")
    assert stored_files(bundle, "same") == {}
    export_task(bundle, "t", tmp_path / "out")
    model = loaded(ViTForImageClassification, tmp_path / "out")
    assert model.config.id2label == dict(enumerate("abcde"))
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(found) == 9
    assert found.chat_template == "{{ messages }}"
    assert (tmp_path / "out/preprocessor_config.json").read_text() == '{"size": 8}'
    assert not (tmp_path / "out/added_tokens.json").exists()  # the fine-tune had none
    export_task(bundle, "same", tmp_path / "same")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "same")) == 7


def test_a_base_in_memory_is_still_known_by_its_folder(tmp_path: Path) -> None:
    """A live model takes the base's place in a bundle that it is switched by."""
    made(llama).save_pretrained(tmp_path / "base")
    tokenizer(6).save_pretrained(tmp_path / "base")
    tuned(llama).save_pretrained(tmp_path / "fine")
    bundle = compress(tmp_path / "base", {"t": tmp_path / "fine"}, SVD(2))
    ReuseModule(made(llama), bundle).switch("t")
    export_task(bundle, "t", tmp_path / "out")
    loaded(LlamaForCausalLM, tmp_path / "out")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 6


def test_side_files_go_where_the_task_goes(tmp_path: Path) -> None:
    made(llama).save_pretrained(tmp_path / "base")
    for task in ("one", "two"):
        tuned(llama).save_pretrained(tmp_path / task)
        tokenizer(7).save_pretrained(tmp_path / task)
    compress(tmp_path / "base", {"one": tmp_path / "one"}, SVD(2), tmp_path / "b")
    bundle = Bundle.load(tmp_path / "b")
    add_tasks(bundle, {"two": tmp_path / "two"})
    bundle.save(tmp_path / "copy")
    copy = Bundle.load(tmp_path / "copy")
    assert stored_files(copy, "two") == stored_files(copy, "one")
    assert "tokenizer.json" in stored_files(copy, "two")
    assert copy.manifest.tasks["two"].private_bytes > 0
    path = tmp_path / "copy/task-two.safetensors"
    content = bytearray(path.read_bytes())
    content[-40000:] = bytes(len(content[-40000:]))
    path.write_bytes(content)
    with pytest.raises(BundleError, match="SHA-256 differs"):
        export_task(Bundle.load(tmp_path / "copy"), "two", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:no tokenizer")
def test_sizes_are_the_tasks_own_without_a_configuration(tmp_path: Path) -> None:
    """A fine-tune that is a file: how many labels it has, its head says."""
    made(vit).save_pretrained(tmp_path / "base")
    save_file(tuned(lambda: vit(7)).state_dict(), tmp_path / "fine.safetensors")
    bundle = compress(
        tmp_path / "base", {"t": tmp_path / "fine.safetensors"}, SVD(2), private=["classifier.*"]
    )
    export_task(bundle, "t", tmp_path / "out")
    assert loaded(ViTForImageClassification, tmp_path / "out").config.num_labels == 7


def test_a_head_that_the_task_has_apart_is_untied(tmp_path: Path) -> None:
    base = made(lambda: llama(tie_word_embeddings=True))
    base.save_pretrained(tmp_path / "base")
    fine = tuned(llama)
    save_file(fine.state_dict(), tmp_path / "fine.safetensors")
    bundle = compress(tmp_path / "base", {"t": tmp_path / "fine.safetensors"}, Dense("fp32"))
    export_task(bundle, "t", tmp_path / "out")
    model = loaded(LlamaForCausalLM, tmp_path / "out")
    assert not model.config.tie_word_embeddings
    torch.testing.assert_close(logits(model, IDS), logits(fine, IDS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("own", [False, True], ids=["no config", "its own config"])
def test_rows_added_to_the_vocabulary(own: bool, tmp_path: Path) -> None:
    base = made(lambda: llama(tie_word_embeddings=True))
    base.save_pretrained(tmp_path / "base")
    fine = tuned(lambda: llama(tie_word_embeddings=True))
    fine.resize_token_embeddings(43)
    fine.save_pretrained(tmp_path / "fine")
    given = tmp_path / "fine" if own else fine
    bundle = compress(tmp_path / "base", {"t": given}, Dense("fp32"), tmp_path / "b")
    export_task(bundle, "t", tmp_path / "out", max_shard_size="5KB")
    model = loaded(LlamaForCausalLM, tmp_path / "out")
    assert model.config.vocab_size == 43
    torch.testing.assert_close(logits(model, IDS), logits(fine, IDS), rtol=1e-4, atol=1e-5)


def test_the_dtype_is_said(tmp_path: Path) -> None:
    made(llama).save_pretrained(tmp_path / "base")
    tuned(llama).save_pretrained(tmp_path / "fine")
    bundle = compress(tmp_path / "base", {"t": tmp_path / "fine"}, SVD(2))
    export_task(bundle, "t", tmp_path / "out", "bf16")
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert (tmp_path / "out/generation_config.json").is_file()


def test_values_that_float16_has_not_are_refused(tmp_path: Path) -> None:
    made(llama).save_pretrained(tmp_path / "base")
    fine = tuned(llama)
    with torch.no_grad():
        fine.model.norm.weight[3] = 1e5
    fine.save_pretrained(tmp_path / "fine")
    bundle = compress(tmp_path / "base", {"t": tmp_path / "fine"}, Dense("fp32"))
    with pytest.raises(BundleError, match=r"task 't': tensor 'model.norm.weight'.*float16.*bf16"):
        export_task(bundle, "t", tmp_path / "out", "fp16")
    assert not (tmp_path / "out").exists()
    export_task(bundle, "t", tmp_path / "out", "bf16")


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    made(llama).save_pretrained(tmp_path / "base")
    bundle = compress(tmp_path / "base", {"t": tmp_path / "base"}, SVD(2), tmp_path / "b")
    calls = []

    def interrupted(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save_file(*args, **kwargs)

    monkeypatch.setattr(export_folder, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_task(bundle, "t", tmp_path / "out", max_shard_size="10KB")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "b"}


def test_a_base_without_a_configuration_has_no_folder(tmp_path: Path) -> None:
    save_file(made(llama).state_dict(), tmp_path / "base.safetensors")
    base = tmp_path / "base.safetensors"
    bundle = compress(base, {"t": base}, SVD(2))
    with pytest.raises(BundleError, match=r"(?s)needs a config\.json.*--out out\.safetensors"):
        export_task(bundle, "t", tmp_path / "out")
    export_task(bundle, "t", tmp_path / "out.safetensors")
    net = nn.Linear(2, 2)
    with pytest.raises(BundleError, match=r"none is known of the base \(Linear"):
        export_task(compress(net, {"t": net.state_dict()}, SVD(2)), "t", tmp_path / "out")


def test_what_is_no_models_folder_stays(tmp_path: Path) -> None:
    made(llama).save_pretrained(tmp_path / "base")
    bundle = compress(tmp_path / "base", {"t": tmp_path / "base"}, SVD(2))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").touch()
    with pytest.raises(BundleError, match="exists; choose another folder"):
        export_task(bundle, "t", tmp_path / "out")
    with pytest.raises(BundleError, match=r"is not a folder with config\.json"):
        export_task(bundle, "t", tmp_path / "out", overwrite=True)
    export_task(bundle, "t", tmp_path / "Llama-3.2-1B")
    export_task(bundle, "t", tmp_path / "Llama-3.2-1B", overwrite=True)


@pytest.mark.parametrize(
    ("text", "count"),
    [("5GB", 5 * 10**9), ("50MB", 50 * 10**6), (1234, 1234), ("2GiB", 2 << 30), ("1.5 kb", 1500)],
)
def test_sizes(text: str | int, count: int) -> None:
    assert shard_bytes(text) == count


@pytest.mark.parametrize("text", ["", "five", "5TB", "-1", 0])
def test_no_sizes(text: str | int) -> None:
    with pytest.raises(BundleError, match="is no size; give bytes"):
        shard_bytes(text)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(llama).save_pretrained(tmp_path / "base")
    tuned(llama).save_pretrained(tmp_path / "fine")
    compress(tmp_path / "base", {"t": tmp_path / "fine"}, SVD(2), tmp_path / "b")
    cli.main(
        ["export", str(tmp_path / "b"), "--task=t", f"--out={tmp_path / 'out'}",
         "--max_shard_size=20KB"]
    )  # fmt: skip
    assert "written: " in capsys.readouterr().out
    assert list((tmp_path / "out").glob("model-00001-of-*.safetensors"))


def test_a_head_that_the_class_lacks_is_told(tmp_path: Path) -> None:
    config = transformers.BertConfig(vocab_size=40, **SIZES)
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(tmp_path / "base")
    fine = transformers.BertForSequenceClassification(config)
    save_file(fine.state_dict(), tmp_path / "fine.safetensors")
    bundle = compress(
        tmp_path / "base", {"t": tmp_path / "fine.safetensors"}, SVD(2), private=["classifier.*"]
    )
    with pytest.warns(IncompleteFolderWarning, match=r"(?s)has no place for.*classifier\.bias"):
        export_task(bundle, "t", tmp_path / "out")
