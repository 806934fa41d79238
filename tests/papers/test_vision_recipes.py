"""The papers' vision recipes, end to end and without a network, on tiny stand-ins."""

import csv
from pathlib import Path

import pytest
import yaml
from program import run
from tiny_net import TESTS

pytest.importorskip("datasets", reason="pip install .[test]")
pytest.importorskip("timm", reason="pip install .[test]")
import hub_images as hub
from hub_images import EIGHT, TWELVE

RECIPES = TESTS.parent / "recipes/papers"
FEW = "{EMR: {class_path: EMR}, SVD: {class_path: SVD, init_args: {rank: 2}}}"


@pytest.fixture(autouse=True)
def _offline(hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "rows"))
    monkeypatch.chdir(tmp_path)


def compared(name: str, *more: str) -> dict[str, dict[str, str]]:
    """The rows of the table that a recipe gives."""
    said = run(
        *("compare", "--config", RECIPES / f"{name}.yaml", "--out", "out"),
        *("--data.num_workers=0", "--data.batch_size=16", "--trainer.accelerator=cpu"),
        *("--trainer.enable_progress_bar=false", *more),
    )
    assert "written: out/compare.csv" in said
    with Path("out/compare.csv").open() as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def clip_tasks(cache: Path, name: str, tasks: tuple[str, ...]) -> None:
    folder = hub.clip(cache, name)
    for seed, task in enumerate(tasks):
        hub.tower(cache, folder, f"{name}_{task}", seed)
        hub.data(cache, task)


def test_clip_eight_tasks(hub_cache: Path) -> None:
    clip_tasks(hub_cache, "clip-vit-base-patch32", EIGHT)
    rows = compared("clip_vit_b32_8tasks", "--codecs", FEW)
    assert {f"score/{task}" for task in EIGHT} <= rows["EMR"].keys()
