"""One meaning of a task: kinds, metrics by name, and datamodules that nobody changes."""

from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from mixed_tasks import KINDS, QUIET, Mixed, fine_tuned, module, outputs
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef
from tiny_net import TinyNet
from torch import Tensor, nn
from torchmetrics import Metric

import fusionkit
from fusionkit import DBMS, Calibration, Finetune, MagnitudePrune
from fusionkit.errors import DataError, FusionKitError
from fusionkit.tasks import batches
from fusionkit.tasks.classification import Classification
from fusionkit.tasks.kinds import kinds_of
from fusionkit.tasks.metrics import metric_of
from fusionkit.tasks.only import only
from fusionkit.tasks.regression import Regression
from fusionkit.tasks.scores import Scores


@pytest.fixture
def tuned(base: TinyNet) -> dict[str, dict[str, Tensor]]:
    return fine_tuned(base)


class TestRegression:
    """The second kind: nothing that evaluates, calibrates, trains or fuses knows of it."""

    def test_evaluated(self, base: TinyNet, tuned: dict[str, dict[str, Tensor]]) -> None:
        reuse = module(base, tuned)
        Trainer(**QUIET).test(reuse, datamodule=Mixed(), verbose=False)
        assert reuse.scores is not None
        tokens, wanted = Mixed().rows("size")
        said = outputs(base, tuned["size"], tokens)[:, 0]
        by_hand = (pearsonr(said, wanted)[0] + spearmanr(said, wanted)[0]) / 2
        assert reuse.scores.values["size"] == pytest.approx(by_hand, abs=1e-5)
        tokens, labels = Mixed().rows("colour")
        right = outputs(base, tuned["colour"], tokens).argmax(1) == labels
        assert reuse.scores.values["colour"] == pytest.approx(float(right.float().mean()))

    @pytest.mark.parametrize("objective", ["outputs", "labels"])
    def test_calibrated(
        self, base: TinyNet, tuned: dict[str, dict[str, Tensor]], objective: Any
    ) -> None:
        reuse = module(base, tuned, codec=DBMS(MagnitudePrune(0.2)))
        settings = Calibration(objective=objective, rows=24)
        run = Trainer(max_epochs=10, **QUIET)
        bundle = fusionkit.calibrate(reuse, Mixed(), settings=settings, trainer=run)
        learned = bundle.manifest.tasks["size"].calibration
        assert learned
        assert learned.loss_after < learned.loss_before
        tokens, labels = Mixed().rows("size")
        said = outputs(base, bundle.state_dict("size"), tokens)[:, 0]
        wanted = labels if objective == "labels" else outputs(base, tuned["size"], tokens)[:, 0]
        assert learned.loss_after == pytest.approx(float((said - wanted).square().mean()), rel=1e-3)

    def test_fine_tuned(self, base: TinyNet) -> None:
        data = only(Mixed(), ["size"])
        trained = Finetune(base, "size", "full", private=["head.*"], learning_rate=3e-2)
        tokens, wanted = Mixed().rows("size")
        Trainer(max_epochs=30, **QUIET).fit(trained, datamodule=data)
        assert base.head.out_features == 1
        with torch.no_grad():
            said = base.eval()(tokens)[:, 0]
        assert float((said - wanted).square().mean()) < 0.5 * float(wanted.var())

    def test_losses_by_hand(self) -> None:
        said, batch = torch.tensor([[1.0], [3.0]]), (torch.zeros(2), torch.tensor([2.0, 1.0]))
        assert float(Regression().loss(said, batch)) == pytest.approx((1 + 4) / 2)
        assert float(Regression().divergence(said, torch.tensor([0.0, 3.0]))) == pytest.approx(0.5)


class TestMetrics:
    def scores(self, base: nn.Module, tuned: Any, metric: Any) -> dict[str, float]:
        reuse = module(base, tuned, metric=metric)
        Trainer(**QUIET).test(reuse, datamodule=Mixed(), verbose=False)
        assert reuse.scores is not None
        return reuse.scores.values

    def test_by_name_with_arguments_for_each_task_its_own(
        self, base: TinyNet, tuned: dict[str, dict[str, Tensor]]
    ) -> None:
        """Against scikit-learn and SciPy."""
        tokens, labels = Mixed().rows("colour")
        said = outputs(base, tuned["colour"], tokens).argmax(1)
        macro = {"class_path": "F1Score", "init_args": {"average": "macro"}}
        found = self.scores(base, tuned, {"colour": macro, "size": "PearsonCorrCoef"})
        assert found["colour"] == pytest.approx(f1_score(labels, said, average="macro"), abs=1e-5)
        tokens, wanted = Mixed().rows("size")
        by_hand = pearsonr(outputs(base, tuned["size"], tokens)[:, 0], wanted)[0]
        assert found["size"] == pytest.approx(by_hand, abs=1e-5)
        found = self.scores(base, tuned, {"colour": "MatthewsCorrCoef"})
        assert found["colour"] == pytest.approx(matthews_corrcoef(labels, said), abs=1e-5)

    def test_of_two_classes_yes_and_no(self) -> None:
        """What GLUE calls F1 is that of the second class."""
        logits, labels = torch.randn(50, 2), torch.randint(0, 2, (50,))
        binary = {"class_path": "F1Score", "init_args": {"task": "binary"}}
        metric = metric_of(binary, "mrpc", Classification(2))
        Classification(2).update(metric, logits, (None, labels))
        assert float(metric.compute()) == pytest.approx(f1_score(labels, logits.argmax(1)))

    def test_a_function_of_the_number_of_classes(self) -> None:
        def errors(classes: int) -> Metric:
            return 1 - Classification(classes).metric()

        metric = metric_of(errors, "ant", Classification(2))
        Classification(2).update(metric, torch.eye(2), (None, torch.tensor([0, 0])))
        assert float(metric.compute()) == 0.5

    @pytest.mark.parametrize(
        ("metric", "said"),
        [
            ("MatthewCorrCoef", "did you mean MatthewsCorrCoef"),
            ({"class_path": "F1Score", "init_args": {"averge": 1}}, "F1Score of task 'colour'"),
            ({"color": "Accuracy"}, "no task 'color'; there is colour, size"),
            ("torch.nn.Linear", "Linear"),
            (
                {"class_path": "F1Score", "init_args": None, "dict_kwargs": {"x": 1}},
                "can't be made",
            ),
            ({"class_path": None}, "no metric 'None'"),
        ],
    )
    def test_refused_before_anything_runs(
        self, base: TinyNet, tuned: dict[str, dict[str, Tensor]], metric: Any, said: str
    ) -> None:
        with pytest.raises(FusionKitError, match=said):
            self.scores(base, tuned, metric)

    def test_an_error_has_a_share_where_the_base_is_known(
        self, base: TinyNet, tuned: dict[str, dict[str, Tensor]]
    ) -> None:
        own = {"colour": 1.0, "size": 0.5}
        reuse = module(base, tuned, metric={"size": "MeanSquaredError"}, finetuned_scores=own)
        Trainer(**QUIET).test(reuse, datamodule=Mixed(), verbose=False)
        assert reuse.scores is not None
        assert reuse.scores.lower == {"size"}
        assert reuse.scores.share_of("size") is reuse.scores.share is None
        assert reuse.scores.share_of("colour") == reuse.scores.values["colour"]
        error, reuse.base_scores = reuse.scores.values["size"], {"colour": 0.3, "size": 100.5}
        Trainer(**QUIET).test(reuse, datamodule=Mixed(), verbose=False)
        shares = {task: reuse.scores.share_of(task) for task in KINDS}
        assert shares["size"] == pytest.approx((100.5 - error) / (100.5 - 0.5))
        assert reuse.scores.share == pytest.approx((shares["colour"] + shares["size"]) / 2)

    def test_one_that_is_for_something_else(
        self, base: TinyNet, tuned: dict[str, dict[str, Tensor]]
    ) -> None:
        with pytest.raises(FusionKitError, match=r"'colour', PearsonCorrCoef, is not for what"):
            self.scores(base, tuned, {"colour": "PearsonCorrCoef"})

    def test_a_score_is_one_number(
        self, base: TinyNet, tuned: dict[str, dict[str, Tensor]]
    ) -> None:
        none = {"colour": {"class_path": "Accuracy", "init_args": {"average": "none"}}}
        with pytest.raises(FusionKitError, match=r"'colour'.* more than one number"):
            self.scores(base, tuned, none)


class TestKinds:
    def test_what_is_known_of_a_task(self) -> None:
        data = Mixed()
        assert kinds_of(data, ["size", "colour"]) == {
            "size": Regression(),
            "colour": Classification(3),
        }
        assert kinds_of(data, ["size"], {"size": 4}) == {"size": Classification(4)}
        with pytest.raises(DataError, match="'taste' is not known: give it in `num_classes`"):
            kinds_of(data, ["taste"])
        assert kinds_of(data, ["taste"], scored=False) == {"taste": Classification(None)}


class TestOnly:
    def test_some_tasks_in_the_order_asked_for(self) -> None:
        data = Mixed()
        own = only(data, ["size"])
        (loader,) = own.test_dataloader()
        assert torch.equal(loader.dataset.tensors[1], data.rows("size")[1])
        assert (own.tasks, data.tasks) == (["size"], ["colour", "size"])
        assert [len(each.dataset) for each in only(data, ["size", "colour"]).train_dataloader()]
        assert only(data, ["colour", "size"]) is data

    def test_what_a_datamodule_lacks_stays_lacking(self) -> None:
        from lightning.pytorch.utilities.model_helpers import is_overridden

        own = only(Mixed(), ["size"])
        assert is_overridden("test_dataloader", own)
        assert not is_overridden("val_dataloader", own)

    def test_its_hooks_are_the_datamodules(self, base: TinyNet) -> None:
        """Where rows are made ready on the device, say; and what its `setup` finds out."""
        seen: list[Any] = []

        class Hooked(Mixed):
            def setup(self, stage: str) -> None:
                self.kinds = {**KINDS, "size": Regression()}
                seen.append((stage, self.trainer is not None))

            def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
                seen.append(len(batch[0][0]) if isinstance(batch[0], list) else len(batch[0]))
                return batch

            def teardown(self, stage: str) -> None:
                seen.append(stage)

        own = only(Hooked(), ["size"])
        trained = Finetune(base, "size", "full", private=["head.*"])
        Trainer(max_epochs=1, **QUIET).fit(trained, datamodule=own)
        assert seen == [("fit", True), 7, 7, 7, 3, "fit"]

    def test_calibration_rows_go_through_the_hooks_task_by_task(
        self, base: TinyNet, tuned: dict[str, dict[str, Tensor]]
    ) -> None:
        seen: set[tuple[int, torch.dtype]] = set()

        class Hooked(Mixed):
            def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
                seen.add((dataloader_idx, batch[1].dtype))
                return batch

        reuse = module(base, tuned, codec=DBMS(MagnitudePrune(0.2)))
        run = Trainer(max_epochs=2, **QUIET)
        fusionkit.calibrate(reuse, Hooked(), settings=Calibration(rows=14), trainer=run)
        assert seen == {(0, torch.int64), (1, torch.float32)}

    def test_a_task_that_is_not_there(self) -> None:
        with pytest.raises(DataError, match="no data for task 'taste'; there is colour, size"):
            only(Mixed(), ["taste"])


def test_rows_of_a_batch() -> None:
    nested = {"text": {"ids": torch.arange(6).view(3, 2)}, "labels": torch.arange(3), "name": "x"}
    assert batches.count(nested) == 3
    cut = batches.first(nested, 2, of=3)
    assert cut["text"]["ids"].tolist() == [[0, 1], [2, 3]]
    assert (cut["labels"].tolist(), cut["name"]) == ([0, 1], "x")
    assert batches.same(nested, {**nested, "labels": torch.arange(3)})
    assert not batches.same(nested, {**nested, "labels": torch.arange(1, 4)})
    pair = batches.first((torch.ones(4), np.ones(4), torch.zeros(4)), 1, of=4)
    assert [len(each) for each in pair] == [1, 4, 1]
    weighted = batches.first((torch.ones(4), torch.zeros(4), torch.tensor(0.5)), 2, of=4)
    assert [each.numel() for each in weighted] == [2, 2, 1]


class TestScores:
    def test_shares(self) -> None:
        scores = Scores({"a": 0.4, "b": 0.2}, {"a": 0.5, "b": 0.0})
        assert scores.share_of("a") == pytest.approx(0.8)
        assert scores.share_of("b") is None  # of nothing there is no share
        assert scores.share == pytest.approx(0.3 / 0.25)
        assert scores.rows()[-1]["finetuned"] == pytest.approx(0.25)

    def test_where_all_is_lost(self) -> None:
        mean = Scores({"a": 0.0}, {"a": 0.5}).rows()[-1]
        assert (mean["score"], mean["finetuned"], mean["share"]) == (0.0, 0.5, 0.0)
        assert Scores({"a": 0.0}, {"a": 0.0}).share is None
        assert Scores({"a": 0.5}, {"b": 0.5}).finetuned_mean is None
