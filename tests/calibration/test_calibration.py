"""Calibration of DBMS: gradients, objectives, what is learned, resuming, what it refuses."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import check_same
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from processes import together
from tiny_net import TASKS, TinyNet
from tiny_tasks import (
    EPOCHS,
    Rows,
    States,
    kl,
    logits,
    model_of,
    module,
    opened,
    rows_of,
    settings,
    trainer,
)
from torch import Tensor, nn

from fusionkit import DBMS, EMR, SVD, Bundle, Calibration, Dense, MagnitudePrune, Merged, calibrate
from fusionkit.calibration.dbms import DBMSCalibration, shifted_weights
from fusionkit.calibration.objective import loss
from fusionkit.calibration.pair_search import PROBES, PairSearch
from fusionkit.errors import BundleError, DataError, FusionKitError
from fusionkit.task_vectors.family import Family
from fusionkit.tasks.classification import Classification
from fusionkit.tasks.reweighted import Reweighted


@pytest.fixture
def calibrator(base: TinyNet, finetuned: States) -> DBMSCalibration:
    """One over SVD, whose delta is smooth in the shift."""
    reuse = module(base, finetuned, DBMS(SVD(rank=2, dtype="fp32"), Merged(dtype="fp32")))
    found: DBMSCalibration = opened(DBMSCalibration, reuse)
    return found


def loss_at(calibrator: DBMSCalibration, pair: tuple[float, float], encode: bool) -> float:
    """A task's loss at a pair of scalars, with the codes as they are or made anew."""
    if encode:
        calibrator.encode([pair] * len(TASKS))
    with torch.no_grad():
        return float(calibrator.loss_of(1, torch.tensor(pair), rows_of("bee"), 0))


def gradient_at(calibrator: DBMSCalibration, pair: tuple[float, float]) -> Tensor:
    leaf = torch.tensor(pair, requires_grad=True)
    (gradient,) = torch.autograd.grad(calibrator.loss_of(1, leaf, rows_of("bee"), 0), leaf)
    return gradient


class TestGradient:
    def test_formed_weights_are_the_bundles(self, base: TinyNet, finetuned: States) -> None:
        pair = (0.7, 1.4)
        reuse = module(base, finetuned, DBMS(MagnitudePrune(0.2)))
        calibrating = opened(DBMSCalibration, reuse)
        calibrating.encode([pair] * len(TASKS))
        scalars = dict(zip(TASKS, calibrating.shift_and_scale([pair] * len(TASKS)), strict=True))
        bundle = reuse.compress(codec=calibrating.codec.at(scalars))
        for place, task in enumerate(TASKS):
            state = bundle.state_dict(task)
            like = {name: state[name] for name in calibrating.family.names("delta")}
            of = calibrating._directions(place, torch.device("cpu"))
            check_same(
                shifted_weights(torch.tensor(scalars[task]), reuse.base_weights, like, of), like
            )

    def test_with_the_codes_as_they_are(self, calibrator: DBMSCalibration) -> None:
        """Exact derivatives of θ₀ + α u + β D, D a constant, against finite differences."""
        calibrator.encode([(0.4, 1.0)] * len(TASKS))
        found = gradient_at(calibrator, (0.4, 1.3))
        step = 1e-2
        for axis in range(2):
            around = [[0.4, 1.3], [0.4, 1.3]]
            around[0][axis] += step
            around[1][axis] -= step
            up, down = (loss_at(calibrator, (a, b), encode=False) for a, b in around)
            assert float(found[axis]) == pytest.approx((up - down) / (2 * step), rel=0.02, abs=1e-4)

    def test_through_the_codes(self, calibrator: DBMSCalibration) -> None:
        """With ∂D/∂α from the encoding before, the derivative of the re-encoded loss."""
        step = 0.02
        up, down = (loss_at(calibrator, (0.4 + s, 1.3), encode=True) for s in (step, -step))
        wanted = (up - down) / (2 * step)
        calibrator.encode([(0.4 - step, 1.0)] * len(TASKS))
        calibrator.encode([(0.4, 1.0)] * len(TASKS))
        found = float(gradient_at(calibrator, (0.4, 1.3))[0])
        assert found == pytest.approx(wanted, rel=0.1, abs=1e-3)
        frozen = loss_at(calibrator, (0.4 + step, 1.3), encode=False)
        assert abs((frozen - loss_at(calibrator, (0.4, 1.3), encode=False)) / step - wanted) > 0.01

    def test_of_a_mask(self, base: TinyNet, finetuned: States) -> None:
        """Where pruning keeps an entry, the shift cancels: ∂D/∂α = −M ⊙ u."""
        inner = MagnitudePrune(0.1, dtype="fp32")
        reuse = module(base, finetuned, DBMS(inner, Merged(dtype="fp32")))
        calibrating = opened(DBMSCalibration, reuse)
        calibrating.encode([(0.1, 1.0)] * len(TASKS))
        calibrating.encode([(0.12, 1.0)] * len(TASKS))
        of = calibrating._directions(0, torch.device("cpu"))
        checked = 0
        for name in calibrating.family.names("delta"):
            u, delta, moved = of.shift(name), of.delta(name), of.moved(name)
            if u is None or delta is None or moved is None:
                continue
            stays = (delta != 0) & (calibrating._deltas[-2].delta(0, name, delta.shape) != 0)
            torch.testing.assert_close(moved[stays], -u[stays], rtol=1e-2, atol=1e-3)
            checked += int(stays.sum())
        assert checked > 10

    def test_nothing_else_gets_gradients(self, base: TinyNet, finetuned: States) -> None:
        seen: dict[str, Any] = {}

        class Look(Callback):
            def on_train_batch_end(
                self, trainer: Trainer, module: LightningModule, *_: Any
            ) -> None:
                (group,) = trainer.optimizers[0].param_groups
                seen["optimised"] = [tuple(parameter.shape) for parameter in group["params"]]
                grads = {n for n, p in module.named_parameters() if p.grad is not None}
                seen["graded"] = seen.get("graded", set()) | grads

        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        reuse = module(base, finetuned)
        calibrate(reuse, Rows(), settings=settings(), trainer=trainer(callbacks=[Look()]))
        assert seen == {"optimised": [(6,)], "graded": {"scalars"}}
        assert all(parameter.requires_grad for parameter in base.parameters())  # as it was
        reuse.switch(None)
        check_same(base.state_dict(), before)


class TestObjective:
    @pytest.mark.parametrize("objective", ["outputs", "features", "labels"])
    def test_what_is_recorded_is_the_bundles_loss(
        self, base: TinyNet, finetuned: States, tmp_path: Path, objective: str
    ) -> None:
        codec = DBMS(SVD(rank=1))
        reuse = module(base, finetuned, codec)
        how = settings(objective=objective)
        calibrate(reuse, Rows(), tmp_path / "b", settings=how, trainer=trainer())
        bundle = Bundle(tmp_path / "b", base)
        plain = module(base, finetuned, codec.codec).compress()

        def found(state: Mapping[str, Tensor], task: str) -> float:
            tokens, labels = rows_of(task)
            if objective == "labels":
                return float(nn.functional.cross_entropy(logits(state, tokens), labels))
            if objective == "outputs":
                return kl(logits(finetuned[task], tokens), logits(state, tokens))
            features = []
            for model in (model_of(finetuned[task]), model_of(state)):
                model.head = nn.Identity()  # type: ignore[assignment]
                with torch.no_grad():
                    features.append(model(tokens))
            wanted, ours = features
            return float(((ours - wanted).square().sum(1) / wanted.square().sum(1)).mean())

        for task, record in bundle.manifest.tasks.items():
            learned = record.calibration
            assert learned is not None
            assert learned.loss_after <= learned.loss_before
            assert learned.loss_after == pytest.approx(
                found(bundle.state_dict(task), task), rel=1e-3, abs=1e-6
            )
            assert learned.loss_before == pytest.approx(
                found(plain.state_dict(task), task), rel=1e-3, abs=1e-6
            )
            assert (learned.rows, learned.seed, learned.objective) == (16, 0, objective)
            assert 1 <= learned.epochs <= EPOCHS
        assert any(
            record.calibration.loss_after < 0.8 * record.calibration.loss_before  # type: ignore[union-attr]
            for record in bundle.manifest.tasks.values()
        )

    def test_rows_and_their_seed(self, base: TinyNet, finetuned: States) -> None:
        first, again, other = (
            calibrate(
                module(base, finetuned), Rows(), settings=settings(seed=s), trainer=trainer(8)
            )
            for s in (0, 0, 5)
        )
        pairs = [
            [(r.calibration.shift, r.calibration.loss_before) for r in b.manifest.tasks.values()]  # type: ignore[union-attr]
            for b in (first, again, other)
        ]
        assert pairs[0] == pairs[1]
        assert pairs[0] != pairs[2]
        wanted = kl(
            *(
                logits(s, rows_of("bee", seed=5)[0])
                for s in (
                    finetuned["bee"],
                    module(base, finetuned, MagnitudePrune(0.1)).compress().state_dict("bee"),
                )
            )
        )
        assert pairs[2][1][1] == pytest.approx(wanted, rel=1e-3)

    def test_losses_by_hand(self) -> None:
        a, b = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 1.0]])
        task, rows = Classification(2), (a, torch.tensor([1]))
        identity = nn.Sequential(nn.Identity())
        model = Reweighted(identity)
        assert float(loss(model, rows, task, b, None)) == pytest.approx(kl(b, a))
        assert float(loss(model, rows, task, b, "0")) == pytest.approx((1 + 4) / (4 + 1))
        wanted = -math.log(math.exp(3) / (math.e + math.exp(3)))
        assert float(loss(model, rows, task, None, None)) == pytest.approx(wanted)


class TestTraining:
    def test_search_needs_no_gradients(self, base: TinyNet, finetuned: States) -> None:
        class NoGradients(TinyNet):
            def forward(self, tokens: Tensor) -> Tensor:
                assert not torch.is_grad_enabled()
                return super().forward(tokens)

        reuse = module(_like(NoGradients().eval(), base), finetuned)
        how = settings(method="search")
        bundle = calibrate(reuse, Rows(), settings=how, trainer=trainer(20))
        run = trainer(len(PROBES))
        probed = calibrate(module(base, finetuned), Rows(), settings=settings(), trainer=run)
        for task in TASKS:
            learned = bundle.manifest.tasks[task].calibration
            at_probes = probed.manifest.tasks[task].calibration
            assert learned and at_probes  # noqa: PT018
            assert learned.method == "search"
            assert learned.loss_after <= at_probes.loss_after + 1e-6

    def test_a_joint_codec(self, base: TinyNet, finetuned: States) -> None:
        """EMR elects one vector from all tasks' residuals: what is kept is still no worse."""
        bundle = calibrate(
            module(base, finetuned, DBMS(EMR())), Rows(), settings=settings(), trainer=trainer()
        )
        for task in TASKS:
            learned = bundle.manifest.tasks[task].calibration
            assert learned
            assert learned.loss_after <= learned.loss_before + 1e-6
            tokens, _ = rows_of(task)
            found = kl(logits(finetuned[task], tokens), logits(bundle.state_dict(task), tokens))
            assert learned.loss_after == pytest.approx(found, rel=1e-3, abs=1e-6)

    @pytest.mark.parametrize("method", ["gradient", "search"])
    def test_resumed_is_as_if_never_interrupted(
        self, base: TinyNet, finetuned: States, tmp_path: Path, method: str
    ) -> None:
        def run(folder: Path, epochs: int, ckpt_path: str | None = None) -> None:
            checkpoints = ModelCheckpoint(
                tmp_path / "ckpt", save_last=True, enable_version_counter=False
            )
            run = trainer(epochs, callbacks=[checkpoints], enable_checkpointing=True)
            calibrate(
                module(base, finetuned),
                Rows(),
                folder,
                settings=settings(method=method),
                trainer=run,
                ckpt_path=ckpt_path,
            )

        run(tmp_path / "whole", EPOCHS)
        for stop in (3, len(PROBES) + 2):
            run(tmp_path / f"part{stop}", stop)
            last = tmp_path / "ckpt/last.ckpt"
            assert last.stat().st_size < 20_000  # scalars, not weights
            run(tmp_path / f"again{stop}", EPOCHS, str(last))
            for path in (tmp_path / "whole").iterdir():
                assert path.read_bytes() == (tmp_path / f"again{stop}" / path.name).read_bytes()
        assert (tmp_path / "whole/manifest.json").read_bytes() != (
            tmp_path / "part3/manifest.json"
        ).read_bytes()
        with pytest.raises(FusionKitError, match="of another calibration"):
            calibrate(
                module(base, finetuned),
                Rows(),
                settings=settings(method=method, rows=9),
                trainer=trainer(),
                ckpt_path=str(tmp_path / "ckpt/last.ckpt"),
            )

    def test_patience(self, base: TinyNet, finetuned: States) -> None:
        run = trainer(100)
        bundle = calibrate(
            module(base, finetuned, DBMS(Dense("fp32"))),
            Rows(),
            settings=settings(patience=2),
            trainer=run,
        )
        assert run.current_epoch <= len(PROBES) + 4
        for task in TASKS:  # nothing is lost, so nothing can be learned
            learned = bundle.manifest.tasks[task].calibration
            assert learned
            assert learned.loss_after <= 1e-6

    def test_lightnings_early_stopping(self, base: TinyNet, finetuned: States) -> None:
        stop = EarlyStopping("calibration/loss", stopping_threshold=1e3)
        run = trainer(callbacks=[stop])
        bundle = calibrate(module(base, finetuned), Rows(), settings=settings(), trainer=run)
        learned = bundle.manifest.tasks["ant"].calibration
        assert learned
        assert learned.epochs == 1
        assert (learned.shift, learned.scale) == (0, 1)

    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
    def test_precision(self, base: TinyNet, finetuned: States, precision: Any) -> None:
        bundle = calibrate(
            module(base, finetuned),
            Rows(),
            settings=settings(),
            trainer=trainer(precision=precision),
        )
        for task in TASKS:
            learned = bundle.manifest.tasks[task].calibration
            assert learned
            assert learned.loss_after <= learned.loss_before

    def test_two_processes(self, tmp_path: Path) -> None:
        """Rows over two processes: the losses of all of them, and one bundle."""
        calibrated(0, 1, tmp_path)
        together(2, calibrated, tmp_path)
        one, two = (Bundle(tmp_path / str(devices)).manifest.tasks for devices in (1, 2))
        for task in TASKS:
            a, b = one[task].calibration, two[task].calibration
            assert a
            assert b
            assert b.loss_before == pytest.approx(a.loss_before, rel=1e-4)
            assert b.loss_after == pytest.approx(a.loss_after, rel=0.05, abs=1e-4)
            assert b.scale == pytest.approx(a.scale, rel=0.05)
            assert a.rows == b.rows == 15  # which two processes do not share evenly


class Fragile(TinyNet):
    """Overflows where its weights are far from the base's."""

    limit = math.inf

    def forward(self, tokens: Tensor) -> Tensor:
        size = self.hidden.weight.abs().max()
        return super().forward(tokens) / (size < self.limit).to(torch.float32) * 1.0


class TestRefusals:
    def test_a_loss_that_is_nan(
        self, base: TinyNet, finetuned: States, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = module(base, finetuned, MagnitudePrune(0.1)).compress()
        largest = max(float(plain.state_dict(t)["hidden.weight"].abs().max()) for t in TASKS)
        tuned = max(float(finetuned[t]["hidden.weight"].abs().max()) for t in TASKS)
        monkeypatch.setattr(Fragile, "limit", max(largest, tuned) * 1.02)
        reuse = module(_like(Fragile().eval(), base), finetuned)
        bundle = calibrate(reuse, Rows(), settings=settings(), trainer=trainer())
        for task in TASKS:
            learned = bundle.manifest.tasks[task].calibration
            assert learned
            assert learned.loss_after <= learned.loss_before
            assert float(bundle.state_dict(task)["hidden.weight"].abs().max()) < Fragile.limit
        monkeypatch.setattr(Fragile, "limit", 0.0)
        with pytest.raises(
            DataError, match="calibration loss of task 'ant' is nan before anything"
        ):
            calibrate(
                module(_like(Fragile().eval(), base), finetuned),
                Rows(),
                settings=settings(),
                trainer=trainer(),
            )

    def test_a_task_without_data(
        self, base: TinyNet, finetuned: States, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Family, "__iter__", lambda _: pytest.fail("something ran"))
        with pytest.raises(DataError, match="no calibration data for task 'bee'"):
            calibrate(module(base, finetuned), Rows(("ant", "cat")), trainer=trainer())

    def test_a_codec_without_scalars(self, base: TinyNet, finetuned: States) -> None:
        with pytest.raises(FusionKitError, match=r"has nothing to calibrate; wrap it"):
            calibrate(
                module(base, finetuned, EMR()), Rows(), settings=settings(), trainer=trainer()
            )

    def test_settings(self) -> None:
        for wrong in ({"rows": 0}, {"patience": 0}, {"learning_rate": 0.0}):
            with pytest.raises(FusionKitError, match=next(iter(wrong))):
                Calibration(**wrong)  # type: ignore[arg-type]

    def test_a_bundle_that_is_there(self, base: TinyNet, finetuned: States, tmp_path: Path) -> None:
        module(base, finetuned).compress(tmp_path / "b")
        before = (tmp_path / "b/manifest.json").read_bytes()
        with pytest.raises(BundleError, match="exists"):
            calibrate(
                module(base, finetuned),
                Rows(),
                tmp_path / "b",
                settings=settings(),
                trainer=trainer(1),
            )
        assert (tmp_path / "b/manifest.json").read_bytes() == before
        calibrate(
            module(base, finetuned),
            Rows(),
            tmp_path / "b",
            settings=settings(),
            trainer=trainer(1),
            overwrite=True,
        )
        assert (tmp_path / "b/manifest.json").read_bytes() != before


class TestPairSearch:
    def test_finds_the_valley(self) -> None:
        search = PairSearch(0, 0.3)
        for _ in range(60):
            shift, scale = search.ask()
            search.tell((shift, scale), (shift - 1.3) ** 2 + (scale - 2.5) ** 2)
        assert search.best == pytest.approx((1.3, 2.5), abs=0.1)
        assert [pair for pair, _ in search.told[: len(PROBES)]] == list(PROBES)

    def test_replay(self) -> None:
        search, again = PairSearch(3, 0.3), PairSearch(3, 0.3)
        for _ in range(len(PROBES) + 6):
            pair = search.ask()
            search.tell(pair, sum(pair) if pair[0] < 1 else math.nan)
        again.replay(search.told)
        assert again.ask() == search.ask()


def _like(model: nn.Module, base: nn.Module) -> nn.Module:
    model.load_state_dict(base.state_dict())
    return model


def calibrated(rank: int, devices: int, folder: Path) -> None:
    """A bundle calibrated by one process, or by this and others."""
    run = trainer(devices=devices, strategy="ddp" if devices > 1 else "auto")
    reuse = module(*_family())
    calibrate(reuse, Rows(), folder / str(devices), settings=settings(rows=15), trainer=run)


def _family() -> tuple[TinyNet, States]:
    from tiny_net import perturbed

    torch.manual_seed(0)
    base = TinyNet().eval()
    return base, {task: perturbed(base, place, place + 2) for place, task in enumerate(TASKS)}
