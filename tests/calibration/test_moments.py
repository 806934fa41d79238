"""What the outputs feel: closed forms, every kind of tensor, and where it moves bits."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from peft import PeftModel
from processes import together
from tiny_net import TASKS, TinyNet, perturbed
from tiny_tasks import PRIVATE, Rows, States, module, rows_of, settings, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers.pytorch_utils import Conv1D

from fusionkit import DBMS, Bundle, Calibration, ReuseModule, Sketch, calibrate
from fusionkit.bundles.compress import temporary_bundle
from fusionkit.bundles.export_peft import export_adapter
from fusionkit.calibration import moments, token_moments
from fusionkit.calibration.data import CalibrationData
from fusionkit.calibration.moments import Felt, felt
from fusionkit.calibration.token_moments import TokenMoments
from fusionkit.errors import DataError
from fusionkit.task_vectors.family import Family
from fusionkit.tasks.classification import Classification
from fusionkit.tasks.kinds import kinds_of


def told(reuse: ReuseModule, rows: int = 16) -> Felt:
    family = reuse.family()
    kinds = [kinds_of(Rows(), list(TASKS))[task] for task in family.tasks]
    return felt(reuse, family, kinds, lambda t: [rows_of(t, rows)], settings(rows=rows), True)


def moved(model: nn.Module, size: float = 0.1) -> dict[str, Tensor]:
    state = model.state_dict().items()
    return {n: t + size * torch.randn_like(t) if t.is_floating_point() else t for n, t in state}


def test_of_a_linear_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """W's is the rows' mean square, b's is 1, whatever the weights are."""
    monkeypatch.setattr(moments, "_DRAWS", 100)
    base = nn.Linear(48, 8)
    reuse = ReuseModule(base, finetuned={"a": moved(base)})
    rows = 3 * torch.randn(64, 48)
    batches = [(half, torch.zeros(32, dtype=torch.int64)) for half in rows.split(32)]
    found = felt(
        reuse, reuse.family(), [Classification(8)], lambda _: batches, Calibration()
    ).sensitivities["a"]
    assert found["weight"] == pytest.approx(float(rows.square().mean()), rel=0.03)
    assert found["bias"] == pytest.approx(1, rel=0.1)


class Unused(TinyNet):
    """With a tensor that nothing depends on."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__(classes)
        self.unused = nn.Parameter(torch.randn(4, 4))


class Mixture(nn.Module):
    """Two experts in a stack; what comes out is read by a tied head, too."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.experts = nn.Parameter(0.5 * torch.randn(2, 6, 6))
        self.read = nn.Linear(6, 11, bias=False)
        self.read.weight = self.embed.weight
        self.head = nn.Linear(11, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens).mean(1)
        mixed = torch.einsum("eoi,bi->bo", self.experts, hidden).tanh()
        return self.head(self.read(mixed))


@pytest.mark.parametrize("kind", [Unused, Mixture], ids=["tied, convolution", "stack of experts"])
def test_of_any_model(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the gradients of all rows and outputs, one by one."""
    monkeypatch.setattr(moments, "_DRAWS", 600)
    base = kind().eval()
    tuned = {"bee": copy.deepcopy(base)}
    tuned["bee"].head = nn.Linear(11, 3)
    tuned["bee"].load_state_dict(moved(tuned["bee"]))
    reuse = ReuseModule(base, finetuned={t: m.state_dict() for t, m in tuned.items()},
                        private=PRIVATE)  # fmt: skip
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    found = told(reuse, 8).sensitivities["bee"]
    tokens, _ = rows_of("bee", 8)
    parameters = dict(tuned["bee"].named_parameters())
    wanted = dict.fromkeys(found, 0.0)
    for output in tuned["bee"](tokens).flatten():
        gradients = torch.autograd.grad(
            output, [*parameters.values()], retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(parameters, gradients, strict=True):
            stack = gradient if gradient is not None and name == "experts" else None
            each = {name: gradient} if stack is None else {f"{name}[{i}]": stack[i] for i in (0, 1)}
            for own, part in each.items():
                if own in wanted and part is not None:
                    wanted[own] += float(part.square().sum()) / 8 / part.numel()
    assert found == pytest.approx(wanted, rel=0.15)
    assert found.get("unused", 0) == 0
    assert sum(value > 0 for value in found.values()) >= 3
    assert all(torch.equal(base.state_dict()[name], t) for name, t in before.items())
    assert all(parameter.grad is None for parameter in base.parameters())


def test_gradients_that_are_not_finite_are_refused() -> None:
    class Root(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return (super().forward(x) * 0).sqrt()

    base = Root(4, 2)
    reuse = ReuseModule(base, finetuned={"a": moved(base)})
    batch = torch.randn(3, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(DataError, match="of task 'a' is not finite in 'weight'; look at its rows"):
        felt(reuse, reuse.family(), [Classification(2)], lambda _: [batch], Calibration())


def layers(seed: int = 0) -> tuple[nn.Module, Tensor]:
    """Two linear layers, and rows that are padded: the mask takes them out of the mean."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            shown = x[..., :1] > -9
            return (self.down(self.up(x).tanh()) * shown).sum(1)

    rows = torch.randn(40, 5, 12) * torch.linspace(0.2, 3, 12)
    rows[:, 3:] = -10
    return Masked(), rows


def test_moments_are_those_of_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against gradients of all outputs at every token, one by one; padding counts for nothing."""
    monkeypatch.setattr(moments, "_DRAWS", 600)
    base, rows = layers()
    batches = [(half, torch.zeros(20, dtype=torch.int64)) for half in rows.split(20)]
    reuse = ReuseModule(base, finetuned={"a": moved(base, 0.0)})
    kinds = [Classification(6)]
    found = felt(reuse, reuse.family(), kinds, lambda _: batches, settings(rows=40), True)
    hidden: Any = base.up(rows).detach().requires_grad_()
    tokens = {"up.weight": rows, "down.weight": hidden.tanh().detach()}
    said = base.down(hidden.tanh())
    shown = (rows[..., :1] > -9).float()
    at_hidden = torch.stack(
        [torch.autograd.grad((said * shown)[..., i].sum(), hidden, retain_graph=True)[0]
         for i in range(6)]
    )  # fmt: skip
    at_said = torch.eye(6)[:, None, None] * shown
    for name, gradients in ("up.weight", at_hidden), ("down.weight", at_said):
        x, g = tokens[name].flatten(0, 1), gradients.flatten(1, 2)
        of_inputs = torch.einsum("ktg,tx,ty->xy", g.square(), x, x)
        of_outputs = torch.einsum("tx,ktg,kth->gh", x.square(), g, g)
        damping = token_moments._DAMPING
        for factor, wanted in zip(found.moments["a"][name], (of_outputs, of_inputs), strict=True):
            assert factor is not None
            unit = torch.eye(len(wanted))
            damped = (wanted / wanted.trace() * len(wanted) + damping * unit) / (1 + damping)
            assert (factor @ factor.mT - damped).norm() < 0.05 * damped.norm()
            assert torch.equal(factor, factor.tril())


def test_layers_that_keep_their_weights_transposed_have_the_others_moments() -> None:
    plain, turned = nn.Linear(12, 6), Conv1D(6, 12)
    turned.load_state_dict({"weight": plain.weight.detach().mT, "bias": plain.bias.detach()})
    batch = torch.randn(40, 12), torch.zeros(40, dtype=torch.int64)
    found = []
    for model in (plain, turned):
        reuse = ReuseModule(model, finetuned={"a": moved(model, 0.0)})
        kinds = [Classification(6)]
        of_model = felt(reuse, reuse.family(), kinds, lambda _: [batch], Calibration(), True)
        found.append(of_model.moments["a"]["weight"])
    for one, other in zip(found[0], reversed(found[1]), strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, atol=1e-5)


def test_only_what_a_layer_alone_has_is_known() -> None:
    """Of the tiny net not the convolution, nor the embedding that the decoder shares."""
    base = TinyNet().eval()
    reuse = module(base, {task: perturbed(base, i, i + 2) for i, task in enumerate(TASKS)})
    assert {tuple(own) for own in told(reuse).moments.values()} == {("hidden.weight",)}
    assert not any(layer._forward_hooks for layer in base.modules())


def test_long_sides_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of more than a limit; and the longest, where all together are more than another."""
    leaves = {"a": torch.empty(10, 30), "b": torch.empty(20, 5)}
    sides = {("b", 1), ("a", 0), ("b", 0), ("a", 1)}
    assert TokenMoments(leaves, 1)._sides.keys() == sides
    monkeypatch.setattr(token_moments, "_LONGEST", 20)
    assert TokenMoments(leaves, 1)._sides.keys() == sides - {("a", 1)}
    monkeypatch.setattr(token_moments, "_MOST", 3 * (25 + 100) + 100)
    assert TokenMoments(leaves, 3)._sides.keys() == sides - {("a", 1), ("b", 0)}
    assert TokenMoments(leaves, 3, frozenset("a"))._sides.keys() == {("b", 1)}


class Branches(nn.Module):
    """Two matrices alike; what one of them says is heard a tenth as loudly."""

    def __init__(self) -> None:
        super().__init__()
        self.loud = nn.Linear(160, 128, bias=False)
        self.soft = nn.Linear(160, 128, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.loud(x) + self.soft(x) / 10


def test_bits_go_where_they_are_felt() -> None:
    """By the root of what is felt, which lowers the outputs' error at the same size."""
    base = Branches()
    tuned = {"a": moved(base, 0.003)}
    rows = torch.randn(200, 160)
    wanted = copy.deepcopy(base)
    wanted.load_state_dict(tuned["a"])
    errors, shares = dict.fromkeys((False, True), 0.0), {}
    for told in (False, True):
        for seed in range(4):
            family = Family(base, tuned)
            if told:
                family.sensitivities = {"a": {"loud.weight": 1.0, "soft.weight": 0.01}}
            bundle = temporary_bundle(family, Sketch(bits=0.8, seed=seed))
            nbytes = (bundle.path / "task-a.safetensors").stat().st_size
            assert 0.9 * 0.8 < (8 * nbytes / 40_960) / 0.9 <= 0.8  # a tenth is the manifest's
            model = copy.deepcopy(base)
            model.load_state_dict(bundle.state_dict("a"))
            errors[told] += float((model(rows) - wanted(rows)).square().mean())
        sizes = [len(bundle.task_parts("a", f"{n}.weight")["codes"]) for n in ("loud", "soft")]
        shares[told] = sizes[0] / sizes[1]
    assert shares[False] == pytest.approx(1, abs=0.1)
    assert shares[True] == pytest.approx(10, rel=0.1)
    assert errors[True] < 0.7 * errors[False]


def test_what_is_felt_alike_changes_nothing() -> None:
    base = Branches()
    tuned = {"a": moved(base)}
    plain, told, unheard = (Family(base, tuned) for _ in range(3))
    told.sensitivities = {"a": dict.fromkeys(told.sizes, 3.0)}
    unheard.sensitivities = {"a": dict.fromkeys(told.sizes, 0.0)}
    bundles = [temporary_bundle(each, Sketch(bits=0.8)) for each in (plain, told, unheard)]
    files = [(bundle.path / "task-a.safetensors").read_bytes() for bundle in bundles]
    assert files[0] == files[1] == files[2]


class Scaled(LightningDataModule):
    """Rows that become what the model takes on their way to the device."""

    tasks = ("a",)

    def train_dataloader(self) -> list[DataLoader[Any]]:
        rows = TensorDataset(torch.randn(64, 160), torch.zeros(64, dtype=torch.int64))
        return [DataLoader(rows, batch_size=16)]

    def on_after_batch_transfer(self, batch: Any, place: int) -> Any:
        return 5 * batch[0], batch[1]


def test_rows_come_through_the_datamodules_hooks() -> None:
    data = CalibrationData(Scaled(), 32, 0)
    batches: Iterator[Any] = data.batches("a", torch.device("cpu"))
    rows = torch.cat([each for each, _ in batches])
    assert rows.shape == (32, 160)
    assert float(rows.std()) == pytest.approx(5, rel=0.05)


@pytest.mark.parametrize("codec", [Sketch(bits=1.0), DBMS(Sketch(bits=1.0))], ids=repr)
def test_calibration_places_bits(codec: Any) -> None:
    """Within DBMS as alone; and what is compressed without data stays as it was."""
    base = Branches()
    reuse = ReuseModule(base, finetuned={"a": moved(base)}, codec=codec)
    bundles = {"plain": reuse.compress()}
    bundles["calibrated"] = calibrate(reuse, Scaled(), trainer=trainer(4))
    ratios = {}
    for name, bundle in bundles.items():
        sizes = []
        for tensor in ("loud.weight", "soft.weight"):
            parts = bundle.task_parts("a", tensor)
            sizes.append(sum(len(t) for part, t in parts.items() if part.endswith("codes")))
        ratios[name] = sizes[0] / sizes[1]
    assert ratios["plain"] == pytest.approx(1, abs=0.1)
    assert ratios["calibrated"] > 4


def calibrated(rank: int, count: int, folder: Path) -> None:
    torch.manual_seed(0)
    base = TinyNet().eval()
    tuned: States = {task: perturbed(base, i, i + 2) for i, task in enumerate(TASKS)}
    run = trainer(2, devices=count, strategy="ddp" if count > 1 else "auto")
    reuse = module(base, tuned, Sketch(bits=80.0))
    calibrate(reuse, Rows(), folder / str(count), settings=settings(rows=15), trainer=run)


@pytest.mark.slow
def test_processes_make_the_codes_of_one(tmp_path: Path) -> None:
    calibrated(0, 1, tmp_path)
    together(2, calibrated, tmp_path)
    one, two = (Bundle(tmp_path / str(count)) for count in (1, 2))
    found = 0
    for task in TASKS:
        for name in one.task_names(task):
            codes, again = (b.task_parts(task, name).get("codes") for b in (one, two))
            assert (codes is None) == (again is None)
            if codes is not None:
                assert again is not None
                assert torch.equal(codes, again)
                found += 1
    assert found > 1


class Narrow(LightningDataModule):
    """Rows that lie near a few directions, of two tasks whose deltas differ in size."""

    tasks = ("a", "b")

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(5)
        shown = torch.randn(12, 160, generator=draw)
        self.rows = torch.randn(264, 12, generator=draw) @ shown / 3
        self.rows += 0.03 * torch.randn(264, 160, generator=draw)

    def train_dataloader(self) -> list[DataLoader[Any]]:
        rows = TensorDataset(self.rows[:64], torch.zeros(64, dtype=torch.int64))
        return [DataLoader(rows, batch_size=16) for _ in self.tasks]


def test_directions_are_those_that_rows_show(tmp_path: Path) -> None:
    """On rows that calibration didn't see, in as many bytes a task; factors of an adapter still."""
    data, base = Narrow(), Branches()
    tuned = {"a": moved(base, 0.05), "b": moved(base, 0.02)}
    reuse = ReuseModule(base, finetuned=dict(tuned), codec=Sketch(bits=1.0, sketch=False))
    plain, path = reuse.compress(), tmp_path / "felt"
    felt_bundle = calibrate(reuse, data, path, trainer=trainer(2))
    for task, state in tuned.items():
        wanted, errors, sizes = copy.deepcopy(base), [], []
        wanted.load_state_dict(state)
        for bundle in (plain, felt_bundle):
            model = copy.deepcopy(base)
            model.load_state_dict(bundle.state_dict(task))
            errors.append(float((model(data.rows[64:]) - wanted(data.rows[64:])).square().mean()))
            sizes.append(bundle.manifest.tasks[task].file.bytes)
        assert errors[1] < 0.3 * errors[0]
        assert sizes[1] == pytest.approx(sizes[0], rel=0.03)
    assert 8 * sum(file.stat().st_size for file in path.glob("task-*")) <= 1.0 * 2 * 40_960
    again = Bundle(path, base)
    for task in tuned:
        export_adapter(again, task, tmp_path / task, dtype="fp32")
        adapted: Any = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / task)  # type: ignore[arg-type]
        merged = adapted.merge_and_unload().state_dict()
        assert "loud.weight" in again.task_names(task)
        for name, start in base.state_dict().items():
            delta = again.delta(task, name)
            if delta is None:  # hardly felt
                delta = torch.zeros_like(start)
            assert torch.allclose(merged[name] - start, delta, atol=1e-5)
