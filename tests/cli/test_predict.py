"""Predictions, row by row; validation; loggers that keep codecs apart."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from program import run
from tiny_net import TASKS, Files, TinyNet
from tiny_tasks import Data, logits, trainer

import fusionkit
from fusionkit.cli.predict import table_bytes
from fusionkit.cli.test import plain_trainer
from fusionkit.errors import FusionKitError
from fusionkit.reuse.module import ReuseModule


def reuse(files: Files) -> ReuseModule:
    finetuned = {task: str(path) for task, path in files.finetuned.items()}
    return ReuseModule(
        TinyNet(), base=str(files.base), finetuned=dict(finetuned), private=["head.*"]
    )


def test_rows_are_what_each_model_says(files: Files) -> None:
    from safetensors.torch import load_file

    rows = fusionkit.predict(reuse(files), Data())
    for task in TASKS:
        tokens, labels = Data().rows(task)
        own = [row for row in rows if row["task"] == task]
        assert [row["row"] for row in own] == list(range(len(labels)))
        assert [row["target"] for row in own] == labels.tolist()
        state = {**load_file(files.base), **load_file(files.finetuned[task])}
        state.setdefault("decoder.weight", state["embed.weight"])
        expected = logits(state, tokens).softmax(-1)
        assert torch.allclose(torch.tensor([r["probabilities"] for r in own]), expected, atol=1e-5)
        assert [row["prediction"] for row in own] == expected.argmax(-1).tolist()


def test_the_trainer_predicts_the_same(files: Files) -> None:
    module = reuse(files)
    loaders = Data().test_dataloader()
    found = trainer(1).predict(module, dataloaders=loaders)
    assert found is not None
    rows = [row for batches in found for batch in batches for row in batch]  # type: ignore[union-attr]
    assert rows == fusionkit.predict(module, Data(), plain_trainer(accelerator="cpu"))


def test_a_file_by_its_ending(recipe: Path, tmp_path: Path) -> None:
    run("compress", "--config", recipe)
    run("predict", "--config", recipe, "--out", tmp_path / "p.csv")
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["task", "row", "prediction", "probabilities", "target"]
    assert sum(json.loads(rows[0]["probabilities"])) == pytest.approx(1)
    said = run("predict", "--config", recipe, "--out", tmp_path / "p.xlsx", code=1)
    assert "ends in .csv or .parquet" in said
    parquet = pytest.importorskip("pyarrow.parquet")
    run("predict", "--config", recipe, "--out", tmp_path / "p.parquet")
    table = parquet.read_table(tmp_path / "p.parquet").to_pylist()
    assert [str(row["prediction"]) for row in table] == [row["prediction"] for row in rows]


def test_parquet_needs_pyarrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(FusionKitError, match=r"pip install pyarrow, or write a \.csv"):
        table_bytes([], tmp_path / "p.parquet")


def test_validation_rows_are_scored(recipe: Path, tmp_path: Path) -> None:
    """Data's are those for testing, under the other name."""
    run("compress", "--config", recipe)
    for verb in ("test", "validate"):
        run(verb, "--config", recipe, "--out", tmp_path / verb)
    tested, validated = (
        json.loads((tmp_path / verb / "scores.json").read_text()) for verb in ("test", "validate")
    )
    assert tested["tasks"] == validated["tasks"]


def test_loggers_have_a_name_for_each_codec(recipe: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(recipe.read_text())
    content["codecs"] = {"SVD 2": {"class_path": "SVD", "init_args": {"rank": 2}}}
    content["trainer"]["logger"] = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(tmp_path / "logs")},
    }
    for key in ("codec", "bundle"):
        content["model"].pop(key)
    recipe.write_text(yaml.safe_dump(content))
    run("compare", "--config", recipe)
    logs = tmp_path / "logs" / "lightning_logs"
    assert sorted(each.name for each in logs.iterdir()) == ["SVD-2", "base", "fine-tuned"]
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())
    for name in ("fine-tuned", "SVD-2"):
        with (logs / name / "version_0" / "metrics.csv").open(newline="") as file:
            (logged,) = csv.DictReader(file)
        row = next(each for each in rows if each["name"] == name.replace("D-", "D "))
        assert float(logged["test/mean"]) == pytest.approx(row["mean_score"], abs=1e-6)


def test_a_module_tells_what_it_reuses(files: Files) -> None:
    module = reuse(files)
    said = repr(module)
    assert said.startswith("ReuseModule(TinyNet, base='")
    assert "tasks=('ant', 'bee', 'cat'), task=None, bundle=None)" in said
    module.switch("bee")
    assert "task='bee'" in repr(module)
