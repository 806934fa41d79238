"""What recipes and their options say in short, and what is mistyped in them."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from program import run
from tiny_net import Files, TinyNet

import fusionkit


def rewritten(recipe: Path, **model: Any) -> Path:
    """The recipe with other settings of its model."""
    content = yaml.safe_load(recipe.read_text())
    content["model"].update(model)
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    return recipe


NESTED = fusionkit.MagnitudePrune(0.25, merge=fusionkit.TIES(density=0.5))


@pytest.mark.parametrize(
    ("said", "codec"),
    [
        ("emr", fusionkit.EMR()),
        ({"class_path": "svd", "init_args": {"rank": 2}}, fusionkit.SVD(rank=2)),
        (
            {
                "class_path": "magnitude_prune",
                "init_args": {
                    "density": 0.25,
                    "merge": {"class_path": "ties", "init_args": {"density": 0.5}},
                },
            },
            NESTED,
        ),
        (
            {"class_path": "dbms", "init_args": {"codec": "emr", "shift": "dense"}},
            fusionkit.DBMS(fusionkit.EMR(), fusionkit.Dense()),
        ),
    ],
)
def test_ids_in_a_recipe(recipe: Path, tmp_path: Path, said: Any, codec: object) -> None:
    run("compress", "--config", rewritten(recipe, codec=said))
    assert fusionkit.Bundle.load(tmp_path / "bundle").codec == codec


@pytest.mark.parametrize(
    ("options", "codec"),
    [
        (["--model.codec", "svd", "--model.codec.rank=2"], fusionkit.SVD(rank=2)),
        (["--model.codec=fusionkit.SVD", "--model.codec.rank", "2"], fusionkit.SVD(rank=2)),
        (["--model.codec", "{class_path: svd, init_args: {rank: 2}}"], fusionkit.SVD(rank=2)),
        (
            [
                *("--model.codec", "magnitude_prune", "--model.codec.density=0.25"),
                *("--model.codec.merge", "ties", "--model.codec.init_args.merge.density=0.5"),
            ],
            NESTED,
        ),
        (["--model.codec.rescale", "l2"], fusionkit.EMR(rescale="l2")),
    ],
)
def test_ids_on_the_line(recipe: Path, tmp_path: Path, options: list[str], codec: object) -> None:
    run("compress", "--config", recipe, *options)
    assert fusionkit.Bundle.load(tmp_path / "bundle").codec == codec


def test_ids_of_what_is_compared_and_swept(recipe: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(rewritten(recipe, codec=None, bundle=None).read_text())
    content["codecs"] = {"one": "emr", "two": {"class_path": "svd", "init_args": {"rank": 1}}}
    recipe.write_text(yaml.safe_dump(content))
    assert "two" in run("compare", "--config", recipe)
    content["codecs"]["two"]["init_args"]["rank"] = [1, 2]
    content["codecs"]["three"] = {
        "class_path": "merged",
        "init_args": {"merge": ["mean", "ties"]},
    }
    recipe.write_text(yaml.safe_dump(content))
    shown = run("sweep", "--config", recipe)
    assert "rank=2" in shown
    assert "merge=TIES" in shown
    content["codecs"]["two"]["init_args"] = {"rnak": 1}
    recipe.write_text(yaml.safe_dump(content))
    for verb in ("compare", "sweep"):
        said = run(verb, "--config", recipe, code=2)
        assert "codecs.two: no option 'rnak' of SVD; did you mean 'rank'?" in said


def test_a_data_modules_words(recipe: Path) -> None:
    """Its settings, as those of a codec, are known by its class."""
    said = run("test", "--config", recipe, "--data=text_classification", "--data.taks.a=b", code=2)
    assert "data: no option 'taks' of TextClassification; did you mean 'tasks'?" in said
    content = yaml.safe_load(recipe.read_text())
    content["data"] = {"class_path": "digit_tasks", "init_args": {"bach_size": 3}}
    recipe.write_text(yaml.safe_dump(content))
    said = run("test", "--config", recipe, code=2)
    assert f"{recipe}: data: no option 'bach_size' of DigitTasks; did you mean 'batch_size'" in said


def test_one_text_for_a_list_of_one(recipe: Path, tmp_path: Path) -> None:
    """In the recipe, on the line, and for a class's own parameter."""
    content = yaml.safe_load(rewritten(recipe, private="head.*").read_text())
    content["data"] = {"class_path": "tiny.Data", "init_args": {"tasks": "bee"}}
    finetuned = content["model"]["finetuned"]
    content["model"]["finetuned"] = {"bee": finetuned["bee"]}
    recipe.write_text(yaml.safe_dump(content))
    run("compress", "--config", recipe)
    assert fusionkit.Bundle.load(tmp_path / "bundle").manifest.private == ["head.*"]
    assert "bee" in run("test", "--config", recipe)
    other = ("--model.bundle", tmp_path / "other", "--model.private", "head.*")
    run("compress", "--config", rewritten(recipe, private=None), *other)
    assert fusionkit.Bundle.load(tmp_path / "other").manifest.private == ["head.*"]


def test_flags_stand_alone(recipe: Path, tmp_path: Path) -> None:
    run("compress", "--config", recipe)
    run("compress", "--overwrite", "--config", recipe)
    run("compress", "--config", recipe, "--overwrite", "true")
    assert "exists" in run("compress", "--config", recipe, "--overwrite", "false", code=1)
    shown = run("test", "--trainer.enable_progress_bar", "--config", recipe)
    assert "bee" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--modle.codec", "emr"],
            "fusionkit compress: no option '--modle.codec'; did you mean '--model.codec'?",
        ),
        (["--model.bundel=x"], "no option '--model.bundel'; did you mean '--model.bundle'?"),
        (["--overwrit3"], "no option '--overwrit3'; did you mean '--overwrite'?"),
        (["--model.codec", "svdd"], "model.codec: no codec 'svdd'; did you mean 'svd'?"),
        (
            ["--model.codec.rescal", "l1"],
            "model.codec: no option 'rescal' of EMR; did you mean 'rescale'?",
        ),
        (
            ["--model.codec=svd", "--model.codec.rnak", "1"],
            "model.codec: no option 'rnak' of SVD; did you mean 'rank'?\nSVD has rank, energy,",
        ),
        (["--model.codec=magnitude_prune", "--model.codec.merge=tise"], "no merge 'tise'"),
        (["--model.model", "TinyNte"], "model.model: no Module 'TinyNte'; did you mean 'TinyNet'?"),
        (["--model.model", "tiny_nte.Net"], "no module 'tiny_nte'; did you mean 'tiny_net'?"),
        (["--model.model", "tiny_net.TinyNte"], "no 'TinyNte' in tiny_net; did you mean 'TinyNet'"),
    ],
)
def test_what_is_mistyped_on_the_line(recipe: Path, options: list[str], message: str) -> None:
    assert message in run("compress", "--config", recipe, *options, code=2)


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("model:", "modle:", "no key 'modle'; did you mean 'model'?"),
        ("  bundle:", "  bundel:", "no key 'bundel' in `model`; did you mean 'bundle'?"),
        ("accelerator:", "acelerator:", "no key 'acelerator' in `trainer`; did you mean 'accel"),
        ("EMR", "EMRR", "model.codec: no codec 'EMRR'; did you mean 'emr'?"),
    ],
)
def test_what_is_mistyped_in_a_recipe(recipe: Path, right: str, wrong: str, message: str) -> None:
    text = recipe.read_text()
    assert right in text
    recipe.write_text(text.replace(right, wrong, 1))
    said = run("compress", "--config", recipe, code=2)
    assert said.startswith(f"fusionkit compress: {recipe}: ")
    assert message in said


def test_a_module_that_lacks_what_it_imports(recipe: Path, tmp_path: Path) -> None:
    """It is there, and nothing in it is mistyped."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").touch()
    (tmp_path / "own" / "net.py").write_text("import no_such_module\n")
    said = run("compress", "--config", recipe, "--model.model", "own.net.Net", code=2)
    assert "no_such_module" in said
    assert "no 'net' in own" not in said


def test_classes_of_a_script_are_known(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module has no place among those that can be found."""
    script = ModuleType("a_script")
    script.__spec__ = None
    script.Net = TinyNet  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_script", script)
    run("compress", "--config", recipe, "--model.model", "a_script.Net")


def test_a_recipe_that_is_mistyped(recipe: Path) -> None:
    said = run("compress", "--config", recipe.with_name("recipee.yaml"), code=2)
    assert "recipee.yaml: no such recipe (relative to " in said
    assert "did you mean 'recipe.yaml'?" in said


def test_a_task_that_is_mistyped(recipe: Path, tmp_path: Path) -> None:
    run("compress", "--config", recipe)
    said = run("export", tmp_path / "bundle", "--task=beee", "--out=x.pt", code=1)
    assert "has no task 'beee'; it has ant, bee, cat; did you mean 'bee'?" in said


def test_the_resolved_recipe_makes_the_same(recipe: Path, files: Files, tmp_path: Path) -> None:
    """It is written with classes' paths, and is a recipe itself."""
    run("compress", "--config", rewritten(recipe, codec="emr"))
    run("test", "--config", recipe)
    own = tmp_path / "out" / "config.yaml"
    assert yaml.safe_load(own.read_text())["model"]["codec"]["class_path"] == "fusionkit.EMR"
    before = (tmp_path / "out/scores.csv").read_text()
    run("test", "--config", own, "--out", tmp_path / "again")
    assert (tmp_path / "again/scores.csv").read_text() == before


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
    settings = {"kind": "own", "width": 3, "sizes": [1, 2]}
    built = {"class_path": "handing.build", "init_args": settings}
    shown = run("test", "--config", rewritten(recipe, model=built, bundle=None))
    assert "built own with {'width': 3, 'sizes': [1, 2]}" in shown
    line = ["--model.model.init_args.width", "5", "--model.model.kind=x"]
    shown = run("test", "--config", recipe, *line)
    assert "built x with {'width': 5, 'sizes': [1, 2]}" in shown
