"""A bundle's task as lm-eval's model `fusionkit`: the figures of its `hf` on the exported model."""

import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from harness_tasks import choices, exported, numbers, offline, own_figures
from program import run
from tiny_language import causal
from tiny_net import TESTS

import fusionkit
from fusionkit import SVD, Bundle
from fusionkit.errors import BundleError, FusionKitError, UsageError

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install .[harness]")
pytestmark = pytest.mark.usefixtures("offline")
_ = offline  # a fixture


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    base, other = causal(tmp_path / "base"), causal(tmp_path / "7", initializer_range=0.6)
    return fusionkit.compress(str(base), {"7": str(other)}, SVD(4), tmp_path / "bundle")


def scored(path: Path, **arguments: Any) -> dict[str, float]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import_module("fusionkit.reuse.lm_eval")
    results = simple_evaluate(
        "fusionkit",
        model_args=arguments,
        tasks=[str(path)],
        task_manager=TaskManager(include_defaults=False),
    )
    return numbers(results["results"], path.stem)


def test_it_is_what_hf_is_of_the_exported_model(bundle: Bundle, tmp_path: Path) -> None:
    path, folder = choices(tmp_path / "c.yaml"), exported(bundle, "7", tmp_path / "exported")
    found = scored(path, bundle=str(bundle.path), task=7, device="cpu")  # as lm-eval reads `7`
    assert found == own_figures(folder, path)
    shorter = scored(path, bundle=str(bundle.path), task="7", dtype="fp32", max_length=4)
    assert shorter.keys() == found.keys()
    assert shorter != found


@pytest.mark.nightly
@pytest.mark.slow  # lm-eval's command reads its thousands of tasks
def test_its_command_knows_it(bundle: Bundle, tmp_path: Path) -> None:
    path = choices(tmp_path / "c.yaml")
    arguments = f"bundle={bundle.path},task=7"
    text = run("lm_eval", "--model_args", arguments, "--tasks", path, "--device", "cpu")
    found = own_figures(exported(bundle, "7", tmp_path / "exported"), path)
    assert f"|brier_score|↓  |{found['brier_score']:.4f}|" in text
    told = run("lm_eval", "--model_args", f"bundle={bundle.path}", "--tasks", path, code=2)
    assert "say which task" in told


def test_lm_eval_finds_it_by_its_entry_point() -> None:
    project = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lm_eval.models"]["fusionkit"].partition(":")
    assert name in vars(import_module(module))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, UsageError, r"say which task, bundle=.*,task=…: 7 \(the base"),
        ({"task": "8"}, BundleError, "no task '8'"),
        ({"task": "7", "tsak": "7"}, UsageError, "no 'tsak'; did you mean 'task'"),
        ({"task": "7", "parallelize": True}, UsageError, "no 'parallelize'"),
        ({"task": "7", "dtype": "fp17"}, BundleError, "unknown dtype 'fp17'"),
    ],
)
def test_bad_arguments(
    arguments: dict[str, Any], error: type[Exception], message: str, bundle: Bundle
) -> None:
    made: Any = import_module("fusionkit.reuse.lm_eval").FusionKitLM
    with pytest.raises(error, match=message):
        made(str(bundle.path), **arguments)


def test_models_that_write_nothing(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    for name in ("base", "one"):
        BertForSequenceClassification(config).save_pretrained(tmp_path / name)
    paths = {"one": str(tmp_path / "one")}
    fusionkit.compress(str(tmp_path / "base"), paths, SVD(4), tmp_path / "bundle")
    made: Any = import_module("fusionkit.reuse.lm_eval").FusionKitLM
    with pytest.raises(FusionKitError, match="BertForSequenceClassification is no causal"):
        made(str(tmp_path / "bundle"), "one")


def test_lm_eval_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'fusionkit[harness]'" in run("lm_eval", "ls", "tasks", code=1)
