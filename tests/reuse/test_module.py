"""ReuseModule: exact switching, evaluation by the Trainer, and what it refuses."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from tiny_net import TASKS, Files, TinyNet, perturbed
from tiny_tasks import Data
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import fusionkit
from fusionkit import EMR, SVD, Checkpoint, Dense, Family, MagnitudePrune, TaskArithmetic
from fusionkit.errors import BundleError, DataError, FamilyError, FusionKitError, WrongBaseError
from fusionkit.reuse.module import ReuseModule

PRIVATE = ["head.*"]
CODECS = [
    EMR(),
    SVD(rank=2),
    MagnitudePrune(0.2),
    MagnitudePrune(0.2, merge=TaskArithmetic()),
    Dense("bf16"),
]
States = dict[str, dict[str, Tensor]]


def trainer(**options: object) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(accelerator="cpu", **{**quiet, **options})  # type: ignore[arg-type]


def bits(module: ReuseModule) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_switching_is_exact_however_often(
    base: TinyNet, finetuned: States, codec: fusionkit.DeltaCodec
) -> None:
    bundle = fusionkit.compress(base, finetuned, codec, private=PRIVATE)
    wanted = {task: bundle.state_dict(task) for task in TASKS}
    original = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    module = ReuseModule(base, bundle)
    for task in TASKS * 20:
        module.switch(task)
    for task in reversed(TASKS):
        module.switch(task)
        assert module.task == task
        assert same(bits(module), wanted[task])
    module.switch(None)
    assert same(bits(module), original)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_are_rounded_once(
    base: TinyNet, finetuned: States, dtype: torch.dtype
) -> None:
    bundle = fusionkit.compress(base, finetuned, EMR(), private=PRIVATE)
    module = ReuseModule(base, bundle).to(dtype)
    for task in TASKS * 3:
        module.switch(task)
    exact = bundle.state_dict(TASKS[-1])
    for name, tensor in module.model.state_dict().items():
        assert torch.equal(tensor, exact[name].to(tensor.dtype)), name


def test_forward_is_the_tasks_own_model(base: TinyNet, finetuned: States) -> None:
    module = ReuseModule(base, finetuned=finetuned, private=PRIVATE)  # type: ignore[arg-type]
    tokens = torch.randint(0, 11, (4, 5))
    for place, task in enumerate(TASKS):
        module.switch(task)
        own = TinyNet(place + 2).eval()
        own.load_state_dict(finetuned[task])
        assert torch.equal(module(tokens), own(tokens))
        assert module.model.head.out_features == place + 2


def test_tied_weights_stay_tied(base: TinyNet, finetuned: States) -> None:
    module = ReuseModule(base, fusionkit.compress(base, finetuned, EMR(), private=PRIVATE))
    for task in TASKS:
        module.switch(task)
        assert base.decoder.weight is base.embed.weight


def test_weights_of_an_evaluated_task_can_still_be_trained(
    base: TinyNet, finetuned: States
) -> None:
    module = ReuseModule(base, fusionkit.compress(base, finetuned, EMR(), private=PRIVATE))
    with torch.inference_mode():
        module.switch("cat")
    module(torch.randint(0, 11, (4, 5))).sum().backward()
    assert all(p.grad is not None for p in module.model.parameters())


@pytest.mark.parametrize("stage", ["test", "validate"])
def test_the_trainer_scores_every_task(base: TinyNet, finetuned: States, stage: str) -> None:
    bundle = fusionkit.compress(base, finetuned, Dense("fp32"), private=PRIVATE)
    data = Data()
    reference = {}
    for task in TASKS:
        own = TinyNet(data.num_classes[task]).eval()
        own.load_state_dict(bundle.state_dict(task))
        tokens, labels = data.rows(task)
        reference[task] = float((own(tokens).argmax(1) == labels).double().mean())
    own_scores = {"ant": 0.5, "bee": 0.25, "cat": 0.25}
    module = ReuseModule(base, bundle, finetuned_scores=own_scores)
    run = trainer()
    getattr(run, stage)(module, datamodule=data, verbose=False)
    assert module.scores is not None
    assert module.scores.values == pytest.approx(reference, abs=1e-6)
    mean = sum(reference.values()) / 3
    assert module.scores.mean == pytest.approx(mean, abs=1e-6)
    assert module.scores.share == pytest.approx(mean / (1 / 3), abs=1e-5)
    prefix = "test" if stage == "test" else "val"
    assert float(run.callback_metrics[f"{prefix}/mean"]) == pytest.approx(mean, abs=1e-6)
    assert float(run.callback_metrics[f"{prefix}/bee"]) == pytest.approx(reference["bee"], abs=1e-6)


def test_tasks_are_scored_by_name_not_by_place(base: TinyNet, finetuned: States) -> None:
    bundle = fusionkit.compress(base, finetuned, Dense("fp32"), private=PRIVATE)
    module = ReuseModule(base, bundle)
    trainer().test(module, datamodule=Data(), verbose=False)
    in_order = module.scores
    trainer().test(module, datamodule=Data(("cat", "ant")), verbose=False)
    assert in_order is not None
    assert module.scores is not None
    assert module.scores.values == {t: in_order.values[t] for t in ("cat", "ant")}


def test_mapping_batches_and_logits_objects() -> None:
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

        def forward(self, inputs: Tensor) -> Output:
            return Output(inputs * self.scale)

    net, rows = Net(), torch.eye(3)
    flipped = {"scale": -torch.ones(1)}
    module = ReuseModule(
        net,
        fusionkit.compress(net, {"same": net.state_dict(), "flipped": flipped}, Dense()),
        num_classes={"same": 3, "flipped": 3},
    )
    data = [{"inputs": row, "labels": torch.tensor(i)} for i, row in enumerate(rows)]
    loaders = [DataLoader(data, batch_size=2) for _ in range(2)]  # type: ignore[arg-type]
    trainer().test(module, loaders, verbose=False)
    assert module.scores is not None
    assert module.scores.values == {"same": 1.0, "flipped": 0.0}


def test_compressed_on_the_fly_equals_the_bundle(
    files: Files, base: TinyNet, tmp_path: Path
) -> None:
    paths = {task: str(path) for task, path in files.finetuned.items()}
    on_the_fly = ReuseModule(base, codec=EMR(), finetuned=paths, private=PRIVATE)
    on_the_fly.switch("bee")
    got = bits(on_the_fly)
    on_the_fly.switch(None)
    bundle = on_the_fly.compress(tmp_path / "b")
    from_disk = ReuseModule(base, tmp_path / "b", codec=EMR())
    from_disk.switch("bee")
    assert same(got, bits(from_disk))
    assert bundle.tasks == TASKS


def test_base_is_loaded_into_the_model(files: Files, tmp_path: Path) -> None:
    module = ReuseModule(
        TinyNet(),
        base=str(files.base),
        finetuned=str(tmp_path / "*.safetensors"),
        private=PRIVATE,
    )
    assert set(module.finetuned) == {*TASKS, "base"}
    stored = fusionkit.Checkpoint.of(files.base)
    state = module.model.state_dict()
    assert all(torch.equal(state[n], stored[n]) for n in stored if not n.startswith("head"))


def test_reusing_another_source_starts_from_the_base(base: TinyNet, finetuned: States) -> None:
    """A tensor that is frozen in the second source must not keep the first one's values."""
    original = base.state_dict()["hidden.bias"].clone()
    same_bias = {t: {**s, "hidden.bias": original} for t, s in finetuned.items()}
    first = fusionkit.compress(base, finetuned, Dense(), private=PRIVATE)
    frozen = ["hidden.bias"]
    second = fusionkit.compress(base, same_bias, Dense(), private=PRIVATE, frozen=frozen)
    module = ReuseModule(base, first)
    module.switch("ant")
    assert not torch.equal(base.hidden.bias, original)
    module.reuse(second)
    module.switch("ant")
    assert torch.equal(base.hidden.bias, original)
    module.reuse(Family(current_weights(module), finetuned, PRIVATE))
    module.switch("bee")
    assert torch.equal(base.hidden.bias, finetuned["bee"]["hidden.bias"])


def current_weights(module: ReuseModule) -> dict[str, Tensor]:
    module.switch(None)
    return bits(module)


def test_wrong_base_is_refused_by_tensor(base: TinyNet, finetuned: States) -> None:
    bundle = fusionkit.compress(base, finetuned, EMR(), private=PRIVATE)
    with torch.no_grad():
        base.hidden.weight[0, 0] += 1e-3
    with pytest.raises(WrongBaseError, match=r"not the base.*\n.*'hidden.weight' has other values"):
        ReuseModule(base, bundle)


def test_another_codecs_bundle_is_refused(base: TinyNet, finetuned: States, tmp_path: Path) -> None:
    fusionkit.compress(base, finetuned, EMR(), tmp_path / "b", private=PRIVATE)
    with pytest.raises(BundleError, match=r"made with EMR.*`codec` is SVD.*compress again"):
        ReuseModule(base, tmp_path / "b", codec=SVD(rank=1))


def test_missing_bundle_and_missing_input(base: TinyNet, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no such bundle; make it with 'fusionkit compress'"):
        ReuseModule(base, tmp_path / "none").switch("ant")
    with pytest.raises(FusionKitError, match=r"needs both `codec` and `finetuned`"):
        ReuseModule(base, codec=EMR()).compress()


def test_tasks_and_classes_are_checked_before_anything_runs(
    base: TinyNet, finetuned: States
) -> None:
    two = {task: finetuned[task] for task in TASKS[:2]}
    module = ReuseModule(base, fusionkit.compress(base, two, EMR(), private=PRIVATE))
    with pytest.raises(BundleError, match="'cat', but no such task among ant, bee; leave its"):
        trainer().test(module, datamodule=Data(), verbose=False)
    with pytest.raises(DataError, match="classes of 'ant' is not known"):
        trainer().test(module, [DataLoader(TensorDataset(torch.zeros(1)))] * 2, verbose=False)


def test_head_without_a_place_is_refused(base: TinyNet, finetuned: States) -> None:
    extra = {t: {**s, "aux.weight": torch.zeros(2)} for t, s in finetuned.items()}
    bundle = fusionkit.compress(base, extra, EMR(), private=[*PRIVATE, "aux.*"])
    with pytest.raises(BundleError, match=r"'aux.weight' has no place in TinyNet"):
        ReuseModule(base, bundle).switch("ant")


def test_a_bundle_survives_the_switching_of_the_model_it_came_from(
    base: TinyNet, finetuned: States
) -> None:
    bundle = fusionkit.compress(base, finetuned, EMR(), private=PRIVATE)
    before = bundle.state_dict("ant")
    ReuseModule(base, bundle).switch("bee")
    assert same(bundle.state_dict("ant"), before)


def test_a_base_changed_in_memory_is_noticed(base: TinyNet, finetuned: States) -> None:
    bundle = fusionkit.compress(base, finetuned, EMR(), private=PRIVATE)
    bundle.state_dict("ant")
    with torch.no_grad():
        base.conv.bias += 1
    with pytest.raises(WrongBaseError, match=r"'conv.bias' has other values"):
        bundle.state_dict("ant")


@pytest.mark.parametrize("private", [PRIVATE, None])
def test_an_unknown_task_of_checkpoints_is_named(base: TinyNet, private: list[str] | None) -> None:
    original = bits(ReuseModule(base))
    tuned: dict[str, str | Checkpoint] = {
        task: Checkpoint.of(perturbed(base, place, classes=3)) for place, task in enumerate(TASKS)
    }
    module = ReuseModule(base, finetuned=tuned, private=private)
    module.switch("bee")
    with pytest.raises(FamilyError, match="no task 'nope'; it has ant, bee, cat"):
        module.switch("nope")
    assert module.task is None
    assert same(bits(module), original)


def test_a_failed_switch_leaves_the_base(base: TinyNet, finetuned: States, tmp_path: Path) -> None:
    """Never a mixture of two tasks, and never the old task under the new weights' name."""
    original = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    fusionkit.compress(base, finetuned, Dense(), tmp_path / "b", private=PRIVATE)
    module = ReuseModule(base, tmp_path / "b")
    module.switch("ant")
    path = tmp_path / "b" / "task-bee.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(BundleError, match=r"task-bee.safetensors: part '.*' is not what was"):
        module.switch("bee")
    assert module.task is None
    assert same(bits(module), original)


def test_a_head_that_only_one_task_has_does_not_stay(base: TinyNet, finetuned: States) -> None:
    start = {n: t.clone() for n, t in base.state_dict().items()}
    headless = {n: t for n, t in start.items() if not n.startswith("head")}
    tuned = {"ant": finetuned["ant"], "bee": {n: finetuned["bee"][n] for n in headless}}
    module = ReuseModule(base, fusionkit.compress(headless, tuned, EMR(), private=PRIVATE))
    module.switch("ant")
    assert torch.equal(base.head.bias, finetuned["ant"]["head.bias"])
    module.switch("bee")
    assert torch.equal(base.head.bias, start["head.bias"])
    assert torch.equal(base.head.weight, start["head.weight"])
