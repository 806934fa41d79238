"""A comparison that goes on where an earlier one stopped, and the page that it writes."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tiny_net import TASKS, TinyNet
from tiny_tasks import Data, States, module
from torch import Tensor

import fusionkit
from fusionkit import EMR, Dense, MagnitudePrune, ReuseModule
from fusionkit.cli.comparison import ComparisonReport
from fusionkit.cli.heat_map import draw_heat_map, is_worst, lightness

CODECS = {"dense": Dense("fp32"), "prune": MagnitudePrune(0.1)}


class Page(HTMLParser):
    """What a browser would fetch, and what a screen reader would find."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.headings: list[str] = []
        self.cells: list[tuple[str, dict[str, Any]]] = []
        self.tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        own = dict(attributes)
        self.tags.append(tag)
        self.fetched += [own[key] for key in ("src", "href") if key in own]
        if tag in ("th", "td"):
            self.cells.append((tag, own))
        if tag in ("h1", "h2"):
            self.headings.append(tag)


class OtherRows(Data):
    def rows(self, task: str) -> tuple[Tensor, Tensor]:
        tokens, labels = super().rows(task)
        return tokens, labels.roll(1) if task == "bee" else labels


@pytest.fixture
def reuse(base: TinyNet, finetuned: States) -> ReuseModule:
    return module(base, finetuned)


def measured(monkeypatch: pytest.MonkeyPatch, *args: Any, **own: Any) -> tuple[Any, list[str]]:
    """What a comparison gives, and how often models were scored."""
    scored: list[str] = []
    finish = ReuseModule._finish

    def count(self: ReuseModule, stage: str) -> None:
        scored.append(stage)
        finish(self, stage)

    with monkeypatch.context() as patch:
        patch.setattr(ReuseModule, "_finish", count)
        return fusionkit.compare(*args, **own), scored


def numbers(results: ComparisonReport) -> list[dict[str, Any]]:
    """All rows, but for what depends on the others."""
    return [{k: v for k, v in row.items() if k != "within_noise_of_best"} for row in results.flat()]


class TestResumed:
    def test_what_is_there_is_not_measured_again(
        self, reuse: ReuseModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, scored = measured(monkeypatch, reuse, Data(), {"dense": CODECS["dense"]}, tmp_path)
        assert len(scored) == 3
        whole, scored = measured(monkeypatch, reuse, Data(), CODECS, tmp_path)
        assert len(scored) == 1  # the new codec's
        assert numbers(whole)[:3] == numbers(first)
        again, scored = measured(monkeypatch, reuse, Data(), CODECS, tmp_path)
        assert not scored
        assert numbers(again) == numbers(whole)
        assert [r.scores.share for r in again.rows] == [r.scores.share for r in whole.rows]
        renamed = {"other name": CODECS["prune"]}
        found, scored = measured(monkeypatch, reuse, Data(), renamed, tmp_path)
        assert (found.rows[-1].name, scored) == ("other name", [])

    def test_other_inputs_are_measured(
        self, reuse: ReuseModule, finetuned: States, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        codecs = {"prune": MagnitudePrune(0.1)}
        measured(monkeypatch, reuse, Data(), codecs, tmp_path)
        assert len(measured(monkeypatch, reuse, OtherRows(), codecs, tmp_path)[1]) == 3
        other = {"prune": MagnitudePrune(0.2)}
        assert len(measured(monkeypatch, reuse, Data(), other, tmp_path)[1]) == 1
        reuse.metric = "F1Score"
        assert len(measured(monkeypatch, reuse, Data(), codecs, tmp_path)[1]) == 3
        reuse.metric = None
        state = {name: tensor.clone() for name, tensor in finetuned["bee"].items()}
        state["embed.weight"][0, 0] += 1
        state["decoder.weight"] = state["embed.weight"]
        reuse.finetuned["bee"] = state  # type: ignore[assignment]
        assert len(measured(monkeypatch, reuse, Data(), codecs, tmp_path)[1]) == 3

    def test_a_row_half_written(
        self, reuse: ReuseModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        measured(monkeypatch, reuse, Data(), {}, tmp_path)
        for path in (tmp_path / "rows").iterdir():
            path.write_text(path.read_text()[:40])
        assert len(measured(monkeypatch, reuse, Data(), {}, tmp_path)[1]) == 2


class TestPage:
    def test_what_a_browser_and_a_screen_reader_find(
        self, reuse: ReuseModule, tmp_path: Path
    ) -> None:
        pytest.importorskip("plotly")
        codecs = {**CODECS, "<b>emr</b>": EMR()}
        results = fusionkit.compare(reuse, Data(), codecs, tmp_path)
        html = (tmp_path / "compare.html").read_text()
        page = Page(html)
        assert page.fetched == []
        assert page.headings == ["h1", "h2", "h2", "h2", "h2"]
        assert page.tags.count("caption") == page.tags.count("table") == 2
        heads = [own["scope"] for tag, own in page.cells if tag == "th"]
        rows = len(results.rows)
        assert heads.count("row") == rows + rows - 1
        assert heads.count("col") == len(results.table().columns) + 1 + len(TASKS)
        assert 'lang="en"' in html
        assert "<b>emr</b>" not in html.replace("<b>&lt;b&gt;", "")
        assert 'aria-describedby="plot-text"' in html

    def test_json_says_what_was_measured(self, reuse: ReuseModule, tmp_path: Path) -> None:
        fusionkit.compare(reuse, Data(), CODECS, tmp_path)
        *_, dense, _ = json.loads((tmp_path / "compare.json").read_text())
        assert dense["rows"] == sum(len(Data().rows(task)[1]) for task in TASKS)
        assert dense["interval_of"] == "share"
        assert dense["low"] == dense["high"] == 1  # by every row what the fine-tuned models say
        assert dense["worst_share"] == 1
        assert dense["total_nbytes"] > dense["nbytes"]
        assert dense["metric/ant"] == "MulticlassAccuracy"


def test_heat_map() -> None:
    figure = draw_heat_map(["a", "b"], ["x", "y"], [[1.0, 0.98], [None, 0.5]])
    (axes,) = figure.axes
    said = {each.get_text(): each.get_fontweight() for each in axes.texts}
    assert said == {"100.0": "normal", "98.0": "bold", "50.0": "normal"}
    assert lightness(100, 50) == 1
    assert lightness(99.5, 50) - lightness(99, 50) > lightness(60, 50) - lightness(59.5, 50)
    assert not is_worst(1.0, [1.0, 1.0])
    assert lightness(40, 50) == 0
