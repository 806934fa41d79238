"""A datamodule from one line: what it finds, and that real models run on it."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule
from PIL import Image
from tiny_language import ANSWERED, QUESTION, TEXT, causal, encoder_decoder, jsonl
from tiny_tasks import trainer

import fusionkit
from fusionkit.errors import DataError
from fusionkit.tasks.data_of import data_of, data_recipe, tasks_of
from fusionkit.tasks.image_files import ImageClassification
from fusionkit.tasks.images import ImageArrays
from fusionkit.tasks.language_data import LanguageData
from fusionkit.tasks.language_modeling import LanguageModeling, TextToText
from fusionkit.tasks.multiple_choice import MultipleChoice
from fusionkit.tasks.texts import TextClassification, TextRegression

CONFIG = {"input_size": [3, 32, 32]}
TEXTS = "text,label\na good one,yes\na bad one,no\nnot one,no\n"


def images(folder: Path, names: tuple[str, ...] = ("cat", "dog"), rows: int = 3) -> Path:
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in names:
            (folder / split / name).mkdir(parents=True)
            for row in range(rows):
                pixels = draw.integers(0, 256, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{row}.jpg")
    return folder


def csv(path: Path, text: str = TEXTS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def arrays(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {"x": np.zeros((2, 4, 4), np.uint8), "y": np.zeros(2, np.uint8)}
    np.savez(path, **{f"{k}_{split}": v for k, v in rows.items() for split in ("train", "test")})
    return path


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """The folder of a tiny transformers model and its tokenizer."""
    transformers = pytest.importorskip("transformers", reason="pip install .[test]")
    folder = tmp_path / "bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "one", "not"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


class TestTasks:
    def test_a_folder_of_tasks(self, tmp_path: Path) -> None:
        csv(tmp_path / "tasks" / "cr.csv")
        csv(tmp_path / "tasks" / "sst" / "test.csv")
        (tmp_path / "tasks" / "README.md").touch()
        (tmp_path / "tasks" / ".cache").mkdir()
        folder = tmp_path / "tasks"
        assert tasks_of(folder) == {"cr": f"{folder}/cr.csv", "sst": f"{folder}/sst"}

    @pytest.mark.parametrize("make", [images, lambda path: csv(path / "test.csv").parent])
    def test_a_folder_that_is_a_task(self, tmp_path: Path, make: Any) -> None:
        folder = make(tmp_path / "pets")
        assert tasks_of(str(folder)) == {"pets": str(folder)}

    def test_named_and_not(self, tmp_path: Path) -> None:
        path = csv(tmp_path / "cr.csv")
        assert tasks_of([f"b={path}", str(path)]) == {"b": str(path), "cr": str(path)}
        assert tasks_of({"c": path}) == {"c": str(path)}
        assert tasks_of("snli=stanfordnlp/snli") == {"snli": "stanfordnlp/snli"}
        assert tasks_of("nyu-mll/glue:mrpc") == {"glue": "nyu-mll/glue:mrpc"}

    def test_two_of_one_name(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"two tasks are called 'cr', .*; name them: NAME=PATH"):
            tasks_of([csv(tmp_path / "cr.csv"), csv(tmp_path / "other" / "cr.csv")])

    @pytest.mark.parametrize("spec", ["=x", "x="])
    def test_half_a_name(self, spec: str) -> None:
        with pytest.raises(DataError, match="expected NAME=PATH"):
            tasks_of(spec)

    def test_none(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=f"{tmp_path}: holds neither tasks nor a task's rows"):
            tasks_of(tmp_path)
        with pytest.raises(DataError, match="no data are given"):
            tasks_of([])


class TestKinds:
    def test_each(self, tmp_path: Path) -> None:
        made = data_of(images(tmp_path / "pets"), preprocessing=CONFIG)
        assert type(made) is ImageClassification
        assert type(data_of(csv(tmp_path / "t.csv"), model="any")) is TextClassification
        numbers = csv(tmp_path / "n.csv", "sentence1,sentence2,score\na,b,1.5\nc,d,2\n")
        assert type(data_of(numbers, model="any")) is TextRegression
        paths = csv(tmp_path / "p.csv", f"path,label\n{tmp_path}/pets/test/cat/0.jpg,1\n")
        assert type(data_of(paths, preprocessing=CONFIG)) is ImageClassification
        path = arrays(tmp_path / "a.npz")
        assert type(data_of(path)) is ImageArrays
        named = data_recipe(f"a={path}", heads={"a": ["cat", "dog"]})  # as a bundle has them
        assert named["init_args"] == {"tasks": {"a": str(path)}}

    def test_mixed(self, tmp_path: Path) -> None:
        with pytest.raises(
            DataError, match=r"'pets' \(.*\) is images, 'cr' \(.*\) is labelled texts"
        ):
            data_of([images(tmp_path / "pets"), csv(tmp_path / "cr.csv")])

    def test_without_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"cr\.csv: texts need .* give `model`, .*`tokenizer`"):
            data_of(csv(tmp_path / "cr.csv"))
        with pytest.raises(DataError, match=r"pets: images need .* or `preprocessing`"):
            data_of(images(tmp_path / "pets"))

    def test_a_setting_that_there_is_not(self, tmp_path: Path) -> None:
        with pytest.raises(
            DataError, match="has no setting 'batchsize'; did you mean 'batch_size'"
        ):
            data_of(csv(tmp_path / "cr.csv"), model="any", batchsize=3)
        with pytest.raises(DataError, match="ImageClassification has no setting 'max_length'; it"):
            data_of(images(tmp_path / "pets"), preprocessing=CONFIG, max_length=3)

    def test_a_recipe_makes_the_same(self, tmp_path: Path) -> None:
        recipe = data_recipe(
            images(tmp_path / "pets"),
            preprocessing=CONFIG,
            labels={"pets": ("dog", "cat")},
            limit=4,
        )
        assert json.loads(json.dumps(recipe)) == recipe
        parser = ArgumentParser()
        parser.add_subclass_arguments(LightningDataModule, "data")
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
        made = instantiate(parser.parse_object({"data": recipe})).data
        assert made.labels == {"pets": ["dog", "cat"]}
        assert made.limit == 4


class TestLanguage:
    """What a language model is scored on; with any other, `.txt` is labelled lines."""

    def test_each_in_one_datamodule(self, tmp_path: Path, bert: Path) -> None:
        llama = causal(tmp_path / "llama")
        plain = tmp_path / "tasks" / "plain"
        plain.mkdir(parents=True)
        (plain / "test.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
        jsonl(tmp_path / "tasks" / "choices.jsonl", [QUESTION])
        jsonl(tmp_path / "tasks" / "answers" / "test.jsonl", [ANSWERED])
        csv(tmp_path / "tasks" / "tabs.txt", "no\ta tab in each line\nyes\tthis has one\n")
        csv(tmp_path / "tasks" / "texts.csv", "text,source\na good one,x\n")
        made: Any = data_of(tmp_path / "tasks", model=llama, max_length=32)
        assert type(made) is LanguageData
        assert {task: type(kind) for task, kind in made.kinds.items()} == {
            "answers": LanguageModeling,
            "choices": MultipleChoice,
            "plain": LanguageModeling,
            "tabs": LanguageModeling,
            "texts": LanguageModeling,
        }
        tabs = tmp_path / "tasks" / "tabs.txt"
        assert type(data_of(tabs, model=bert)) is TextClassification
        assert type(data_of(csv(tmp_path / "cr.csv"), model=llama)) is TextClassification

    def test_an_encoder_decoder(self, tmp_path: Path) -> None:
        path = jsonl(tmp_path / "answers.jsonl", [ANSWERED])
        made: Any = data_of(path, model=encoder_decoder(tmp_path / "t5"))
        assert made.kinds == {"answers": TextToText()}

    def test_a_bundle_is_scored(self, tmp_path: Path) -> None:
        from fusionkit.tasks.models import causal_lm

        llama = causal(tmp_path / "llama")
        model = causal_lm(str(llama))
        state: Any = {name: tensor + 0.01 for name, tensor in model.state_dict().items()}
        data = data_of(jsonl(tmp_path / "q.jsonl", [QUESTION]), model=model)
        module = fusionkit.ReuseModule(model, finetuned={"q": state}, codec=fusionkit.SVD(2))
        trainer().test(module, data, verbose=False)
        assert module.scores
        assert module.scores.mean in {0.0, 1.0}


class TestModels:
    def test_texts(self, tmp_path: Path, bert: Path) -> None:
        """The head's `config.json` says which class is which; a bundle of it is scored."""
        from transformers import BertForSequenceClassification

        model = BertForSequenceClassification.from_pretrained(bert)
        tuned = BertForSequenceClassification.from_pretrained(
            bert, id2label={0: "yes", 1: "no"}, label2id={"yes": 0, "no": 1}
        )
        torch.nn.init.zeros_(tuned.classifier.weight)
        tuned.classifier.bias.data = torch.tensor([0.0, 1.0])  # says no to all
        tuned.save_pretrained(tmp_path / "tuned")
        heads = {"cr": str(tmp_path / "tuned" / "model.safetensors")}
        data = data_of(f"cr={csv(tmp_path / 'rows.csv')}", model=bert, heads=heads)
        assert data.labels == {"cr": ["yes", "no"]}  # type: ignore[attr-defined]
        module = fusionkit.ReuseModule(
            model, finetuned=heads, codec=fusionkit.SVD(2), private=["classifier.*"]
        )
        trainer().test(module, data, verbose=False)
        assert module.scores
        assert module.scores.mean == pytest.approx(2 / 3)

    def test_images(self, tmp_path: Path) -> None:
        import timm

        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=2)
        tuned = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        tuned["head.weight"], tuned["head.bias"] = torch.zeros(2, 192), torch.tensor([0.0, 1.0])
        data = data_of(images(tmp_path / "pets"), model=model, batch_size=4)
        module = fusionkit.ReuseModule(
            model,
            finetuned={"pets": tuned},
            codec=fusionkit.SVD(2),
            private=["head.*"],  # type: ignore[dict-item]
        )
        trainer().test(module, data, verbose=False)
        assert module.scores
        assert module.scores.mean == 0.5  # all are dogs, it says

    def test_a_live_model_of_transformers(self, tmp_path: Path, bert: Path) -> None:
        from transformers import BertForSequenceClassification

        model = BertForSequenceClassification.from_pretrained(bert)
        data: Any = data_of(csv(tmp_path / "cr.csv"), model=model)
        assert data.tokenizer.vocab_size == 10
