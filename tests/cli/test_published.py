"""Published figures beside ours: read, shown, marked, and mixed into nothing."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny_net import TASKS, TinyNet
from tiny_tasks import Data, States, module

import fusionkit
from fusionkit import MagnitudePrune
from fusionkit.cli.comparison import ComparisonReport
from fusionkit.cli.published import published_in, read_published
from fusionkit.cli.recipe import recipes_folder
from fusionkit.errors import FusionKitError

CODECS = {"prune 10%": MagnitudePrune(0.1), "prune 50%": MagnitudePrune(0.5)}
FILE = {
    "source": "A & B <2024>",
    "setting": "the tiny one",
    "unit": "percent",
    "tasks": list(TASKS),
    "finetuned": {"mean": 80.0},
    "rows": {
        "theirs": {"bits": 2.0, "mean": 60.0},
        "by task": {"scores": dict.fromkeys(TASKS, 40.0)},
    },
}


def write(folder: Path, **more: Any) -> Path:
    path = folder / "published.yaml"
    content = {key: value for key, value in {**FILE, **more}.items() if value is not None}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture
def results(base: TinyNet, finetuned: States, tmp_path: Path) -> ComparisonReport:
    reuse = module(base, finetuned)
    return fusionkit.compare(reuse, Data(), CODECS, tmp_path, published=[write(tmp_path)])


class TestShown:
    def test_nothing_of_ours_changes(
        self, base: TinyNet, finetuned: States, results: ComparisonReport
    ) -> None:
        alone = fusionkit.compare(module(base, finetuned), Data(), CODECS)
        ours = results.flat()[: len(results.rows)]
        times = {"encode_seconds", "switch_seconds"}
        kept = [{key: row[key] for key in alone.flat()[0] if key not in times} for row in ours]
        assert kept == [{k: v for k, v in row.items() if k not in times} for row in alone.flat()]
        assert results.best is not None
        assert results.best.name in CODECS
        assert [mark.name for mark in results.marks()] == [mark.name for mark in alone.marks()]

    def test_in_the_table(self, results: ComparisonReport) -> None:
        table = results.table()
        assert table.footer == 2
        first, second = table.rows[-2:]
        assert (first[0], first[1], first[2], first[7]) == ("theirs †", "60.00%", "75.00%", "2.000")
        assert second[:3] == ("by task †", "40.00%", "50.00%")
        assert "†: published, not measured here: A & B <2024> (the tiny one)." in table.note

    def test_in_files(self, results: ComparisonReport, tmp_path: Path) -> None:
        rows = list(csv.DictReader((tmp_path / "compare.csv").open()))
        kinds = ["fine-tuned", "base", "codec", "codec", "published", "published"]
        assert [row["kind"] for row in rows] == kinds
        assert [row["source"] for row in rows] == [""] * 4 + ["A & B <2024>"] * 2
        *_, last = json.loads((tmp_path / "compare.json").read_text())
        assert last["setting"] == "the tiny one"
        assert last[f"score/{TASKS[0]}"] == pytest.approx(0.4)
        assert last["nbytes"] is None

    def test_on_the_plot(self, results: ComparisonReport) -> None:
        """A hollow star, where size and share are known; the front is ours alone."""
        figure = results.figure()
        (axes,) = figure.axes
        stars = [line for line in axes.lines if line.get_marker() == "*"]
        assert [line.get_xdata()[0] for line in stars] == [2.0]
        assert stars[0].get_ydata()[0] == pytest.approx(75)
        assert stars[0].get_markerfacecolor() == "none"
        front = next(line for line in axes.lines if line.get_label().startswith("front"))
        assert 2.0 not in np.asarray(front.get_xdata())
        told = [each.get_text() for each in figure.legends[0].get_texts()]
        assert told.count("†: published, not measured here") == 1
        low, high = axes.get_ylim()
        assert low < 75 < high

    def test_on_the_page(self, results: ComparisonReport, tmp_path: Path) -> None:
        pytest.importorskip("plotly")
        page = (tmp_path / "compare.html").read_text()
        assert "theirs †" in page
        assert "Hollow stars are published figures" in page
        assert "star-open" in page
        assert "A & B <2024>" not in page

    def test_without_any_there_is_no_column(self, base: TinyNet, finetuned: States) -> None:
        alone = fusionkit.compare(module(base, finetuned), Data(), {})
        assert "source" not in alone.flat()[0]
        assert alone.table().footer == 0


class TestOtherTasks:
    def test_a_part_of_them(self, base: TinyNet, finetuned: States, tmp_path: Path) -> None:
        """A mean of other tasks is no mean of these; scores by task have one."""
        path = write(tmp_path, tasks=[*TASKS, "more"], rows={
            "mean alone": {"bits": 1.0, "mean": 50.0},
            "both": {"mean": 47.5, "scores": {**dict.fromkeys(TASKS, 40.0), "more": 70.0}},
        })  # fmt: skip
        found = fusionkit.compare(module(base, finetuned), Data(), {}, published=[path])
        alone, both = found.table().rows[-2:]
        assert alone[:3] == ("mean alone †", "", "")
        assert both[:3] == ("both †", "40.00%", "")
        assert "Of other tasks than these" in found.table().note
        assert found.published_marks() == []

    def test_another_metric(self, base: TinyNet, finetuned: States, tmp_path: Path) -> None:
        path = write(tmp_path, metrics={TASKS[0]: "MatthewsCorrCoef"})
        found = fusionkit.compare(module(base, finetuned), Data(), {}, published=[path])
        said = f"{TASKS[0]} is by MatthewsCorrCoef in the tiny one, by MulticlassAccuracy here."
        assert said in found.table().note


class TestFiles:
    @pytest.mark.parametrize(
        ("more", "said"),
        [
            ({"source": None}, "`source` is missing"),
            ({"setting": None}, "`setting` is missing"),
            ({"unit": "points"}, "`unit` is percent or fraction, got 'points'"),
            ({"unit": "fraction"}, "'theirs': mean: expected a number up to 1, by its `unit`"),
            ({"tasks": ["other"]}, "'by task': a score of ant, which `tasks` lacks"),
            ({"settings": "x"}, "no key 'settings'; did you mean 'setting'"),
            ({"rows": {"a": {"mean": "many"}}}, "'a': mean: expected a number up to 100"),
            ({"rows": {"a": {"bit": 1, "mean": 1}}}, "'a': no key 'bit'; did you mean 'bits'"),
            ({"rows": {"a": {}}}, "'a': expected `scores` by task, or a `mean`"),
            ({"rows": {"a": {"scores": {"ant": 1.0}}}}, "neither a mean nor a score of"),
            (
                {"rows": {"a": {"mean": 10.0, "scores": dict.fromkeys(TASKS, 20.0)}}},
                "its mean is 10, that of its scores 20.00",
            ),
            ({"rows": {"a": {"mean": 1, "bits": -1}}}, "bits: expected a number of bits"),
            ({"metrics": {"x": "Accuracy"}}, "`metrics` names x, which `tasks` lacks"),
        ],
    )
    def test_what_is_wrong_is_said(self, tmp_path: Path, more: Any, said: str) -> None:
        with pytest.raises(FusionKitError, match=r"published\.yaml") as told:
            read_published(write(tmp_path, **more))
        assert said in str(told.value)

    def test_no_yaml(self, tmp_path: Path) -> None:
        path = tmp_path / "a.yaml"
        with pytest.raises(FusionKitError, match="not a readable YAML file"):
            read_published(path)
        path.write_text("- a\n")
        with pytest.raises(FusionKitError, match="expected a mapping of source"):
            read_published(path)

    def test_one_name_in_two_files(self, tmp_path: Path) -> None:
        other = tmp_path / "other"
        other.mkdir()
        paths = [
            write(tmp_path),
            write(other, setting="a larger one, tuned", rows={"theirs": {"mean": 1}}),
        ]
        names = [row.name for row in published_in(paths)]
        assert names == ["theirs, the tiny one", "by task", "theirs, a larger one"]

    def test_those_that_come_along(self) -> None:
        files = sorted((recipes_folder() / "papers" / "published").glob("*.yaml"))
        assert len(files) >= 7
        for path in files:
            for row in read_published(path):
                assert row.mean(row.tasks) is not None
        (best, *_) = read_published(files[0].with_name("emr_clip_b32.yaml"))
        assert best.share(best.tasks) == pytest.approx(0.8874 / 0.905)
