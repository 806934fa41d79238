"""Images that people have: what becomes of their pixels and labels, and one clear error each."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fusionkit.errors import DataError
from fusionkit.tasks.image_files import ImageClassification
from fusionkit.tasks.table import MissingSplitError
from fusionkit.tasks.transforms import image_transform, preprocessing_of

CONFIG = {
    "input_size": [3, 8, 8],
    "mean": [0.1, 0.2, 0.3],
    "std": [0.5, 0.25, 1.0],
    "crop_pct": 1.0,
}
COLOURS = {"blue": (0, 0, 255), "grey": (128, 128, 128), "red": (255, 0, 0)}


def save(path: Path, colour: Any, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (12, 10), colour).save(path)
    return path


def task(folder: Path, splits: tuple[str, ...] = ("train", "test"), rows: int = 2) -> Path:
    """A task of three classes, each of one colour."""
    for split in splits:
        for name, colour in COLOURS.items():
            for row in range(rows):
                save(folder / split / name / f"{row}.png", colour)
    return folder


def batch(data: ImageClassification) -> tuple[Tensor, list[int]]:
    images, labels = next(iter(data.test_dataloader()[0]))
    return images, labels.tolist()


def pixels(images: Tensor) -> list[tuple[int, ...]]:
    """The first pixel of each image as it was before it was normalised."""
    mean, std = (torch.tensor(CONFIG[key])[:, None] for key in ("mean", "std"))
    values = (images[:, :, 0, 0].T * std + mean) * 255
    return [tuple(each.round().int().tolist()) for each in values.T]


class TestFolders:
    def test_pixels_and_labels(self, tmp_path: Path) -> None:
        data = ImageClassification({"t": str(task(tmp_path / "t"))}, CONFIG)
        images, labels = batch(data)
        assert images.shape == (6, 3, 8, 8)
        assert images.dtype == torch.float32
        assert pixels(images) == [COLOURS[name] for name in COLOURS for _ in range(2)]
        assert labels == [0, 0, 1, 1, 2, 2]
        assert data.labels == {"t": ["blue", "grey", "red"]}
        assert data.num_classes == {"t": 3}

    def test_the_heads_order(self, tmp_path: Path) -> None:
        (tmp_path / "head").mkdir()
        names = {"id2label": {"0": "red", "1": "green", "2": "grey", "3": "blue"}}
        (tmp_path / "head" / "config.json").write_text(json.dumps(names))
        head = {"t": str(tmp_path / "head")}
        data = ImageClassification({"t": str(task(tmp_path / "t"))}, CONFIG, head)
        images, labels = batch(data)
        assert pixels(images)[::2] == [*COLOURS.values()]
        assert labels[::2] == [3, 2, 0]
        assert data.num_classes == {"t": 4}

    def test_a_class_that_the_head_lacks(self, tmp_path: Path) -> None:
        folder = task(tmp_path / "t")
        with pytest.raises(DataError, match=r"train/grey: label 'grey' .*did you mean 'gray'"):
            ImageClassification({"t": str(folder)}, CONFIG, {"t": ["blue", "gray", "red"]})

    def test_a_class_of_the_test_rows_alone(self, tmp_path: Path) -> None:
        folder = task(tmp_path / "t")
        save(folder / "test" / "pink" / "0.png", (255, 0, 255))
        data = ImageClassification({"t": str(folder)}, CONFIG)
        with pytest.raises(DataError, match=r"test/pink: label 'pink' is not among the 3"):
            data.test_dataloader()

    def test_val_stands_for_test_where_there_is_none(self, tmp_path: Path) -> None:
        folder = task(tmp_path / "t", ("train", "val"))
        assert len(batch(ImageClassification({"t": str(folder)}, CONFIG))[1]) == 6
        task(folder, ("test", "odd"), rows=1)
        assert len(batch(ImageClassification({"t": str(folder)}, CONFIG))[1]) == 3
        odd = ImageClassification({"t": str(folder)}, CONFIG, splits={"test": "odd"})
        assert len(batch(odd)[1]) == 3

    def test_class_folders_alone_are_test_rows(self, tmp_path: Path) -> None:
        data = ImageClassification({"t": str(task(tmp_path, ("t",)) / "t")}, CONFIG)
        assert len(batch(data)[1]) == 6
        with pytest.raises(MissingSplitError, match=r"has no train images: .* hold test rows"):
            data.train_dataloader()

    def test_a_missing_split(self, tmp_path: Path) -> None:
        data = ImageClassification({"t": str(task(tmp_path / "t", ("train",)))}, CONFIG)
        with pytest.raises(MissingSplitError, match=r"has no test images: .* it has train\."):
            data.test_dataloader()

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no test rows there: .* it holds nothing"):
            ImageClassification({"t": str(tmp_path)}, CONFIG)

    def test_an_empty_class(self, tmp_path: Path) -> None:
        folder = task(tmp_path / "t")
        (folder / "test" / "red" / "0.png").unlink()
        (folder / "test" / "red" / "1.png").rename(folder / "test" / "red" / "1.txt")
        with pytest.raises(DataError, match=r"test: a class folder without images: .* red"):
            ImageClassification({"t": str(folder)}, CONFIG).test_dataloader()

    def test_hidden_folders_are_no_classes(self, tmp_path: Path) -> None:
        folder = task(tmp_path / "t")
        (folder / "train" / ".ipynb_checkpoints").mkdir()
        assert ImageClassification({"t": str(folder)}, CONFIG).num_classes == {"t": 3}

    def test_numbers_that_sort_otherwise_as_text(self, tmp_path: Path) -> None:
        for number in range(11):
            save(tmp_path / "t" / "test" / str(number) / "0.png", (number, 0, 0))
        tasks = {"t": str(tmp_path / "t")}
        with pytest.raises(DataError, match=r"folders are numbers, 0, 1, 10, 2….*give `labels`"):
            ImageClassification(tasks, CONFIG)
        names = [str(number) for number in range(11)]
        assert batch(ImageClassification(tasks, CONFIG, {"t": names}))[1] == [
            0,
            1,
            10,
            *range(2, 10),
        ]


class TestImages:
    @pytest.mark.parametrize(
        ("mode", "colour", "seen"),
        [
            ("L", 100, (100, 100, 100)),
            ("1", 1, (255, 255, 255)),
            ("RGBA", (9, 8, 7, 255), (9, 8, 7)),
            ("LA", (100, 255), (100, 100, 100)),
            ("P", 0, (0, 0, 0)),
        ],
    )
    def test_every_mode_becomes_rgb(
        self, tmp_path: Path, mode: str, colour: Any, seen: tuple[int, ...]
    ) -> None:
        save(tmp_path / "t" / "test" / "a" / "0.png", colour, mode)
        images, _ = batch(ImageClassification({"t": str(tmp_path / "t")}, CONFIG))
        assert pixels(images) == [seen]

    def test_grey_where_the_model_is(self, tmp_path: Path) -> None:
        config = {"input_size": [1, 8, 8], "mean": [0.0], "std": [1.0]}
        images, _ = batch(ImageClassification({"t": str(task(tmp_path / "t"))}, config))
        assert images.shape == (6, 1, 8, 8)
        assert images[2, 0, 0, 0] == pytest.approx(128 / 255)

    @pytest.mark.parametrize("workers", [0, 1])
    @pytest.mark.parametrize("content", [b"", b"no image", b"cut"])
    def test_a_broken_file_is_named(self, tmp_path: Path, content: bytes, workers: int) -> None:
        folder = task(tmp_path / "t")
        path = folder / "test" / "grey" / "1.png"
        path.write_bytes(path.read_bytes()[:50] if content == b"cut" else content)
        data = ImageClassification({"t": str(folder)}, CONFIG, num_workers=workers)
        with pytest.raises(DataError, match=r"test/grey/1\.png: not a readable image"):
            list(data.test_dataloader()[0])

    def test_sixteen_bits_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "t" / "test" / "a" / "0.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(path)
        with pytest.raises(DataError, match=r"0\.png: has more than 8 bits a channel \(mode I"):
            batch(ImageClassification({"t": str(tmp_path / "t")}, CONFIG))


class TestTables:
    def table(self, folder: Path, rows: str) -> Path:
        for name, colour in COLOURS.items():
            save(folder / "images" / f"{name}.png", colour)
        path = folder / "rows.csv"
        path.write_text(rows)
        return path

    def test_paths_of_a_csv_file(self, tmp_path: Path) -> None:
        rows = f"path,label\nimages/red.png,warm\n{tmp_path}/images/blue.png,cold\n"
        data = ImageClassification({"t": str(self.table(tmp_path, rows))}, CONFIG)
        images, labels = batch(data)
        assert pixels(images) == [COLOURS["red"], COLOURS["blue"]]
        assert [data.labels["t"][label] for label in labels] == ["warm", "cold"]

    def test_a_path_that_leads_nowhere(self, tmp_path: Path) -> None:
        path = self.table(tmp_path, "file,class\nimages/red.png,1\nimages/rde.png,0\n")
        data = ImageClassification({"t": str(path)}, CONFIG)
        with pytest.raises(DataError, match=r"rows\.csv, line 3: no such image, .*images/rde\.png"):
            data.test_dataloader()

    @pytest.mark.parametrize(
        ("setting", "said"),
        [({"image": "pth"}, "did you mean 'path'"), ({"label": "labl"}, "did you mean 'label'")],
    )
    def test_a_column_misspelled(self, tmp_path: Path, setting: Any, said: str) -> None:
        path = self.table(tmp_path, "path,label\nimages/red.png,1\n")
        with pytest.raises(DataError, match=said):
            ImageClassification({"t": str(path)}, CONFIG, **setting)

    def test_a_column_of_something_else(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text('{"image": 3, "label": 0}\n')
        with pytest.raises(DataError, match=r"line 1: expected an image or a path to one, got int"):
            batch(ImageClassification({"t": str(path)}, CONFIG))


class TestDatasets:
    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        datasets = pytest.importorskip("datasets", reason="pip install .[test]")
        images = [Image.new("RGB", (12, 10), colour) for colour in COLOURS.values()]
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", *COLOURS])}
        )
        rows = {"image": images, "label": [1, 2, 3]}
        folder = tmp_path / "saved"
        datasets.Dataset.from_dict(rows, features).save_to_disk(folder)
        return folder

    def test_images_in_it(self, saved: Path) -> None:
        data = ImageClassification({"t": str(saved)}, CONFIG)
        images, labels = batch(data)
        assert pixels(images) == [*COLOURS.values()]
        assert labels == [1, 2, 3]
        assert data.labels == {"t": ["x", *COLOURS]}

    def test_a_broken_one_is_named(self, tmp_path: Path, saved: Path) -> None:
        import datasets

        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
        rows = {"image": [{"bytes": b"no image", "path": None}], "label": ["a"]}
        datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "broken")
        data = ImageClassification({"t": str(tmp_path / "broken")}, CONFIG)
        with pytest.raises(DataError, match="row 1: column 'image' is not a readable image"):
            batch(data)


class TestPreprocessing:
    def image(self) -> Image.Image:
        draw = np.random.default_rng(0)
        return Image.fromarray(draw.integers(0, 256, (40, 60, 3), dtype=np.uint8))

    def test_of_a_live_model_of_timm(self) -> None:
        import timm

        sizes = {"img_size": 32, "depth": 1, "num_classes": 3}
        model = timm.create_model("vit_tiny_patch16_224", **sizes)
        config = preprocessing_of(model)
        assert json.loads(json.dumps(config)) == config
        made = image_transform(config)(self.image())
        of_name = timm.data.resolve_model_data_config(model)  # 224, which the model refuses
        own = timm.data.create_transform(**{**of_name, "input_size": (3, 32, 32)})
        assert torch.equal(made, own(self.image()))
        assert model.eval()(made[None]).shape == (1, 3)

    def test_of_one_that_takes_grey_images(self) -> None:
        import timm

        model = timm.create_model("resnet18", in_chans=1)
        config: Any = preprocessing_of(model)
        assert config["input_size"] == [1, 224, 224]
        assert config["mean"] == [pytest.approx((0.485 + 0.456 + 0.406) / 3)]
        transform = image_transform(config)
        assert transform.mode == "L"
        assert transform(self.image().convert("L")).shape == (1, 224, 224)

    def test_of_a_name_and_a_folder_of_timm(self, tmp_path: Path) -> None:
        import timm
        from timm.models import save_for_hf

        own = timm.data.create_transform(
            **timm.data.resolve_data_config({}, timm.get_pretrained_cfg("resnet18").to_dict())
        )
        save_for_hf(timm.create_model("resnet18"), tmp_path)
        for named in ("resnet18", str(tmp_path), str(tmp_path / "pytorch_model.bin")):
            assert torch.equal(image_transform(named)(self.image()), own(self.image()))

    def test_of_a_folder_of_transformers(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers", reason="pip install .[test]")
        mean = [0.1, 0.2, 0.3]
        processor = transformers.ViTImageProcessor(
            size={"height": 24, "width": 20}, image_mean=mean
        )
        processor.save_pretrained(tmp_path)
        made = image_transform(str(tmp_path))(self.image())
        own = transformers.AutoImageProcessor.from_pretrained(tmp_path)
        assert made.shape == (3, 24, 20)
        assert torch.equal(made, own(self.image(), return_tensors="pt")["pixel_values"][0])

    @pytest.mark.parametrize(
        ("config", "said"),
        [
            ({"input_sise": [3, 8, 8]}, "knows no 'input_sise'; did you mean 'input_size'"),
            ({"input_size": 8}, r"as \[channels, height, width\], .* got 8"),
            ({"input_size": [3, 8, 8], "mean": [0.5]}, "a mean and a std for each channel"),
        ],
    )
    def test_no_data_config(self, config: Any, said: str) -> None:
        with pytest.raises(DataError, match=said):
            image_transform(config)

    def test_a_folder_that_says_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "vit"}')
        with pytest.raises(DataError, match=r"says nothing of how images are made .*timm's data"):
            image_transform(str(tmp_path))

    def test_nothing_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("transformers", reason="pip install .[test]")
        with pytest.raises(DataError, match=r"gone: no folder here, no model of timm's, and no"):
            image_transform(str(tmp_path / "gone"))

    def test_of_no_library(self) -> None:
        with pytest.raises(DataError, match=r"how Linear wants its images is not known: .*give"):
            preprocessing_of(torch.nn.Linear(1, 1))
