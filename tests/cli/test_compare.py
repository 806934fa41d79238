"""`fusionkit.compare` and `fusionkit.fuse`: what the verbs call, as a notebook does."""

import csv
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringDataModule
from tiny_net import TASKS, TinyNet
from tiny_tasks import PRIVATE, Data, Rows, States, module, settings, trainer
from torch import Tensor

import fusionkit
from fusionkit import DBMS, EMR, Dense, Family, MagnitudePrune, Mean, ReuseModule, TaskArithmetic
from fusionkit.cli.fusion_report import FusionReport
from fusionkit.cli.table import Table
from fusionkit.errors import DataError, FamilyError, FusionKitError
from fusionkit.reuse.fused import Fused, Untuned

CODECS = {"dense <fp32>": Dense("fp32"), "prune": MagnitudePrune(0.1)}


class SetUp(Data):
    """Rows, and what the tasks are, once it is set up."""

    ready: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.classes = self.num_classes
        del self.num_classes

    def prepare_data(self) -> None:
        self.ready += ("prepared",)

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        self.ready += (stage,)
        self.num_classes = self.classes

    def rows(self, task: str) -> tuple[Tensor, Tensor]:
        assert self.ready
        return super().rows(task)


class Untold(Data):
    """Does not say what its tasks are."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = {}

    def rows(self, task: str) -> tuple[Tensor, Tensor]:
        return Data().rows(task)


class Cells(HTMLParser):
    """A table's cells, row by row, as a browser reads them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        self.inside = tag in ("td", "th")
        if self.inside:
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.inside and self.rows[-1] and data.strip():
            self.rows[-1][-1] += data


@pytest.fixture
def reuse(base: TinyNet, finetuned: States) -> ReuseModule:
    return module(base, finetuned)


def score(reuse: ReuseModule, source: Any, task: str) -> float:
    """One task's accuracy, without the Trainer."""
    base = TinyNet().eval()
    base.load_state_dict(dict(reuse.base_weights))
    own = ReuseModule(base, private=PRIVATE)
    own.reuse(source)
    own.switch(task)
    tokens, labels = Data().rows(task)
    return float((own.eval()(tokens).argmax(-1) == labels).float().mean())


class TestCompare:
    def test_rows(self, reuse: ReuseModule) -> None:
        codec, own = reuse.codec, {"ant": 0.5}
        reuse.finetuned_scores = own
        results = fusionkit.compare(reuse, Data(), CODECS)
        assert [row.name for row in results.rows] == ["fine-tuned", "base", *CODECS]
        first, low, dense, _ = results.rows
        assert low.scores.values == {
            task: pytest.approx(score(reuse, Untuned(reuse.family()), task)) for task in TASKS
        }
        assert (low.nbytes, low.total_nbytes) == (0, reuse.family().base.nbytes)
        assert dense.total_nbytes == dense.nbytes + low.total_nbytes
        family = reuse.family()
        assert first.scores.values == {
            task: pytest.approx(score(reuse, family, task)) for task in TASKS
        }
        assert dense.scores.values == first.scores.values
        assert (first.scores.share, dense.scores.share) == (1, 1)
        assert dense.settings == repr(CODECS["dense <fp32>"])
        assert dense.bits_per_parameter >= 32
        assert (reuse.codec, reuse.finetuned_scores) == (codec, own)
        assert isinstance(reuse.source, Family)

    def test_nothing_is_shown_or_written(
        self,
        reuse: ReuseModule,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
        recwarn: pytest.WarningsRecorder,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        fusionkit.compare(reuse, Rows(), {"own": DBMS(EMR())}, settings=settings(patience=1))
        fusionkit.fuse({"a": reuse}, Data(), {"mean": Mean()}, scales=[1.0])
        assert list(tmp_path.iterdir()) == []
        assert capfd.readouterr() == ("", "")
        assert not [str(w.message) for w in recwarn if "lightning" in w.filename]

    def test_written_and_shown_where_asked_for(
        self, reuse: ReuseModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "new" / "out"
        results = fusionkit.compare(reuse, Data(), CODECS, out, verbose=True)
        assert "fine-tuned models, uncompressed" in capsys.readouterr().out
        assert {path.name for path in out.iterdir()} == {
            *(f"compare.{kind}" for kind in ("csv", "json", "html", "png", "svg")),
            *("compare_tasks.png", "compare_tasks.svg", "rows"),
        }
        with (out / "compare.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["name"] for row in rows] == [row["name"] for row in results.flat()]
        with pytest.raises(FusionKitError, match="written to the local disk"):
            fusionkit.compare(reuse, Data(), CODECS, "memory://out")

    def test_ctrl_c_is_one_in_a_notebook_too(
        self, reuse: ReuseModule, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Lightning would end the process, with status 1 and no word."""
        monkeypatch.setattr("lightning.pytorch.trainer.call.signal.signal", lambda *_: None)

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(reuse, "on_test_batch_start", interrupt, raising=False)
        with pytest.raises(KeyboardInterrupt):
            fusionkit.compare(reuse, Data(), CODECS)

    @pytest.mark.parametrize("right", [0, 1])
    def test_where_fine_tuned_models_get_nothing_right(
        self, reuse: ReuseModule, tmp_path: Path, right: int
    ) -> None:
        """There are no shares then, or (one row of many right) not in every draw of the rows."""
        tuned = {}
        for task in TASKS:
            reuse.reuse(reuse.family())
            reuse.switch(task)
            tokens, _ = Data().rows(task)
            outputs = reuse.model.eval()(tokens)
            labels = outputs.argmin(1)
            labels[:right] = outputs.argmax(1)[:right]
            tuned[task] = tokens, labels
        reuse.switch(None)
        data = Data()
        data.rows = tuned.__getitem__  # type: ignore[method-assign]
        results = fusionkit.compare(reuse, data, {"prune": MagnitudePrune(0.3)}, tmp_path / "out")
        ends = [end for row in results.rows for end in results.interval(row) or ()]
        assert all(map(math.isfinite, ends))
        assert (tmp_path / "out" / "compare.png").exists()

    def test_no_codec_at_all(self, reuse: ReuseModule, tmp_path: Path) -> None:
        out = tmp_path / "new" / "out"
        results = fusionkit.compare(reuse, Data(), {}, out)
        rows = json.loads((out / "compare.json").read_text())
        assert (
            [row["name"] for row in rows]
            == [row.name for row in results.rows]
            == ["fine-tuned", "base"]
        )
        assert (out / "compare.png").is_file()

    def test_what_more_is_asked_for(self, reuse: ReuseModule) -> None:
        """A fresh Trainer for each calibration, none to evaluate; a row for all seeds."""
        made: list[Trainer] = []
        one = trainer()

        def make() -> Trainer:
            made.append(trainer(2))
            return made[-1]

        results = fusionkit.compare(
            reuse,
            Rows(),
            {"prune": MagnitudePrune(0.1)},
            dbms=True,
            calibrated=True,
            shift=EMR(),
            seeds=[0, 3],
            settings=settings(),
            trainer=one,
            make_trainer=make,
        )
        assert [row.name for row in results.rows] == ["fine-tuned", "base", "prune", "DBMS prune"]
        assert results.rows[3].settings == repr(DBMS(MagnitudePrune(0.1), EMR()))
        assert results.rows[3].spread is not None
        assert len(made) == 2
        assert all(each.state.fn == "fit" for each in made)
        assert one.state.fn == "test"

    def test_an_error_that_the_base_does_not_make(self, reuse: ReuseModule) -> None:
        reuse.metric = {"ant": "CalibrationError"}
        results = fusionkit.compare(
            reuse,
            Rows(),
            {"own": DBMS(EMR())},
            seeds=[0, 1],
            settings=settings(),
            trainer=trainer(),
            make_trainer=lambda: trainer(1),
        )
        assert [row.scores.lower for row in results.rows] == [{"ant"}] * 3
        gap = [row.scores.values["ant"] for row in results.rows[:2]]
        wanted = (gap[1] - results.rows[2].scores.values["ant"]) / (gap[1] - gap[0])
        found = results.rows[2].scores.share_of("ant")
        assert found == (pytest.approx(wanted) if gap[1] > gap[0] else None)

    def test_a_task_without_data(self, reuse: ReuseModule) -> None:
        with pytest.raises(DataError, match="no calibration data for task 'bee'"):
            fusionkit.compare(
                reuse, Rows(("ant",)), {"own": DBMS(EMR())}, make_trainer=lambda: trainer(1)
            )

    def test_a_notebooks_table(self, reuse: ReuseModule) -> None:
        results = fusionkit.compare(reuse, Data(), CODECS)
        html = results._repr_html_()
        cells = Cells(html)
        assert [row[0] for row in cells.rows] == ["codec", "fine-tuned", "base", *CODECS]
        assert cells.rows[1:] == [list(row) for row in results.table().rows]
        assert cells.tags - {"p"} == {
            *("table", "caption", "thead", "tbody", "tr", "th", "td"),
        }
        assert "://" not in html


class TestFuse:
    def test_rows(self, reuse: ReuseModule) -> None:
        data = Data()
        merges = {"mean": Mean(), "sum": TaskArithmetic(0.4)}
        results = fusionkit.fuse({"full": reuse}, data, merges)
        assert data.tasks == list(TASKS)
        sets = ["ant+bee", "ant+cat", "bee+cat", "ant+bee+cat"]
        assert [row.key for row in results.rows] == [
            *(("full", "single", task) for task in TASKS),
            *(("full", method, chosen) for chosen in sets for method in merges),
        ]
        own = {task: score(reuse, reuse.family(), task) for task in TASKS}
        for row in results.rows[:3]:
            assert row.score == pytest.approx(own[row.tasks])
        for row in results.rows[3:]:
            chosen = row.tasks.split("+")
            finetuned = {task: reuse.finetuned[task] for task in chosen}
            family = Family(reuse.family().base, finetuned, PRIVATE)
            fused = Fused(family, merges[row.method])
            scores = {task: score(reuse, fused, task) for task in chosen}
            assert row.score == pytest.approx(sum(scores.values()) / len(chosen))
            shares = [scores[t] / own[t] if own[t] else math.nan for t in chosen]
            assert row.share == pytest.approx(sum(shares) / len(chosen), nan_ok=True)

    def test_what_was_scored_is_not_scored_again(
        self, reuse: ReuseModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = fusionkit.fuse({"a": reuse}, Data(), {"mean": Mean()}, tmp_path / "out")
        assert {path.name for path in (tmp_path / "out").iterdir()} == {
            "fuse.csv",
            "fuse.json",
            "fuse.png",
        }
        earlier = FusionReport(whole.rows[:-2])
        again = fusionkit.fuse({"a": reuse}, Data(), {"mean": Mean()}, earlier=earlier)
        assert again.rows == whole.rows
        assert len(earlier.rows) == len(whole.rows) - 2
        monkeypatch.setattr(Trainer, "test", lambda *_, **__: pytest.fail("scored again"))
        assert fusionkit.fuse({"a": reuse}, Data(), {"mean": Mean()}, earlier=whole) == whole
        assert Cells(whole._repr_html_()).rows[1][:2] == ["a", "single"]

    def test_what_was_scored_already_is_written_elsewhere(
        self, reuse: ReuseModule, tmp_path: Path
    ) -> None:
        whole = fusionkit.fuse({"a": reuse}, Data(), {"mean": Mean()})
        out = tmp_path / "new" / "out"
        fusionkit.fuse({"a": reuse}, Data(), {"mean": Mean()}, out, earlier=whole)
        assert json.loads((out / "fuse.json").read_text()) == whole.flat()
        assert {path.suffix for path in out.iterdir()} == {".csv", ".json", ".png"}

    def test_data_that_are_set_up(self, reuse: ReuseModule) -> None:
        """As the Trainer sets them up, before validation rows are searched on."""
        sums, data = {"sum": TaskArithmetic()}, SetUp()
        found = fusionkit.fuse({"a": reuse}, data, sums, scales=[0.3, 1.0])
        assert data.ready[:3] == ("prepared", "validate", "prepared")
        wanted = fusionkit.fuse({"a": reuse}, Data(), sums, scales=[0.3, 1.0])
        assert found.rows == wanted.rows

    @pytest.mark.parametrize("scales", [[], [0.3, 1.0]])
    def test_classes_that_the_module_tells(self, reuse: ReuseModule, scales: list[float]) -> None:
        sums = {"sum": TaskArithmetic()}
        wanted = fusionkit.fuse({"a": reuse}, Data(), sums, scales=scales)
        reuse.num_classes = Data().num_classes
        assert fusionkit.fuse({"a": reuse}, Untold(), sums, scales=scales).rows == wanted.rows
        reuse.num_classes = None
        with pytest.raises(DataError, match="number of classes of 'ant' is not known"):
            fusionkit.fuse({"a": reuse}, Untold(), sums, scales=scales)

    def test_data_without_tasks(self, reuse: ReuseModule) -> None:
        with pytest.raises(DataError, match="with the names of its `tasks`"):
            fusionkit.fuse({"a": reuse}, BoringDataModule(), {"mean": Mean()})

    def test_a_task_without_a_checkpoint(self, reuse: ReuseModule) -> None:
        del reuse.finetuned["bee"]
        with pytest.raises(FamilyError, match="mine: there is no fine-tuned checkpoint of task 'b"):
            fusionkit.fuse({"mine": reuse}, Data(), {"mean": Mean()})

    def test_no_rows_to_search_on(self, reuse: ReuseModule) -> None:
        data = Data()
        data.val_dataloader = lambda: [[], [], []]  # type: ignore[method-assign]
        with pytest.raises(DataError, match="no validation rows of 'ant' to search on"):
            fusionkit.fuse({"a": reuse}, data, {"mean": Mean()}, scales=[0.5])


def test_a_table_says_what_it_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets are no markup of rich's, nor `<` of HTML's."""
    from rich.console import Console

    table = Table("of <b>[bold]", ("task", "[red]"), footer=1)
    table.add("x & [bold]y", "1")
    table.add("mean")
    Console(width=80).print(table)
    shown = capsys.readouterr().out
    for text in ("of <b>[bold]", "[red]", "x & [bold]y"):
        assert text in shown
    assert Cells(table._repr_html_()).rows == [
        ["task", "[red]"],
        ["x & [bold]y", "1"],
        ["mean", ""],
    ]
    assert "<b>" not in table._repr_html_()
