"""Scores by direction and unit, several metrics a task, rows and intervals, and scores.json."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from mixed_tasks import KINDS, QUIET, Mixed, fine_tuned, module
from tiny_net import TinyNet
from torch import Tensor
from torchmetrics import (
    F1Score,
    MeanSquaredError,
    Metric,
    MetricCollection,
    PearsonCorrCoef,
    SpearmanCorrCoef,
)
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchmetrics.text import Perplexity

from fusionkit.errors import DataError, FusionKitError
from fusionkit.tasks.classification import Classification
from fusionkit.tasks.facts import Facts
from fusionkit.tasks.metric_facts import facts_of
from fusionkit.tasks.metrics import metric_of, metrics_of
from fusionkit.tasks.regression import Regression
from fusionkit.tasks.resample import RESAMPLES, interval, resampled_means
from fusionkit.tasks.score_file import known_scores, score_file
from fusionkit.tasks.scores import Measured, Scores

PERPLEXITY = Measured(facts_of(Perplexity()))
ACCURACY = Measured(facts_of(MulticlassAccuracy(3)))


def nothing_to_tell() -> Metric:
    return MeanSquaredError()


def by_name(average: str = "macro", num_classes: int = 0) -> Metric:
    return MulticlassF1Score(num_classes, average=average)


class TestFacts:
    def test_what_metrics_say_of_themselves(self) -> None:
        assert facts_of(F1Score("multiclass", num_classes=3)).percent
        assert facts_of(MeanSquaredError()) == Facts("MeanSquaredError", False, 0.0, None)
        assert not PERPLEXITY.facts.percent
        assert PERPLEXITY.lower
        assert not facts_of(PearsonCorrCoef()).percent
        assert facts_of(PearsonCorrCoef()).within_one

    def test_what_follows_for_those_composed_of_others(self) -> None:
        accuracy = MulticlassAccuracy(3)
        assert facts_of(1 - accuracy) == Facts("1 - MulticlassAccuracy", False, 0.0, 1.0)
        assert facts_of(2 * MeanSquaredError()).higher_is_better is False
        assert facts_of(accuracy * -1.0) == Facts("MulticlassAccuracy * -1", False, -1.0, 0.0)
        assert facts_of(accuracy - MeanSquaredError()).higher_is_better is True
        assert facts_of(accuracy + MeanSquaredError()).higher_is_better is None
        mean = (PearsonCorrCoef() + SpearmanCorrCoef()) / 2
        assert facts_of(mean).name == "(PearsonCorrCoef + SpearmanCorrCoef) / 2"
        assert facts_of(mean).within_one
        assert facts_of(accuracy / accuracy).low is None
        assert facts_of(abs(accuracy)).higher_is_better is None


class TestSeveral:
    def test_one_counts(self) -> None:
        asked = {"metrics": ["F1Score", {"class_path": "Accuracy"}], "counts": "Accuracy"}
        found, facts = metrics_of(asked, "a", Classification(3))
        assert list(found) == ["Accuracy", "F1Score"]
        assert facts.name == "MulticlassAccuracy"

    def test_a_collection(self) -> None:
        def made(classes: int) -> MetricCollection:
            return MetricCollection([MulticlassAccuracy(classes), MulticlassF1Score(classes)])

        asked: Any = {"metrics": made, "counts": "MulticlassF1Score"}
        assert isinstance(metric_of(asked, "a", Classification(3)), MulticlassF1Score)
        with pytest.raises(FusionKitError, match=r"several metrics.*not said which one counts"):
            metrics_of(made, "a", Classification(3))  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("asked", "said"),
        [
            (
                {"metrics": ["Accuracy", "F1Score"]},
                r"not said which one counts: .*: Accuracy",
            ),
            ({"metrics": ["Accuracy"], "counts": "F1"}, r"'F1' is to count, and is not among Acc"),
            ({"metrics": []}, "list of metrics is empty"),
            ({"metrics": ["Accuracy", "Accuracy"], "counts": "Accuracy"}, "two metrics 'Accuracy'"),
            ("PearsonCorrCoef", "PearsonCorrCoef, is not for what the task has"),
            ({"class_path": "Accuracy", "init_args": {"average": "none"}}, "more than one number"),
        ],
    )
    def test_refused(self, asked: Any, said: str) -> None:
        with pytest.raises(FusionKitError, match=said):
            metrics_of(asked, "a", Classification(3))

    def test_the_number_of_classes_goes_to_whom_it_is_for(self) -> None:
        kind = Classification(4)
        assert metric_of(by_name, "a", kind).num_classes == 4  # type: ignore[arg-type]
        assert metric_of(MulticlassAccuracy(4), "a", kind).num_classes == 4  # type: ignore[arg-type]
        made = metric_of(nothing_to_tell, "a", Regression())  # type: ignore[arg-type]
        assert isinstance(made, MeanSquaredError)

    def test_a_direction_that_a_metric_does_not_say(self) -> None:
        asked = {"class_path": "PearsonCorrCoef", "higher_is_better": False}
        assert metrics_of(asked, "a", Regression())[1].higher_is_better is False


class TestShares:
    def test_of_an_error_the_part_of_the_gap(self) -> None:
        own = {"a": 10.0, "b": 20.0}
        measured = {"a": PERPLEXITY, "b": PERPLEXITY}
        scores = Scores({"a": 12.0, "b": 20.0}, own, {"a": 30.0, "b": 40.0}, measured)
        assert scores.share_of("a") == pytest.approx((30 - 12) / (30 - 10))
        assert scores.share == pytest.approx((0.9 + 1) / 2)
        assert scores.worst == ("a", pytest.approx(0.9))
        assert (scores.mean, scores.percent) == (16.0, False)

    def test_where_the_base_is_no_worse(self) -> None:
        scores = Scores({"a": 12.0}, {"a": 10.0}, {"a": 10.0}, {"a": PERPLEXITY})
        assert scores.share_of("a") is scores.share is None

    def test_scores_of_two_kinds_have_no_mean(self) -> None:
        measured = {"a": PERPLEXITY, "b": ACCURACY}
        scores = Scores({"a": 12.0, "b": 0.8}, {"a": 10.0, "b": 0.9}, {"a": 20.0}, measured)
        assert scores.rows()[-1]["score"] is scores.finetuned_mean is None
        assert "mean" not in scores.logged("test")
        assert scores.share == pytest.approx((0.8 + 0.8 / 0.9) / 2)


class TestResampling:
    def test_means_scatter_as_the_standard_error_says(self) -> None:
        generator = torch.Generator().manual_seed(0)
        rows = (torch.rand(400, 2, generator=generator) < torch.tensor([0.8, 0.5])).float()
        found = resampled_means("a", rows)
        assert found.shape == (RESAMPLES, 2)
        wanted = rows.std(0, correction=0) / 400**0.5
        assert torch.allclose(found.std(0).float(), wanted, rtol=0.1)
        low, high = interval(found[:, 0])
        assert low == pytest.approx(float(rows[:, 0].mean() - 1.96 * wanted[0]), abs=0.01)
        assert high == pytest.approx(float(rows[:, 0].mean() + 1.96 * wanted[0]), abs=0.01)

    def test_models_are_drawn_alike(self) -> None:
        """So that the difference of two models that differ in one row is all but certain."""
        rows = (torch.arange(300) % 3 == 0).float()
        other = rows.clone()
        other[1] = 1
        pair = resampled_means("a", torch.stack([rows, other], 1))
        assert torch.equal(pair[:, 0], resampled_means("a", rows[:, None])[:, 0])
        assert float((pair[:, 1] - pair[:, 0]).max()) < 8 / 300
        assert not torch.equal(pair[:, 0], resampled_means("b", rows[:, None])[:, 0])

    def test_against_a_loop(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = torch.tensor([[0.0], [1.0], [4.0]])
        found = resampled_means("a", rows)
        monkeypatch.setattr("fusionkit.tasks.resample._BLOCK", 5)
        import zlib

        generator = np.random.default_rng(zlib.crc32(b"a"))
        drawn = generator.integers(3, size=(RESAMPLES, 3))
        assert np.allclose(found[:, 0].numpy(), rows[:, 0].numpy()[drawn].mean(1))
        assert torch.equal(found, resampled_means("a", rows))  # however many at a time


@pytest.fixture
def tuned(base: TinyNet) -> dict[str, dict[str, Tensor]]:
    return fine_tuned(base)


class TestEvaluated:
    def scores(self, base: TinyNet, tuned: Any, settings: Any = None, **own: Any) -> Scores:
        reuse = module(base, tuned)
        for name, value in own.items():
            setattr(reuse, name, value)
        Trainer(**{**QUIET, **(settings or {})}).test(reuse, datamodule=Mixed(), verbose=False)
        assert reuse.scores is not None
        return reuse.scores

    def test_rows_and_the_rows_own_scores(self, base: TinyNet, tuned: Any) -> None:
        scores = self.scores(base, tuned, metric={"size": "MeanSquaredError"})
        for task in KINDS:
            measured = scores.of(task)
            assert measured.rows == len(measured.row_scores) == 24
            assert float(measured.row_scores.mean()) == pytest.approx(scores.values[task], rel=1e-5)
            low, high = scores.interval(task)
            assert low <= scores.values[task] <= high
        assert scores.limit == ""
        assert self.scores(base, tuned).interval("size") is None  # a correlation is no mean

    def test_other_metrics_beside_the_one_that_counts(self, base: TinyNet, tuned: Any) -> None:
        asked = {"metrics": {"acc": "Accuracy", "f1": "F1Score"}, "counts": "f1"}
        scores = self.scores(base, tuned, metric={"colour": asked})
        assert scores.of("colour").others == {"acc": pytest.approx(scores.values["colour"], abs=1)}
        assert "test/colour/acc" in scores.logged("test")

    def test_limited_runs_say_so(self, base: TinyNet, tuned: Any) -> None:
        scores = self.scores(base, tuned, {"limit_test_batches": 1})
        assert (scores.limit, scores.of("size").rows) == ("limit_test_batches=1", 7)

    def test_a_file_given_back(self, base: TinyNet, tuned: Any, tmp_path: Path) -> None:
        first = self.scores(base, tuned)
        path = tmp_path / "scores.json"
        path.write_bytes(score_file(first, "fine-tuned, uncompressed", None))
        again = self.scores(base, tuned, finetuned_scores=str(path))
        assert again.finetuned == first.values
        assert again.share_of("colour") == 1

        def refused(said: str, change: Any = None, **own: Any) -> None:
            content = json.loads(score_file(first, "fine-tuned, uncompressed", None))
            (change or (lambda _: None))(content)
            path.write_text(json.dumps(content))
            with pytest.raises(DataError, match=said):
                self.scores(base, tuned, finetuned_scores=str(path), **own)

        refused("has no score of task 'size'; it has colour", lambda c: c["tasks"].pop("size"))
        refused(
            "scored by MulticlassAccuracy, and is now scored by M",
            metric={"colour": "MatthewsCorrCoef"},
        )
        refused(r"written by FusionKit 0\.0\.9", lambda c: c.update(fusionkit="0.0.9"))
        refused(
            r"over a part of the rows \(limit=5\), and this", lambda c: c.update(limit="limit=5")
        )
        refused("scores of EMR", lambda c: c.update(codec={"id": "emr"}, model="EMR()"))
        refused("no scores.json of", lambda c: c.clear())
        path.write_text("{")
        with pytest.raises(DataError, match=r"can't be read as a scores\.json"):
            known_scores(path)
