"""Which class a label means, from what the head and the data say."""

import json
from pathlib import Path
from typing import Any

import pytest

from fusionkit.errors import DataError
from fusionkit.tasks.class_names import Classes, class_names, classes_of, head_folder


def at(row: int) -> str:
    return f"rows.csv, line {row + 2}"


class TestOrder:
    @pytest.mark.parametrize(
        ("labels", "names"),
        [
            (["b", "a", "b"], ["a", "b"]),
            (["0", "10", "2"], [str(number) for number in range(11)]),  # not 0, 10, 2
            ([0, 2.0], ["0", "1", "2"]),  # a class that has no row is a class all the same
            (["1", "one"], ["1", "one"]),
        ],
    )
    def test_without_a_head(self, labels: list[Any], names: list[str]) -> None:
        assert classes_of("t", labels, at).names == names

    def test_what_the_data_set_says_goes_before_sorting(self) -> None:
        assert classes_of("t", ["b", "a"], at, named=["b", "a", "c"]).names == ["b", "a", "c"]

    def test_names_that_are_numbers(self) -> None:
        assert classes_of("t", ["10", "2"], at, numbers=False).names == ["10", "2"]

    def test_the_head_goes_before_all(self) -> None:
        classes = classes_of("t", ["a", "b"], at, head=["c", "b", "a"], named=["a", "b"])
        assert [classes.place(label, at(0)) for label in "abc"] == [2, 1, 0]

    def test_numbers_are_a_named_heads_rows(self) -> None:
        classes = classes_of("t", [0, "2"], at, head=["c", "b", "a"])
        assert [classes.place(label, at(0)) for label in (2, "0", 1.0)] == [2, 0, 1]

    def test_a_head_that_names_nothing_is_held_against_their_number(self) -> None:
        head = ["0", "1", "2"]
        assert classes_of("t", ["b", "c", "a"], at, head=head).names == ["a", "b", "c"]
        assert classes_of("t", [0, 1], at, head=head).names == head
        with pytest.raises(
            DataError, match=r"have 2 classes \(a, b\), its head 3, .*give `labels`"
        ):
            classes_of("t", ["a", "b"], at, head=head)

    def test_not_among_the_heads(self) -> None:
        with pytest.raises(
            DataError,
            match=r"rows\.csv, line 3: label 'negativ' is not among the 2 of task 't' "
            r"\(positive, negative\); did you mean 'negative'\? check `labels`",
        ):
            classes_of("t", ["positive", "negativ"], at, head=["positive", "negative"])
        with pytest.raises(DataError, match="line 2: label '5' is not among the 5"):
            classes_of("t", ["5"], at, head=list("abcde"))

    def test_spelled_otherwise(self, tmp_path: Path) -> None:
        """By case and by what is between words; or as the prompts of the head's file say it."""
        head = ["T - shirt / top", "baseball diamond", "c", "c++", "A-"]
        classes = classes_of("t", ["t-shirt/top", "Baseball_Diamond"], at, head=head)
        assert [classes.place(each, at(0)) for each in ("T-Shirt/Top", "C++", "c")] == [0, 3, 2]
        for other in ("baseballdiamond", "c#", "A"):
            with pytest.raises(DataError, match=f"label '{other}' is not among the 5"):
                classes.place(other, at(0))
        path = tmp_path / "classes.json"
        content = {"labels": ["SeaLake", "River"], "names": ["lake or sea", "river"]}
        path.write_text(json.dumps(content))
        classes = classes_of("t", ["River", "lake or sea"], at, head=str(path))
        assert classes.names == content["labels"]
        assert [classes.place(each, at(0)) for each in ("SeaLake", "river", "0")] == [0, 1, 0]

    def test_what_is_spelled_as_two_classes_is_neither(self) -> None:
        classes = Classes("t", ["a b", "A_B"], ["c", "C"])
        assert [classes.place(each, at(0)) for each in ("a b", "A_B")] == [0, 1]
        for other in ("a-b", "c"):
            with pytest.raises(DataError, match=f"label '{other}' is not among"):
                classes.place(other, at(0))

    def test_false_and_true_are_two_classes(self) -> None:
        classes = classes_of("t", [True, False], at, head=["healthy", "ill"])
        assert [classes.place(each, at(0)) for each in (True, False)] == [1, 0]
        with pytest.raises(DataError, match="label 'True' is not among the 3"):
            classes_of("t", [True], at, head=["a", "b", "c"])

    def test_named_twice(self) -> None:
        with pytest.raises(DataError, match="class 'a' is named twice"):
            Classes("t", ["a", "b", "a"])


class TestHead:
    @pytest.mark.parametrize(
        ("config", "names"),
        [
            ({"id2label": {"1": "no", "0": "yes", "10": "x"}}, ["yes", "no", "x"]),
            ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, ["0", "1"]),
            ({"label_names": ["cat", "dog"], "num_classes": 2}, ["cat", "dog"]),
            ({"architecture": "resnet18", "num_classes": 3}, ["0", "1", "2"]),
            ({"hidden_size": 3}, None),
            ([], None),
        ],
    )
    def test_of_a_folder_or_its_file(
        self, tmp_path: Path, config: Any, names: list[str] | None
    ) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config))
        for model in (tmp_path, str(tmp_path / "model.safetensors")):
            assert head_folder(model) == (tmp_path if names else None)
        if names:
            assert class_names(str(tmp_path), "t") == names

    def test_of_one_file_among_others(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"label_names": ["a", "b"]}')
        assert head_folder(tmp_path / "cats.safetensors") is None  # the folder's is another's

    def test_of_what_names_none(self, tmp_path: Path) -> None:
        for model in (tmp_path, tmp_path / "gone", {"a state": "dict"}, "s3://bucket/model"):
            assert head_folder(model) is None
        with pytest.raises(DataError, match=r"expected JSON with a list 'labels', or a model's"):
            class_names(str(tmp_path), "t")
