"""The recipes of `recipes/vision`, from the base to the table, on few rows and steps."""

import csv
import json
from pathlib import Path

import pytest
from program import run
from tiny_net import SHARED

from fusionkit.cli.recipe import recipes_folder

pytest.importorskip("timm", reason="pip install .[test]")

FEW = (
    "--trainer.max_steps=2",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, beside the data."""
    if not (SHARED / "data/image").is_dir():
        pytest.skip("needs ../shared/data/image")
    (tmp_path / "shared").symlink_to(SHARED)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def recipe(name: str) -> tuple[str, Path]:
    return "--config", recipes_folder() / "vision" / f"{name}.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("model", [pytest.param("vit", marks=pytest.mark.nightly), "resnet"])
def test_from_the_base_to_the_table(here: Path, model: str) -> None:
    run("fit", *recipe(f"{model}_pretrain"), *FEW, "--data.limit=64")
    codecs = "{mean merge: merged, two: {class_path: svd, init_args: {rank: 2}}}"
    for kind, name, tasks in (
        ("full", "compare", ["mnist", "quickdraw6"]),  # heads of ten classes, and of six
        ("lora", "compare_lora", ["quickdraw6"]),
    ):
        method = ("--model.method=lora",) if kind == "lora" else ()
        for task in tasks:
            out = f"--out=out/vision/{model}/{kind}/{task}"
            run("fit", *recipe(f"{model}_fit"), *FEW, "--model.task", task, *method, out)
        data = json.dumps({task: f"../shared/data/image/{task}.npz" for task in tasks})
        few = (f"--data.tasks={data}", "--data.limit=32", "--calibration.rows=8")
        run("compare", *recipe(f"{model}_{name}"), *few, "--codecs", codecs)
        written = (here / f"out/vision/{model}/compare_{kind}/compare.csv").open()
        rows = [row["name"] for row in csv.DictReader(written)]
        assert rows == ["fine-tuned", "base", "mean merge", "two"]
