"""All tasks as adapters for vLLM, in one folder, and the line that serves them."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import talking
import torch
from program import run
from safetensors.torch import load_file

import fusionkit
from fusionkit import EMR, SVD, Bundle
from fusionkit.bundles.served_folder import INDEX, README, alike, export_adapters
from fusionkit.errors import BundleError

SERVED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama, two fine-tunes of it, and their bundle, of rank 6."""
    folder = tmp_path_factory.mktemp("models")
    talking.bundle("llama, untied", folder)
    return folder


def modules(line: str) -> dict[str, str]:
    """`--lora-modules` as vLLM 0.33 reads it (LoRAParserAction): name → path."""
    words = shlex.split(line)
    found: dict[str, str] = {}
    for item in words[words.index("--lora-modules") + 1 :]:
        if "=" in item and "," not in item:
            name, path = item.split("=", 1)
        else:
            name, path = (json.loads(item)[key] for key in ("name", "path"))
        found[name] = path
    return found


def test_all_tasks_and_their_line(models: Path, tmp_path: Path) -> None:
    said = run("export", models / "talk.bundle", "--for", "vllm", "--out", tmp_path / "served")
    line = said.splitlines()[-1]
    words = ["vllm", "serve", str(models / "base"), "--enable-lora", "--max-lora-rank", "8"]
    assert shlex.split(line)[:6] == words
    paths = modules(line)
    assert paths.keys() == {"cats", "dogs"}
    assert "left out of 'cats', 'dogs', for vllm:" in said
    assert "lm_head.weight" in said
    bundle = Bundle.load(models / "talk.bundle")
    for task, path in paths.items():
        config: dict[str, Any] = json.loads(Path(path, "adapter_config.json").read_text())
        assert config["modules_to_save"] is None
        assert config["bias"] == "none"
        assert config["r"] == config["lora_alpha"] == 6
        assert config["base_model_name_or_path"] == str(models / "base")
        tensors = load_file(Path(path, "adapter_model.safetensors"))
        names = {name.rpartition(".lora_")[0] for name in tensors}
        assert {name.rpartition(".")[2] for name in names} == SERVED
        for name in names:
            product = (
                tensors[f"{name}.lora_B.weight"].float() @ tensors[f"{name}.lora_A.weight"].float()
            )
            delta = bundle.delta(task, name.removeprefix("base_model.model.") + ".weight")
            torch.testing.assert_close(product, delta, rtol=1e-2, atol=1e-2)
    readme = (tmp_path / "served" / README).read_text()
    assert modules(readme.split("```sh\n")[1].split("\n```")[0]) == {
        task: f"./{task}" for task in paths
    }
    assert "`lm_head.weight`" in readme
    assert json.loads((tmp_path / "served" / INDEX).read_text())["adapters"]["cats"]["rank"] == 6


def test_names_that_are_no_plain_folders(models: Path, tmp_path: Path) -> None:
    names = ["..", "README.md", "a=b,c", "d'e f/g"]
    tasks = {name: str(models / "cats") for name in names}
    bundle = fusionkit.compress(str(models / "base"), tasks, SVD(2), tmp_path / "b")
    served = export_adapters(bundle, tmp_path / "served", base_name="OWNER/BASE")
    paths = modules(served.line(tmp_path / "served"))
    assert list(paths) == names
    for path in paths.values():
        assert Path(path, "adapter_config.json").is_file()
        assert Path(path).resolve().parent == tmp_path / "served"
    assert served.max_rank == 8


def test_what_cant_be_an_adapter_is_told(models: Path, tmp_path: Path) -> None:
    tasks = {"cats": str(models / "cats"), "same": str(models / "base")}
    bundle = fusionkit.compress(str(models / "base"), tasks, SVD(2), tmp_path / "b")
    with pytest.raises(
        BundleError, match=r"(?s)1 of 2 tasks can't .*'same' does not differ.*--tasks"
    ):
        export_adapters(bundle, tmp_path / "served")
    assert not (tmp_path / "served").exists()
    run("export", tmp_path / "b", "--for=vllm", '--tasks=["cats"]', "--out", tmp_path / "served")
    assert (tmp_path / "served" / "cats").is_dir()
    assert not (tmp_path / "served" / "same").exists()
    with pytest.raises(BundleError, match="exists"):
        export_adapters(bundle, tmp_path / "served", tasks=["cats"])
    with pytest.raises(BundleError, match="did you mean 'cats'"):
        export_adapters(bundle, tmp_path / "served", tasks=["cat"], overwrite=True)


def test_codecs_without_factors_are_cut(models: Path, tmp_path: Path) -> None:
    tasks = {name: str(models / name) for name in ("cats", "dogs")}
    bundle = fusionkit.compress(str(models / "base"), tasks, EMR(), tmp_path / "b")
    with pytest.raises(BundleError, match="give a rank to cut them to"):
        export_adapters(bundle, tmp_path / "served")
    assert export_adapters(bundle, tmp_path / "served", rank=9).max_rank == 16


def test_the_line_says_what_is_missing(models: Path, tmp_path: Path) -> None:
    said = run("export", models / "talk.bundle", "--out", tmp_path / "served", code=2)
    assert "give the task (--task); all tasks at once are written for a server (--for vllm)" in said
    said = run(
        "export", models / "talk.bundle", "--task=cats", "--for=vllm", "--out", tmp_path / "a"
    )
    assert (tmp_path / "a" / "adapter_config.json").is_file()  # --for alone means an adapter


def test_names_alike_are_counted() -> None:
    names = ["a.0.norm.weight", "a.1.norm.weight", "head.weight"]
    assert alike(names) == ["a.*.norm.weight (2)", "head.weight"]
