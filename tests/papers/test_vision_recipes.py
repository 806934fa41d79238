"""The papers' vision recipes, end to end and without a network, on tiny stand-ins."""

import csv
import functools
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hub_images as hub
import pytest
import timm
import tiny_clip
import yaml
from hub_images import EIGHT, TWELVE
from program import run
from tiny_net import TESTS

from fusionkit.tasks.image_files import ImageClassification

RECIPES = TESTS.parent / "recipes/papers"
VISION = sorted(
    path.stem
    for path in RECIPES.glob("*.yaml")
    if path.stem.startswith(("clip_", "convnext", "resnet", "vit_"))
)
FEW = "{EMR: {class_path: EMR}, SVD: {class_path: SVD, init_args: {rank: 2}}}"
B32, B16, L14 = "clip-vit-base-patch32", "clip-vit-base-patch16", "clip-vit-large-patch14"

pytestmark = pytest.mark.xdist_group("vision papers")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(autouse=True)
def _offline(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "rows"))
    monkeypatch.chdir(tmp_path)


@functools.cache
def whole_clip(cache: Path, name: str) -> Path:
    return hub.clip(cache, name)


@functools.cache
def rows_of(cache: Path, task: str) -> None:
    hub.data(cache, task)


def data(cache: Path, tasks: Iterable[str]) -> None:
    for task in tasks:
        rows_of(cache, task)


def clip(cache: Path, name: str, tasks: Iterable[str]) -> None:
    """CLIP, its towers, and their data."""
    folder = whole_clip(cache, name)
    for seed, task in enumerate(tasks):
        if not (cache / f"models--tanganke--{name}_{task}").is_dir():
            hub.tower(cache, folder, f"{name}_{task}", seed)
    data(cache, tasks)


def compare(name: str, *more: str, code: int = 0) -> str:
    return run(
        *("compare", "--config", RECIPES / f"{name}.yaml", "--out", "out"),
        *("--data.num_workers=0", "--data.batch_size=16", "--trainer.accelerator=cpu"),
        *("--trainer.enable_progress_bar=false", *more),
        code=code,
    )


def compared(name: str, *more: str, tasks: Iterable[str] = EIGHT) -> dict[str, dict[str, str]]:
    """The rows of the table that a recipe gives, all tasks scored in each."""
    said = compare(name, *more)
    assert "written: out/compare.csv" in said
    with Path("out/compare.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    ours = [row for row in rows.values() if row["kind"] != "published"]
    assert all(0 <= float(row[f"score/{task}"]) <= 1 for row in ours for task in tasks)
    return rows


def codecs_of(*pieces: str) -> list[str]:
    texts = [(RECIPES / "shared" / f"{piece}.yaml").read_text() for piece in pieces]
    return [name for text in texts for name in yaml.safe_load(text)]


def test_clip(cache: Path) -> None:
    clip(cache, B32, EIGHT)
    rows = compared("clip_vit_b32_8tasks", "--codecs", FEW)
    assert list(rows)[:4] == ["fine-tuned", "base", "EMR", "SVD"]
    assert float(rows["EMR-Merging"]["mean_score"]) == pytest.approx(0.8874)
    assert float(rows["task arithmetic 0.3"]["score/dtd"]) == pytest.approx(0.472)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in few else pytest.mark.nightly)
        for few in [("clip_vit_l14_20tasks", "clip_b16_llora")]
        for name in VISION
    ],
)
def test_names_are_the_hubs(name: str) -> None:
    """`--print_config` shows what would be downloaded; each task once in all of its lists."""
    content = yaml.safe_load(compare(name, "--print_config"))
    header = (RECIPES / f"{name}.yaml").read_text()
    assert f"--config recipes/papers/{name}.yaml" in header
    assert "Not run here." in header
    settings = content["data"]["init_args"]
    tasks = list(settings["tasks"])
    if name.startswith("clip"):
        own = content["model"]["finetuned"]["init_args"]
        size = {"b32": B32, "b16": B16, "l14": L14}[name.split("_")[2 if "vit" in name else 1]]
        ends = "_l-lora-16" if "llora" in name else "_lora-16" if "lora" in name else ""
        assert own["towers"] == {task: f"hf://tanganke/{size}_{task}{ends}" for task in tasks}
        places = {content["model"]["model"]["init_args"]["path"], settings["preprocessing"]}
        assert {*places, own["encoder"]} == {f"openai/{size}"}
        assert own["classes"] == settings["labels"]
        assert tasks == [*EIGHT, *(TWELVE if "20" in name else ())]
    if "30" not in name:
        for task in tasks:
            found = json.loads(Path(settings["labels"][task]).read_text(encoding="utf-8"))
            assert found["data"] == settings["tasks"][task]
    assert all(Path(each).is_file() for each in content["published"])


def test_data_sets_as_they_lie_in_the_cache(cache: Path) -> None:
    """Columns and splits of other names, classes as numbers or truths, several configurations."""
    recipe = yaml.safe_load((RECIPES / "shared/data_20tasks.yaml").read_text())
    tasks = ("gtsrb", "svhn", "pcam", "fer2013", "food101", "kmnist")
    data(cache, tasks)
    eight = yaml.safe_load((RECIPES / "shared/data_8tasks.yaml").read_text())
    named = {**eight["init_args"]["tasks"], **recipe["init_args"]["tasks"]}
    found = ImageClassification(
        {task: named[task] for task in tasks},
        {"input_size": [3, 8, 8]},
        {task: str(hub.CLASSES / f"{task}.json") for task in tasks},
        splits={"gtsrb": {"test": "contrast"}},
    )
    seeds = {"gtsrb": 2, "pcam": 2}  # of which of its splits the rows are
    for task, loader in zip(tasks, found.test_dataloader(), strict=True):
        _, labels = next(iter(loader))
        count = len(hub.names_of(task))
        assert labels.tolist() == [int(each) for each in hub.labels(count, seeds.get(task, 1))]
        assert len(found.read(task, "train")) == hub.ROWS


class TestRefused:
    @pytest.fixture(autouse=True)
    def _there(self, cache: Path) -> None:
        clip(cache, B32, EIGHT)

    def refused(self, option: str) -> str:
        return compare("clip_vit_b32_8tasks", "--codecs", FEW, option, code=1)

    def test_a_tower_that_is_not_there(self, cache: Path) -> None:
        said = self.refused("--model.finetuned.towers.svhn=hf://tanganke/none")
        assert (
            f"fusionkit compare: hf://tanganke/none: is not in Hugging Face's cache ({cache})"
        ) in said
        assert "download it first: hf download tanganke/none" in said

    def test_data_that_is_not_there(self) -> None:
        said = self.refused("--data.tasks.dtd=tanganke/none")
        assert "tanganke/none: no such file or folder here, and the Hugging Face hub " in said

    def test_classes_that_do_not_fit_the_data(self, tmp_path: Path) -> None:
        wrong = tiny_clip.classes(tmp_path / "dtd.json")
        said = self.refused(f"--data.labels.dtd={wrong}")
        assert "fusionkit compare: tanganke/dtd, split 'train', row " in said
        assert "is not among the 3 of task 'dtd' (blue, grey, red)" in said

    def test_classes_that_do_not_fit_the_head(self, tmp_path: Path) -> None:
        content = json.loads((hub.CLASSES / "dtd.json").read_text())
        content["labels"].append("plaid")
        (tmp_path / "dtd.json").write_text(json.dumps(content))
        said = self.refused(f"--data.labels.dtd={tmp_path / 'dtd.json'}")
        assert "task 'dtd': its head has 47 outputs, and its data 48 classes; give the data" in said


@pytest.mark.nightly
class TestAll:
    """Each recipe as it is, all codecs."""

    def test_clip(self, cache: Path) -> None:
        clip(cache, L14, EIGHT)
        rows = compared("clip_vit_l14_8tasks")
        assert {*codecs_of("codecs_full")} <= {*rows}
        assert float(rows["EMR-Merging"]["mean_score"]) == pytest.approx(0.9373)

    def test_factors_themselves(self, cache: Path) -> None:
        """Of linearized adapters that started at one point."""
        folder = whole_clip(cache, B16)
        for seed, task in enumerate(EIGHT):
            hub.lora(cache, folder, f"{B16}_{task}_l-lora-16", seed, linearized=True)
        data(cache, EIGHT)
        codecs = "{own: {class_path: LinearizedLoRA, init_args: {dtype: fp32}}}"
        rows = compared("clip_b16_llora", "--model.adapters=modules", "--codecs", codecs)
        assert rows["own"]["mean_score"] == rows["fine-tuned"]["mean_score"]

    def test_twenty_tasks(self, cache: Path) -> None:
        clip(cache, B32, (*EIGHT, *TWELVE))
        masks = (RECIPES / "shared/codecs_masks.yaml").read_text()
        rows = compared("clip_vit_b32_20tasks", "--codecs", masks, tasks=(*EIGHT, *TWELVE))
        assert list(rows)[2:6] == codecs_of("codecs_masks")

    @pytest.mark.parametrize(("size", "name"), [(B16, "b16"), (L14, "l14")])
    def test_twenty_tasks_of_other_sizes(self, cache: Path, size: str, name: str) -> None:
        clip(cache, size, (*EIGHT, *TWELVE))
        few = ("--codecs", FEW)
        rows = compared(f"clip_vit_{name}_20tasks", *few, tasks=(*EIGHT, *TWELVE))
        assert "fine-tuned, FusionBench" in rows

    def test_clip_b16(self, cache: Path) -> None:
        clip(cache, B16, EIGHT)
        assert "TIES 0.3" in compared("clip_vit_b16_8tasks", "--codecs", FEW)

    @pytest.mark.parametrize("linearized", [False, True])
    def test_adapters(self, cache: Path, linearized: bool) -> None:
        folder = whole_clip(cache, B16)
        ends, recipe = ("l-lora-16", "llora") if linearized else ("lora-16", "lora_8tasks")
        for seed, task in enumerate(EIGHT):
            hub.lora(cache, folder, f"{B16}_{task}_{ends}", seed, linearized)
        data(cache, EIGHT)
        rows = compared(f"clip_b16_{recipe}")
        assert {*codecs_of("codecs_lora")} <= {*rows}
        own = rows["PERU-LoRA 4"]  # of rank 4: all of it
        for task in EIGHT:
            assert own[f"score/{task}"] == rows["fine-tuned"][f"score/{task}"]

    def test_convnext(self, cache: Path) -> None:
        hub.classifier(cache, "facebook/convnext-base-224", "convnext", 10)
        for seed, task in enumerate(EIGHT):
            name = f"tanganke/convnext-base-224_{task}_sgd_batch-size-64_lr-0.01_steps-4000"
            hub.classifier(cache, name, "convnext", len(hub.names_of(task)), seed)
        data(cache, EIGHT)
        assert "EMR" in compared("convnext_8tasks", "--codecs", FEW)

    def test_resnet(self, cache: Path, tmp_path: Path) -> None:
        from timm.models import save_for_hf

        model: Any = timm.create_model("resnet10t", num_classes=10)
        save_for_hf(model, tmp_path / "base")
        for seed, task in enumerate(EIGHT):
            own = timm.create_model("resnet10t", num_classes=len(hub.names_of(task)))
            state = {k: v for k, v in model.state_dict().items() if not k.startswith("fc.")}
            own.load_state_dict(state, strict=False)
            save_for_hf(tiny_clip.changed(own, seed), tmp_path / "models/resnet50" / task)
        data(cache, EIGHT)
        small = {"input_size": [3, 32, 32]}
        rows = compared(
            *("resnet_8tasks", "--codecs", FEW, f"--data.preprocessing={json.dumps(small)}"),
            *("--model.model.model_name=resnet10t", "--model.model.pretrained=false"),
            *("--model.base=base", "--calibration.rows=4"),
        )
        assert float(rows["EMR"]["bits_per_parameter"]) < 8

    def test_thirty_tasks(self, cache: Path, tmp_path: Path) -> None:
        content = yaml.safe_load((RECIPES / "vit_30tasks.yaml").read_text())
        tasks = list(content["data"]["init_args"]["tasks"])
        figures = yaml.safe_load((RECIPES / "published/emr_vit30.yaml").read_text())
        assert len(tasks) == 30
        assert tasks == figures["tasks"]
        hub.classifier(cache, "google/vit-base-patch16-224", "vit", 10)
        (tmp_path / "models/vit30").mkdir(parents=True)
        for seed, task in enumerate(tasks):
            made = hub.classifier(cache, f"own/{task}", "vit", len(tiny_clip.COLOURS), seed)
            shutil.copytree(made, tmp_path / "models/vit30" / task)
            tiny_clip.images(tmp_path / "photos/vit30" / task, rows=1, seed=seed)
        rows = compared("vit_30tasks", "--codecs", FEW, tasks=tasks)
        assert float(rows["EMR-Merging"]["mean_score"]) == pytest.approx(0.8954)
