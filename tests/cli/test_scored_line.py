"""Lines that score: no recipe, no module; each comes to a recipe that gives the same."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from program import run
from safetensors.torch import load_file, save_file

import fusionkit

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(40))]
CLASSES = {"mood": ["sad", "glad"], "topic": ["war", "art", "sea"]}
"""Not in the order of the alphabet: that of each head's rows."""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare encoder and two classifiers over it, their classes named, and their data as CSV."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        BertModel,
        BertTokenizerFast,
    )

    root = tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(WORDS), intermediate_size=24, **sizes)  # type: ignore[arg-type]
    encoder = BertModel(config)
    encoder.save_pretrained(root / "base")
    (root / "base" / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(root / "base" / "vocab.txt")).save_pretrained(root / "base")
    for task, names in CLASSES.items():
        config.id2label = dict(enumerate(names))
        model = BertForSequenceClassification(config)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if name in (state := encoder.state_dict()) or name.startswith("bert."):
                    own = state[name.removeprefix("bert.")]
                    tensor.copy_(own + 0.2 * torch.randn(own.shape))
                else:
                    tensor.copy_(torch.randn(tensor.shape))
        model.save_pretrained(root / "tuned" / task)
        _write(root / "data" / task, names)
    (root / "data" / "other").mkdir()
    _write(root / "data" / "other", ["a", "b"])
    return root


def _write(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(len(names))
    for split, count in (("train", 12), ("test", 30)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for row in range(count):
                drawn = torch.randint(5, len(WORDS), (6,), generator=generator).tolist()
                text = " ".join(WORDS[place] for place in drawn)
                writer.writerow([text, names[row % len(names)]])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def scores(folder: Path) -> dict[str, float]:
    content = json.loads((folder / "scores.json").read_text())
    return {task: each["score"] for task, each in content["tasks"].items()}


def accuracy(root: Path, task: str, folder: Path | None = None) -> float:
    """As transformers itself loads and calls the model."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model: Any = AutoModelForSequenceClassification.from_pretrained(folder or root / "tuned" / task)
    tokenizer: Any = AutoTokenizer.from_pretrained(root / "base")
    with (root / "data" / task / "test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    batch = tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)
    with torch.no_grad():
        said = model(**batch).logits.argmax(-1).tolist()
    right = [model.config.id2label[i] == row["label"] for i, row in zip(said, rows, strict=True)]
    return sum(right) / len(right)


def test_models_as_they_are(family: Path, here: Path) -> None:
    said = run("test", family / "base", f"{family}/tuned/*", "--data", family / "data", "--out=o")
    assert "data of no task: other" in said
    assert "private, as the base lacks them, stored whole: classifier.*" in said
    assert scores(here / "o") == pytest.approx({t: accuracy(family, t) for t in CLASSES})


def test_a_bundle_of_a_bare_encoder(family: Path, here: Path) -> None:
    """Its classes are in the bundle; the tasks' folders are not needed."""
    run("compress", family / "base", f"{family}/tuned/*", "--codec", "dense", "--dtype=fp32")
    run("test", "base.bundle", "--data", family / "data", "--out", "o")
    assert scores(here / "o") == pytest.approx({t: accuracy(family, t) for t in CLASSES})
    run("export", "base.bundle", "--task", "mood", "--out", "mood")
    assert accuracy(family, "mood", here / "mood") == scores(here / "o")["mood"]
    path = f"topic={family}/data/topic"
    run("test", "base.bundle", "--task", "topic", "--data", path, "--out", "p", "--limit=9")
    assert scores(here / "p").keys() == {"topic"}
    assert "limit=9" in (here / "p" / "scores.json").read_text()


def test_the_line_as_a_recipe_gives_the_same(family: Path, here: Path) -> None:
    models = ("test", family / "base", f"{family}/tuned/*")
    line = (*models, "--data", family / "data", "--codec=svd", "--rank=2", "--batch-size", 7)
    recipe = run(*line, "--out=o", "--print_config")
    assert not (here / "o").exists()
    (here / "r.yaml").write_text(recipe)
    run(*line, "--out=o")
    line_scores = (here / "o" / "scores.json").read_bytes()
    run("test", "--config", "r.yaml", "--out", "p")
    assert (here / "p" / "scores.json").read_bytes() == line_scores
    assert yaml.safe_load(recipe)["data"]["init_args"]["batch_size"] == 7


def test_codecs_are_compared(family: Path, here: Path) -> None:
    line = ("compare", family / "base", f"{family}/tuned/*", "--data", family / "data")
    own = ("--codecs", "svd:rank=1,emr", "dense", "--codec", "svd", "--rank", 4, "--dtype=int4")
    said = run(*line, *own, "--out=o")
    rows = json.loads((here / "o" / "compare.json").read_text())
    names = ["fine-tuned", "base", "SVD 4 int4", "SVD 1", "EMR", "Dense"]
    assert list(dict.fromkeys(row["name"] for row in rows)) == names
    assert "compare.html" in said or "plotly" in said
    (here / "r.yaml").write_text(run(*line, *own, "--print_config"))
    again = run("compare", "--config=r.yaml", "--out=o")  # of the same inputs, so that all is kept
    assert "Dense: as an earlier run measured it" in again


def test_one_task_may_have_data_of_any_name(family: Path, here: Path) -> None:
    run("test", family / "base", family / "tuned/mood", "--data", family / "data/mood/test.csv")
    assert scores(here / "out") == pytest.approx({"mood": accuracy(family, "mood")})


def test_another_split_is_scored(family: Path, here: Path) -> None:
    line = ("test", family / "base", family / "tuned/mood", "--data", family / "data/mood")
    said = run(*line, "--split", "train", "--metric", "MulticlassF1Score")
    assert "MulticlassF1Score" in said
    assert " 12 " in said


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["{base}", "{mood}", "m={topic}", "--data", "{data}"], "no data of task 'm'", 1),
        (["{base}", "{mood}", "tipic={topic}", "--data", "{data}"], "did you mean 'topic'?: ", 1),
        (["{base}", "{mood}", "--data", "{data}/mood", "x={data}/topic"], "are of no task", 1),
        (["{base}", "{mood}"], "no data are given; --data FOLDER", 1),
        (["{base}", "{mood}", "--data", "{data}", "--task", "mod"], "did you mean 'mood'?", 1),
        (["{base}", "--data", "{data}"], "is no bundle", 2),
        (["--data", "{data}", "{base}"], "put it last", 2),
        (["{base}", "{mood}", "--data={data}", "--limmit=3"], "did you mean 'limit'?", 2),
        (["{base}", "{mood}", "--data={data}", "--metric=Acuracy"], "did you mean Accuracy", 1),
        (["{base}", "{mood}", "--data={data}", "--model=no.Net"], "the class path of what", 1),
    ],
)
def test_one_clear_error(
    family: Path, here: Path, words: list[str], message: str, code: int
) -> None:
    """Before anything is written."""
    paths = {"base": family / "base", "data": family / "data"}
    paths |= {task: family / "tuned" / task for task in CLASSES}
    said = run("test", *(word.format(**paths) for word in words), code=code)
    assert message in said
    assert "fusionkit test: " in said


def test_the_mend_of_a_mistyped_name_works(family: Path, here: Path) -> None:
    line = ("test", family / "base", f"tipic={family}/tuned/topic", "--task=tipic", "--data")
    said = run(*line, family / "data", family / "data", code=1)
    assert "two tasks are called" in said
    said = run(*line, family / "data", code=1)
    mend = said.partition("--data ")[2].strip()
    run(*line, mend)
    assert scores(here / "out") == pytest.approx({"tipic": accuracy(family, "topic")})


def test_compare_says_what_scores_a_bundle(family: Path, here: Path) -> None:
    run("compress", family / "base", family / "tuned/mood", "--codec=dense")
    said = run("compare", "base.bundle", "--data", family / "data", code=2)
    assert "'fusionkit test' scores a bundle" in said
    said = run("test", "base.bundle", "--data", family / "data", "--codec=svd", "--rank=2", code=2)
    assert "--codec: a bundle has its own" in said
    line = ("compare", family / "base", family / "tuned/mood", "--data", family / "data")
    assert "'EMR' is there twice" in run(*line, "--codecs=emr,emr", code=2)
    assert "expected CODEC:SETTING=VALUE" in run(*line, "--codecs", "svd:32", code=2)
    assert "did you mean 'rank'?" in run(*line, "--codecs", "svd:rnak=32", code=2)


def images(folder: Path, names: list[str]) -> None:
    """Folders of images, a folder a class."""
    from PIL import Image

    generator = torch.Generator().manual_seed(len(names))
    for split in ("train", "test"):
        for place, name in enumerate(names):
            (folder / split / name).mkdir(parents=True)
            for row in range(4):
                noise = torch.randint(0, 60, (8, 8, 3), generator=generator, dtype=torch.uint8)
                pixels = noise + 60 * place
                Image.fromarray(pixels.numpy()).save(folder / split / name / f"{row}.png")


def test_folders_of_images_and_a_model_of_timm(here: Path) -> None:
    import timm

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1}
    base = timm.create_model("vit_tiny_patch16_224", num_classes=0, num_heads=2, **sizes)
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": {**sizes}}
    config["model_args"]["num_heads"] = 2
    config["pretrained_cfg"] = {"input_size": [3, 16, 16], "crop_pct": 1.0}
    for name, classes in {"base": 0, "hue": 2, "shade": 3}.items():
        (here / name).mkdir()
        state = {n: t + 0.1 * torch.randn(t.shape) for n, t in base.state_dict().items()}
        if classes:
            state["head.weight"], state["head.bias"] = (
                torch.randn(classes, 12),
                torch.zeros(classes),
            )
            images(here / "data" / name, [f"c{i}" for i in range(classes)])
        save_file(state if classes else base.state_dict(), here / name / "model.safetensors")
        (here / name / "config.json").write_text(json.dumps({**config, "num_classes": classes}))
    said = run("test", "base", "hue", "shade", "--data", "data", "--out", "o")
    assert "ImageClassification of hue, shade" in said
    found = scores(here / "o")
    for task, classes in {"hue": 2, "shade": 3}.items():
        model: Any = timm.create_model(
            "vit_tiny_patch16_224", num_classes=classes, num_heads=2, **sizes
        ).eval()
        model.load_state_dict(load_file(here / task / "model.safetensors"))
        data = fusionkit.data_of({task: here / "data" / task}, model=here / "base")
        (loader,) = data.test_dataloader()
        x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
        with torch.no_grad():
            expected = (model(x).argmax(-1) == y).float().mean().item()
        assert found[task] == pytest.approx(expected)


def test_a_network_that_no_configuration_names(here: Path) -> None:
    import numpy as np

    from fusionkit.tasks.digits import base_model

    torch.manual_seed(0)
    base = base_model().state_dict()
    save_file(base, here / "base.safetensors")
    save_file({n: t + 0.05 for n, t in base.items()}, here / "digit.safetensors")
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (20, 8, 8), dtype=np.uint8)
    rows = {"x_train": pixels, "x_test": pixels}
    labels = {"y_train": (np.arange(20) % 10).astype(np.uint8)}
    np.savez(here / "digit.npz", **rows, **labels, y_test=labels["y_train"])
    line = ("test", "base.safetensors", "digit.safetensors", "--data", "digit.npz")
    said = run(*line, code=1)
    assert "--model CLASS_PATH" in said
    run(*line, "--model=fusionkit.tasks.digits.base_model", "--data.channels", 1)
    assert scores(here / "out").keys() == {"digit"}
