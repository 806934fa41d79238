"""Rows from every kind of file, and their columns: the same rows, and one clear error each."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fusionkit.errors import DataError, FusionKitError
from fusionkit.tasks.columns import image_column, label_column, text_columns
from fusionkit.tasks.table import MissingSplitError, Table
from fusionkit.tasks.table_files import read_table

ROWS = [
    {"text": "good, really", "label": "yes"},
    {"text": 'a "quote"', "label": "no"},
    {"text": "two\nlines", "label": "yes"},
]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """Rows as a file of the kind that its name says."""
    path.parent.mkdir(exist_ok=True)
    if ".json" in path.name:
        lines = [json.dumps(row) for row in rows]
        text = "\n".join(lines) + "\n" if ".jsonl" in path.name else f"[{','.join(lines)}]"
    elif path.name.endswith((".txt", ".tsv.gz")):
        text = "".join(f"{row['label']}\t{row['text']}\n" for row in rows)
    else:
        mark = "\t" if ".tsv" in path.name else ","
        quoted = [['"' + str(v).replace('"', '""') + '"' for v in row.values()] for row in rows]
        text = "".join(mark.join(cells) + "\n" for cells in [list(rows[0]), *quoted])
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def found(table: Table) -> list[dict[str, Any]]:
    return [{"text": row["text"], "label": row["label"]} for row in table.rows]


class TestFiles:
    @pytest.mark.parametrize(
        "name", ["test.csv", "test.tsv", "test.jsonl", "test.json", "test.csv.gz", "test.jsonl.gz"]
    )
    def test_the_same_rows(self, tmp_path: Path, name: str) -> None:
        write(tmp_path / name)
        assert found(read_table(tmp_path, "test")) == ROWS
        assert found(read_table(tmp_path / name, "test")) == ROWS

    @pytest.mark.parametrize("name", ["test.txt", "test.tsv.gz"])
    def test_lines_without_a_header(self, tmp_path: Path, name: str) -> None:
        write(tmp_path / name, ROWS[:2])
        assert found(read_table(tmp_path, "test")) == ROWS[:2]

    def test_what_splits_are_called(self, tmp_path: Path) -> None:
        write(tmp_path / "train.csv")
        write(tmp_path / "dev.csv", ROWS[:1])
        assert len(read_table(tmp_path, "test").rows) == 1
        write(tmp_path / "test.jsonl", ROWS[:2])
        assert len(read_table(tmp_path, "test").rows) == 2  # test goes before dev
        assert len(read_table(tmp_path, "test", {"test": "dev"}).rows) == 1
        write(tmp_path / "odd.csv", ROWS[:2])
        assert len(read_table(tmp_path, "train", {"train": "odd"}).rows) == 2
        with pytest.raises(DataError, match="'train' and 'test' are called; there is no 'tst'"):
            read_table(tmp_path, "test", {"tst": "dev"})

    def test_a_path_for_each_split(self, tmp_path: Path) -> None:
        write(tmp_path / "cr_train.csv")
        write(tmp_path / "cr_test.csv", ROWS[:1])
        path = tmp_path / "cr_{split}.csv"
        assert [len(read_table(path, split).rows) for split in ("train", "test")] == [3, 1]
        with pytest.raises(MissingSplitError, match=r"no such file; looked for sst_train\.csv"):
            read_table(tmp_path / "sst_{split}.csv", "train")

    def test_one_file_has_no_training_rows(self, tmp_path: Path) -> None:
        with pytest.raises(MissingSplitError, match=r"its rows are test rows; .* train\.csv"):
            read_table(write(tmp_path / "cr.csv"), "train")

    def test_missing_split(self, tmp_path: Path) -> None:
        write(tmp_path / "train.csv")
        with pytest.raises(MissingSplitError, match=r"no test rows there: .*it holds train\.csv\."):
            read_table(tmp_path, "test")

    @pytest.mark.parametrize("name", ["gone", "gone/inside/it", "tests/gone", "a/b.csv"])
    def test_nothing_there(self, name: str) -> None:
        with pytest.raises(DataError, match="no such file or folder"):
            read_table(Path(name), "test")

    def test_another_kind_of_file(self, tmp_path: Path) -> None:
        (tmp_path / "rows.xlsx").write_bytes(b"")
        with pytest.raises(DataError, match=r"rows\.xlsx: expected a file of rows, .* \.csv"):
            read_table(tmp_path / "rows.xlsx", "test")

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            (
                "a.csv",
                "text,label\nfine,1\na, b,1\n",
                "line 3: has 3 cells, and the header 2; .*comma",
            ),
            ("a.tsv", 'text\tlabel\n"open\t1\n', "line 2: not CSV"),
            ("a.csv", "text,text\na,b\n", "line 1: names a column twice"),
            ("a.csv", "text,label\n", "has no rows"),
            ("a.csv", "", "has no rows"),
            ("a.jsonl", '{"text": "a"}\n{"text": \n', "line 2: not JSON"),
            ("a.jsonl", '{"text": "a"}\n"b"\n', "line 2: expected an object"),
            ("a.json", '[{"text": "a"}, 3]', "item 2: expected an object"),
            ("a.txt", "a\tb\nc\n", "line 2: expected 'label<TAB>text'"),
            ("a.csv", "text,label\n\udce9,1\n", "not UTF-8 text"),
            ("a.csv.gz", "text,label\n", "not a whole gzip file"),
        ],
    )
    def test_malformed(self, tmp_path: Path, name: str, content: str, said: str) -> None:
        path = tmp_path / name
        path.write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(DataError, match=rf"a\.\S+ ?{said}|a\.\S+, {said}"):
            read_table(path, "test")

    def test_rows_that_lack_a_column(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "a", "label": 1}\n\n{"text": "b"}\n')
        with pytest.raises(DataError, match=r"line 3: has nothing in column 'label'"):
            read_table(path, "test").column("label")

    def test_lines_count_those_within_quotes(self, tmp_path: Path) -> None:
        table = read_table(write(tmp_path / "a.csv", [*ROWS, {"text": "x", "label": ""}]), "test")
        with pytest.raises(DataError, match="line 6: has nothing in column 'label'"):
            table.labels("label")


class TestColumns:
    def table(self, *columns: str, row: dict[str, Any] | None = None) -> Table:
        return Table("rows.csv", columns, [row or dict.fromkeys(columns, "x")], [2])

    @pytest.mark.parametrize(
        ("columns", "texts"),
        [
            (("text", "label"), ["text"]),
            (("idx", "premise", "hypothesis", "label"), ["premise", "hypothesis"]),
            (("id", "sentence", "target"), ["sentence"]),
            (("review", "class"), ["review"]),
        ],
    )
    def test_by_their_common_names(self, columns: tuple[str, ...], texts: list[str]) -> None:
        table = self.table(*columns)
        assert text_columns(table, None, label_column(table, None)) == texts

    def test_as_asked_for(self) -> None:
        table = self.table("text", "label", "title", "stars")
        assert label_column(table, "stars") == "stars"
        assert text_columns(table, "title", "stars") == ["title"]
        assert text_columns(table, ["title", "text"], "stars") == ["title", "text"]

    def test_did_you_mean(self) -> None:
        table = self.table("text", "label")
        with pytest.raises(
            DataError,
            match=r"rows\.csv: has no column 'lable' \(`label`\); did you mean 'label'\? it has "
            "'text', 'label'",
        ):
            label_column(table, "lable")
        with pytest.raises(DataError, match="did you mean 'text'"):
            text_columns(table, ["txt"], "label")

    def test_not_to_be_told(self) -> None:
        table = self.table("one", "two", "three")
        for choose in (label_column, image_column):
            with pytest.raises(DataError, match=r"can't be told from their names, 'one', 'two'"):
                choose(table, None)
        with pytest.raises(DataError, match=r"which column has the texts .* say it in `text`"):
            text_columns(table, None, "three")

    def test_more_than_a_pair(self) -> None:
        with pytest.raises(DataError, match=r"one column of texts .* or two, got 3"):
            text_columns(self.table("a", "b", "c"), ["a", "b", "c"], "label")


class TestDatasets:
    @pytest.fixture(autouse=True)
    def _datasets(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets = pytest.importorskip("datasets", reason="pip install .[test]")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def rows(self, names: list[str] | None = None, labels: list[Any] | None = None) -> Any:
        from datasets import ClassLabel, Dataset, Features, Value

        label = ClassLabel(names=names) if names else Value("string")
        content = {
            "text": [row["text"] for row in ROWS],
            "label": labels or [row["label"] for row in ROWS],
        }
        return Dataset.from_dict(content, Features({"text": Value("string"), "label": label}))

    def test_parquet_and_arrow_files(self, tmp_path: Path) -> None:
        self.rows().to_parquet(tmp_path / "rows.parquet")
        self.rows().save_to_disk(tmp_path / "saved")
        (arrow,) = (tmp_path / "saved").glob("*.arrow")
        for path in (tmp_path / "rows.parquet", arrow):
            assert found(read_table(path, "test")) == ROWS

    def test_a_folder_of_parquet(self, tmp_path: Path) -> None:
        (tmp_path / "set" / "data").mkdir(parents=True)
        for split in ("train", "validation"):
            self.rows().to_parquet(tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet")
        for split in ("train", "test"):
            assert found(read_table(tmp_path / "set", split)) == ROWS  # type: ignore[arg-type]
        with pytest.raises(
            MissingSplitError, match=r"has no test rows .* splits train, validation; "
        ):
            read_table(tmp_path / "set", "test", {"test": "tset"})

    def test_what_was_saved(self, tmp_path: Path) -> None:
        from datasets import DatasetDict

        DatasetDict({"train": self.rows(), "test": self.rows()}).save_to_disk(tmp_path / "both")
        self.rows().save_to_disk(tmp_path / "one")
        assert found(read_table(tmp_path / "both", "train")) == ROWS
        assert found(read_table(tmp_path / "one", "test")) == ROWS
        with pytest.raises(MissingSplitError, match="has no splits, and its rows are test rows"):
            read_table(tmp_path / "one", "train")

    def test_named_classes(self, tmp_path: Path) -> None:
        self.rows(["no", "yes"]).save_to_disk(tmp_path / "set")
        table = read_table(tmp_path / "set", "test")
        assert table.labels("label") == ["yes", "no", "yes"]
        assert table.classes == {"label": ["no", "yes"]}

    def test_hidden_labels(self, tmp_path: Path) -> None:
        self.rows(["no", "yes"], [1, -1, 0]).save_to_disk(tmp_path / "set")
        with pytest.raises(DataError, match=r"row 2: has nothing .*hidden.*`splits` chooses"):
            read_table(tmp_path / "set", "test").labels("label")

    def test_damaged(self, tmp_path: Path) -> None:
        (tmp_path / "rows.parquet").write_bytes(b"PAR1 no")
        with pytest.raises(DataError, match=r"rows\.parquet: can't be read by datasets: "):
            read_table(tmp_path / "rows.parquet", "test")

    def test_the_hub_out_of_reach(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(DataError, match=r"nobody/nothing: no such file .* can't be reached"):
            read_table(Path("nobody/nothing"), "test")


def test_without_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "rows.parquet").write_bytes(b"")
    with pytest.raises(FusionKitError, match=r"pip install 'fusionkit\[datasets\]'"):
        read_table(tmp_path / "rows.parquet", "test")
