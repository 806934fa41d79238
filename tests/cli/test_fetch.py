"""`fusionkit fetch`, and what opens a recipe's locked commits, with a stand-in for the Hub."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_clip
import torch
import yaml
from hub import Hub, commit_of
from safetensors.torch import save

from fusionkit import Checkpoint
from fusionkit.checkpoints.hub_lock import LOCK, read_lock
from fusionkit.checkpoints.hub_pins import UnpinnedWarning
from fusionkit.cli.main import main
from fusionkit.errors import CheckpointError, HubError

RECIPES = Path(__file__).parents[2] / "recipes"
Run = Callable[..., str]
TINY = save({"weight": torch.ones(2)})


@pytest.fixture
def hub(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, and an empty cache."""
    made, constants = Hub(), "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    pytest.importorskip("datasets", reason="pip install .[test]")  # which copies that
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(f"{constants}.ENDPOINT", made.url)
    template = made.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", made.url)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", hub_cache.parent / "rows")
    yield made
    made.close()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Cuts the network off."""

    def cut() -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    return cut


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `fusionkit VERB …` in the test's folder; what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str, code: int = 0) -> str:
        capsys.readouterr()
        ended = 0
        try:
            main([*args])
        except SystemExit as error:
            ended = int(error.code or 0)
        shown = capsys.readouterr()
        assert ended == code, shown.err
        return shown.out + shown.err

    return run


def recipe(path: Path, content: Any) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def uploaded(folder: Path) -> dict[str, bytes]:
    files = (each for each in folder.rglob("*") if each.is_file())
    return {str(each.relative_to(folder)): each.read_bytes() for each in files}


def small(hub: Hub, path: Path, *names: str) -> None:
    """A recipe that reads some models; those that the Hub lacks are put there."""
    for name in names:
        files = {"config.json": b"{}", "model.safetensors": TINY, "model.onnx": b"x"}
        hub.repositories.setdefault(name, [files])
    models = {name.rpartition("/")[2]: f"hf://{name}" for name in names[1:]}
    recipe(path, {"model": {"base": f"hf://{names[0]}", "finetuned": models or None}})


READ = {
    "gpt2": ({"config.json", "tokenizer.json"}, {"model.safetensors", "onnx/config.json"}),
    "org/sharded": (
        {"config.json", "model.safetensors.index.json"}
        | {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)},
        {"pytorch_model.bin", "tf_model.h5", "README.md", "model.fp16.safetensors"},
    ),
    "org/old": ({"pytorch_model.bin", "vocab.txt"}, {"flax_model.msgpack"}),
    "org/lora": ({"adapter_config.json", "adapter_model.safetensors"}, {"optimizer.pt"}),
    "org/half": ({"model.fp16.safetensors"}, {"model.safetensors"}),
    "org/many": (
        {"cola/best/model.safetensors", "cola/best/config.json", "sst2/best/model.safetensors"},
        {"cola/last/model.safetensors", "config.json", "cola/best/model.safetensors.index.json"},
    ),
    "org/folders": ({"x-a/model.safetensors", "x-b/model.safetensors"}, {"y/model.safetensors"}),
    "org/file": ({"v2.safetensors", "config.json"}, {"v1.safetensors"}),
    "timm/resnet18.a1_in1k": ({"config.json", "model.safetensors"}, {"pytorch_model.bin"}),
    "org/clip": (
        {"open_clip_config.json", "open_clip_model.safetensors"},
        {"open_clip_pytorch_model.bin", "model.safetensors"},
    ),
    "org/seen": ({"preprocessor_config.json"}, {"model.safetensors"}),
}
"""Repository → what of it the recipe below reads, and what it does not."""
WIDE = {
    "model": {
        "model": {
            "class_path": "fusionkit.tasks.models.sequence_classifier",
            "init_args": {"path": "gpt2", "pretrained": False},
        },
        "base": "hf://org/sharded",
        "finetuned": {
            "old": "hf://models/org/old@main",
            "lora": "hf://org/lora",
            "half": {
                "class_path": "fusionkit.Checkpoint",
                "init_args": {"source": "hf://org/half", "variant": "fp16"},
            },
            "cola": "hf://org/many/cola/best/",
            "sst2": "hf://org/many/sst2/best",
            "file": "hf://org/file/v2.safetensors",
            "here": "models/here",
        },
    },
    "data": {
        "class_path": "ImageClassification",
        "init_args": {
            "tasks": {
                "a": "org/rows:main",
                "b": "here",
                "c": "org/rows:other",
                "d": "org/rows:main",
            },
            "splits": {"c": {"test": "validation"}, "d": {"test": "contrast"}},
            "preprocessing": "org/seen",
        },
    },
    "codecs": {
        "any": {"towers": "hf://org/folders/x-*"},
        "seen": {
            "class_path": "timm.create_model",
            "init_args": {"model_name": "resnet18.a1_in1k", "pretrained": True},
        },
        "both": {
            "class_path": "fusionkit.tasks.dual_encoders.both_towers",
            "init_args": {"path": "open_clip:hf-hub:org/clip"},
        },
        "own": {"class_path": "own_code.Reads", "init_args": {}},
    },
}
CARD = """---
configs:
- config_name: other
  data_files:
  - {split: train, path: other/train-*}
  - {split: validation, path: other/validation-*}
  - {split: test, path: other/test-*}
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: contrast, path: main/contrast-*}
  - {split: test, path: main/test-*}
---
"""


def rows(content: bytes) -> dict[str, bytes]:
    """A data set's files: two configurations, of three splits each."""
    found = {"README.md": CARD.encode()}
    for config, other in (("main", "contrast"), ("other", "validation")):
        for split in ("train", "test", other):
            found[f"{config}/{split}-00000-of-00001.parquet"] = content
    return found


def test_what_a_recipe_reads(hub: Hub, run: Run, tmp_path: Path) -> None:
    """Of every form of name; and of each repository no file that is not read."""
    for name, files in READ.items():
        contents = dict.fromkeys({*files[0], *files[1]}, b"{}")
        hub.repositories[name] = [contents]
    hub.repositories["datasets/org/rows"] = [rows(b"rows")]
    (tmp_path / "own_code.py").write_text("class Reads: pass\n")
    (tmp_path / "here").mkdir()
    recipe(tmp_path / "R.yaml", WIDE)
    shown = run("fetch", "--config", "R.yaml")
    lock = read_lock(tmp_path / "R.lock.yaml")
    named = {name.partition("@")[0]: {*each.files} for name, each in lock.models.items()}
    assert named == {name: read for name, (read, _) in READ.items()}
    assert {*lock.datasets["org/rows"].files} == {
        "README.md",
        *(f"main/{split}-00000-of-00001.parquet" for split in ("train", "test", "contrast")),
        *(f"other/{split}-00000-of-00001.parquet" for split in ("train", "validation")),
    }
    assert "not seen: what own_code.Reads (codecs.own) may itself read" in shown
    assert [*lock.datasets["org/rows"].splits["main"]] == ["contrast", "test", "train"]
    assert "timm/resnet18.a1_in1k: is opened by its library, by name" in shown
    assert not {*hub.served} & {"tf_model.h5", "v1.safetensors", "optimizer.pt"}


def test_nothing_is_downloaded_to_look(hub: Hub, run: Run, tmp_path: Path) -> None:
    small(hub, tmp_path / "R.yaml", "org/base", "org/a")
    shown = run("fetch", "--config", "R.yaml", "--dry_run")
    assert re.search(r"│ org/base +│ model │ 000000000000 │ +2 │ +\d+ B │ +0 B │", shown)
    assert "free" in shown
    assert not hub.served
    assert not (tmp_path / "R.lock.yaml").exists()


def test_commits_stay_until_they_are_moved(
    hub: Hub, run: Run, offline: Callable[[], None], tmp_path: Path
) -> None:
    small(hub, tmp_path / "R.yaml", "org/base", "org/a")
    run("fetch", "--config", "R.yaml")
    text = (tmp_path / "R.lock.yaml").read_text()
    assert text.startswith("# Written by `fusionkit fetch`")
    other = {"config.json": b"{}", "model.safetensors": save({"weight": torch.zeros(2)})}
    hub.repositories["org/base"].append(other)
    hub.served.clear()
    assert "all is there, and as locked: R.lock.yaml" in run("fetch", "--config", "R.yaml")
    assert (tmp_path / "R.lock.yaml").read_text() == text
    assert not hub.served
    small(hub, tmp_path / "R.yaml", "org/base", "org/a", "org/b")
    run("fetch", "--config", "R.yaml")
    lock = read_lock(tmp_path / "R.lock.yaml")
    assert {name: each.commit for name, each in lock.models.items()} == {
        name: commit_of(1) for name in ("org/base", "org/a", "org/b")
    }
    small(hub, tmp_path / "R.yaml", "org/base", "org/a")
    shown = run("fetch", "--config", "R.yaml", "--update")
    moved = "org/base: moved from 000000000000 to 000000000000; changed: model.safetensors"
    assert moved in shown
    assert "org/b: not read by the recipe any more" in shown
    assert "no commit has moved" in run("fetch", "--config", "R.yaml", "--update")
    offline()
    assert "(4 files, " in run("fetch", "--config", "R.yaml", "--verify")


def test_the_locked_commit_is_opened(
    hub: Hub, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is newer; what the cache lacks is downloaded then."""
    small(hub, tmp_path / "R.yaml", "org/base", "org/a")
    run("fetch", "--config", "R.yaml")
    hub.repositories["org/base"].append({"model.safetensors": save({"new": torch.zeros(2)})})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "another"))
    hub.served.clear()
    monkeypatch.setenv(LOCK, str(tmp_path / "R.lock.yaml"))
    opened = Checkpoint.of("hf://org/base")
    assert opened.label == "hf://org/base"
    assert list(opened) == ["weight"]
    assert sorted(hub.served) == ["config.json", "model.safetensors"]
    with pytest.raises(
        CheckpointError, match=r"hf://org/base/v2: is not among what \S*R.lock.yaml"
    ):
        Checkpoint.of("hf://org/base/v2")
    small(hub, tmp_path / "other.yaml", "org/else")
    with pytest.warns(UnpinnedWarning, match=r"org/else: \S*R.lock.yaml does not name it, .*fetch"):
        Checkpoint.of("hf://org/else")


def test_what_is_damaged_is_named_and_mended(
    hub: Hub, run: Run, tmp_path: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(hub, tmp_path / "R.yaml", "org/base", "org/a")
    run("fetch", "--config", "R.yaml")
    folder = hub_cache / "models--org--base/snapshots" / commit_of(1)
    (folder / "model.safetensors").write_bytes(TINY[:-1])
    other = hub_cache / "models--org--a/snapshots" / commit_of(1) / "config.json"
    other.write_bytes(b"[]")
    monkeypatch.setenv(LOCK, str(tmp_path / "R.lock.yaml"))
    with pytest.raises(
        HubError, match=r"org/base: damaged in the cache: .*has \d+ bytes, and \d+ "
    ):
        Checkpoint.of("hf://org/base")
    monkeypatch.delenv(LOCK)
    shown = run("fetch", "--config", "R.yaml", "--verify", code=1)
    assert "the cache is not what is locked:" in shown
    assert f"org/base: {folder / 'model.safetensors'} has " in shown
    assert f"org/a: {other} has the Git id " in shown
    shown = run("fetch", "--config", "R.yaml")
    assert "org/base: damaged in the cache, and fetched again: model.safetensors" in shown
    run("fetch", "--config", "R.yaml", "--verify")


def test_what_cannot_be_had(
    hub: Hub, run: Run, offline: Callable[[], None], tmp_path: Path, hub_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One error each, with the repository and the mend."""
    fetch = ("fetch", "--config", "R.yaml")
    small(hub, tmp_path / "R.yaml", "org/base")
    run(*fetch)
    hub.gone.add(commit_of(1))
    run(*fetch)  # it is there
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "another"))
    shown = run(*fetch, code=1)
    assert f"org/base: has no commit {commit_of(1)} any more, which is locked: its his" in shown
    assert "fusionkit fetch --config R.yaml --update" in shown
    hub.gone.clear()

    small(hub, tmp_path / "R.yaml", "org/base", "org/a")
    del hub.repositories["org/a"]
    assert "org/a: there is no model of that name on the Hub, or it is private, and no" in run(
        *fetch, code=1
    )
    small(hub, tmp_path / "R.yaml", "org/base", "org/gated")
    hub.gated.add("org/gated")
    shown = run(*fetch, code=1)
    assert "org/gated: is gated: its owners say who may read it; ask for access at http" in shown
    hub.gated.clear()
    assert not (hub_cache / "models--org--gated").exists()

    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    shown = run(*fetch, code=1)
    assert "are to be downloaded, and 100 B are free on its disk" in shown
    assert "are missing; make room there, or set HF_HOME" in run(*fetch, "--dry_run")
    monkeypatch.undo()


def test_no_network(hub: Hub, run: Run, offline: Callable[[], None], tmp_path: Path) -> None:
    small(hub, tmp_path / "R.yaml", "org/base")
    offline()
    shown = run("fetch", "--config", "R.yaml", code=1)
    assert "org/base: the Hub can't be reached (" in shown
    assert "check the network, and HF_HUB_OFFLINE" in shown
    assert "no such lock file; write it" in run("fetch", "--config", "R.yaml", "--verify", code=1)
    recipe(tmp_path / "R.yaml", {"model": {"base": "base.safetensors"}})
    assert "R.yaml names no repository of the Hub; nothing to fetch" in run(
        "fetch", "--config", "R.yaml"
    )
    assert "which recipe? fusionkit fetch --config R.yaml" in run("fetch", code=2)


@pytest.mark.parametrize("name", ["calibrate", "demo", "fit", "fuse"])
def test_a_recipe_of_any_verb_is_looked_over(run: Run, name: str) -> None:
    assert "names no repository" in run("fetch", "--config", str(RECIPES / f"{name}.yaml"))


def test_a_recipe_runs_without_a_network(
    hub: Hub, run: Run, offline: Callable[[], None], tmp_path: Path
) -> None:
    """At the locked commits, as from the folders that were uploaded."""
    import datasets

    base = tiny_clip.clip(tmp_path / "base")
    hub.repositories["openai/clip"] = [uploaded(base)]
    for seed, task in enumerate(("one", "two"), 1):
        folder = tiny_clip.tower(base, tmp_path / task, seed)
        other = dict.fromkeys(uploaded(folder), b"damage")
        hub.repositories[f"org/clip_{task}"] = [uploaded(folder)]
    pictures = tiny_clip.images(tmp_path / "pictures")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(pictures), split="test")
    loaded.to_parquet(tmp_path / "rows.parquet")
    hub.repositories["datasets/org/rows"] = [rows((tmp_path / "rows.parquet").read_bytes())]
    tiny_clip.classes(tmp_path / "classes.json")

    def told(encoder: str, towers: dict[str, str], tasks: dict[str, str]) -> dict[str, Any]:
        classes = dict.fromkeys(towers, "classes.json")
        zero_shot = {"towers": towers, "encoder": encoder, "classes": classes}
        classifier = "fusionkit.tasks.dual_encoders.ImageClassifier"
        return {
            "model": {
                "model": {"class_path": classifier, "init_args": {"path": encoder}},
                "finetuned": {"class_path": "ZeroShotModels", "init_args": zero_shot},
                "private": "head.*",
                "frozen": "visual_projection.*",
            },
            "data": {
                "class_path": "ImageClassification",
                "init_args": {"tasks": tasks, "preprocessing": encoder, "labels": classes},
            },
            "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
        }

    there = {task: f"hf://org/clip_{task}" for task in ("one", "two")}
    recipe(tmp_path / "R.yaml", told("openai/clip", there, dict.fromkeys(there, "org/rows:main")))
    run("fetch", "--config", "R.yaml")
    for name in (*(f"org/clip_{task}" for task in there), "datasets/org/rows"):
        hub.repositories[name].append(other)
    offline()
    run("test", "--config", "R.yaml", "--out", "locked")
    here = {task: str(tmp_path / task) for task in there}
    recipe(tmp_path / "here.yaml", told(str(base), here, dict.fromkeys(there, str(pictures))))
    run("test", "--config", "here.yaml", "--out", "here")
    scores = [
        json.loads((tmp_path / out / "scores.json").read_text()) for out in ("locked", "here")
    ]
    assert scores[0]["tasks"] == scores[1]["tasks"]
