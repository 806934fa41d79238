"""Pieces of recipes: files in place of what they hold; and settings that a function hands on."""

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml
from program import run

import fusionkit


def pieces(recipe: Path, **held: Any) -> None:
    """Files in the folder `pieces` beside the recipe."""
    folder = recipe.parent / "pieces"
    folder.mkdir(exist_ok=True)
    for name, content in held.items():
        text = content if isinstance(content, str) else yaml.safe_dump(content)
        (folder / f"{name}.yaml").write_text(text)


def changed(recipe: Path, **sections: Any) -> Path:
    content = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**content, **sections}, sort_keys=False))
    return recipe


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another folder to work in than the recipe's."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_a_piece_says_in_short_what_a_recipe_does(
    recipe: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids, variables, one text for a list; paths from the piece's folder; a piece within it."""
    monkeypatch.setenv("DIRECTIONS", "2")
    model = yaml.safe_load(recipe.read_text())["model"]
    model |= {"codec": "codec.yaml", "private": "head.*", "base": "../pieces/base.safetensors"}
    (recipe.parent / "pieces").mkdir()
    base = yaml.safe_load(recipe.read_text())["model"]["base"]
    Path(base).rename(recipe.parent / "pieces/base.safetensors")
    codec = {"class_path": "svd", "init_args": {"rank": "${DIRECTIONS}"}}
    pieces(recipe, model=model, codec=codec)
    changed(recipe, model="pieces/model.yaml")
    run("compress", "--config", f"../{recipe.name}")
    assert fusionkit.Bundle.load(recipe.parent / "bundle").codec == fusionkit.SVD(rank=2)


def test_a_piece_that_holds_names(recipe: Path) -> None:
    """A mapping of codecs, and one of them in a file of its own."""
    svd = {"class_path": "svd", "init_args": {"rank": 1}}
    pieces(recipe, codecs={"all": "emr", "two": "svd.yaml"}, svd=svd)
    run("compare", "--config", changed(recipe, codecs="pieces/codecs.yaml"))
    rows = csv.DictReader((recipe.parent / "out/compare.csv").open())
    assert [row["settings"] for row in rows][2:] == [repr(fusionkit.EMR()), repr(fusionkit.SVD(1))]


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ("{class_path: svd, init_args: {rnak: 1}}", "codec.yaml: model.codec: no option 'rnak'"),
        ("a: [", "codec.yaml: not YAML (while parsing"),
        ("codec.yaml", "codec.yaml: codec.yaml: is a piece of itself; write out what is meant"),
    ],
)
def test_a_piece_that_is_wrong(recipe: Path, piece: str, message: str) -> None:
    pieces(recipe, codec=piece)
    content = yaml.safe_load(recipe.read_text())["model"]
    changed(recipe, model={**content, "codec": "pieces/codec.yaml"})
    said = run("compress", "--config", recipe, code=2)
    assert said.startswith(f"fusionkit compress: {recipe}: ")
    assert message in said


def test_a_piece_that_is_not_there(recipe: Path) -> None:
    pieces(recipe, codec="EMR")
    content = yaml.safe_load(recipe.read_text())["model"]
    changed(recipe, model={**content, "codec": "pieces/codek.yaml"})
    said = run("compress", "--config", recipe, code=2)
    assert "pieces/codek.yaml: no such piece (relative to " in said
    assert "did you mean 'codec.yaml'?" in said


HANDING_ON = """
import torch
from tiny_net import TinyNet

def build(kind: str = "tiny", **settings: object) -> torch.nn.Module:
    print(f"built {kind} with {settings}")
    return TinyNet()
"""


def test_settings_that_a_function_hands_on(recipe: Path, tmp_path: Path) -> None:
    """As timm's `create_model` does: in a recipe, and on the line beside it."""
    (tmp_path / "handing.py").write_text(HANDING_ON)
    model = yaml.safe_load(recipe.read_text())["model"]
    settings = {"kind": "own", "width": 3, "sizes": [1, 2]}
    model["model"] = {"class_path": "handing.build", "init_args": settings}
    shown = run("test", "--config", changed(recipe, model={**model, "bundle": None}))
    assert "built own with {'width': 3, 'sizes': [1, 2]}" in shown
    shown = run("test", "--config", recipe, "--model.model.width", "5", "--model.model.kind=x")
    assert "built x with {'width': 5, 'sizes': [1, 2]}" in shown
