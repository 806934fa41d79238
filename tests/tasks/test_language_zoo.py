"""Real language models: the scores that their owners measured, from recipes, to the last digit."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from program import run
from tiny_net import SHARED, TESTS

ZOO = SHARED / "zoo" / "lm"
RECIPES = TESTS / "recipes" / "lm"


@pytest.fixture
def known() -> dict[str, dict[str, Any]]:
    """Task → what `score.py` there gives of the base, the full fine-tune and the LoRA."""
    if not ZOO.is_dir():
        pytest.skip("the language models (../shared/zoo/lm) are not here")
    return {path.parent.name: json.loads(path.read_text()) for path in ZOO.glob("*/result.json")}


def recipe(name: str, out: Path, **settings: Any) -> Path:
    """A recipe without its codecs, and with other settings of the data."""
    content = yaml.safe_load((RECIPES / name).read_text().replace("../shared", str(SHARED)))
    del content["codecs"]
    content["data"]["init_args"] |= settings
    out.write_text(yaml.safe_dump(content))
    return out


def digits(score: float, metric: str) -> float:
    """A score with the digits that are known."""
    return round(score, 4) if metric == "bits per byte" else round(100 * score, 2)


@pytest.mark.nightly
@pytest.mark.slow
def test_scores(tmp_path: Path, known: dict[str, Any]) -> None:
    """Of the full fine-tunes, and of the base, which the shares of bits per byte need."""
    path = recipe("stories.yaml", tmp_path / "r.yaml")
    run("compare", "--config", path, "--codecs={}", "--out", tmp_path)
    rows = {row["name"]: row for row in json.loads((tmp_path / "compare.json").read_text())}
    assert len(known) == 5
    for task, wanted in known.items():
        for row, column in {"fine-tuned": "full", "base": "base"}.items():
            said = digits(rows[row][f"score/{task}"], wanted["metric"])
            assert said == wanted[column], (task, row)


@pytest.mark.nightly
@pytest.mark.slow
def test_scores_of_adapters(tmp_path: Path, known: dict[str, Any]) -> None:
    run("test", "--config", recipe("stories_lora.yaml", tmp_path / "r.yaml"), "--out", tmp_path)
    found = json.loads((tmp_path / "scores.json").read_text())["tasks"]
    for task, wanted in known.items():
        assert digits(found[task]["score"], wanted["metric"]) == wanted["lora"], task


@pytest.mark.slow
def test_one_by_one_and_in_batches(tmp_path: Path, known: dict[str, Any]) -> None:
    """As `fusionkit test` scores them: a row by itself, and many, padded to the longest."""
    found = []
    for size in (1, 32):
        out = tmp_path / str(size)
        settings: Any = {"batch_size": size, "limit": 24}
        run(
            "test",
            "--config",
            recipe("stories.yaml", tmp_path / "r.yaml", **settings),
            "--out",
            out,
        )
        rows = csv.DictReader((out / "scores.csv").open())
        found.append({row["task"]: float(row["score"]) for row in rows if row["task"] in known})
    assert found[0] == pytest.approx(found[1], rel=1e-6)
