"""What was written before the code was laid out in packages, at 2f7cbd2, still opens and resumes.

The files are in `golden/`: `make.py` made them, with the code of that time; `expect.py` says what
the bundles hold, with no code of FusionKit's.
"""

import json
from pathlib import Path

import pytest
import torch
from checks import contents
from golden import expect
from golden.net import FOLDER, FROZEN, PRIVATE, ROWS, Rows, base, finetuned
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from torch import Tensor

from fusionkit import DBMS, EMR, Bundle, Calibration, MagnitudePrune, calibrate, compress
from fusionkit.reuse.module import ReuseModule
from fusionkit.tasks.finetune import Finetune
from fusionkit.tasks.training import fit

ROUNDED = {
    "emr": 0.0,
    "lora": 1e-6,
    "dbms": 1e-6,
    "sketch": 1e-5,
    "directions": 1e-5,
    "trellis": 1e-5,
}
"""Tolerance of float32 values. EMR's are formed in steps that round once each, and so to the bit.
Of a product B A, and of α u + β D, sums and products may be rounded as one or one by one, as the
processor has it: some units in the last place."""

WHOLE = ("head.", "norm.running", "place")


class Epochs(Callback):
    """Keeps which epochs are run."""

    def __init__(self) -> None:
        self.run: list[int] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run.append(trainer.current_epoch)


def trainer(epochs: int, *callbacks: Callback) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def wanted(bundle: str) -> dict[str, Tensor]:
    return load_file(FOLDER / "expected" / f"{bundle}.safetensors")


def opened(bundle: str) -> Bundle:
    return Bundle(FOLDER / f"{bundle}.bundle", FOLDER / "base.safetensors")


def check(found: dict[str, Tensor], bundle: str) -> None:
    """Equal names, dtypes, shapes; what is stored whole or frozen, and bfloat16, to the bit."""
    expected = wanted(bundle)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        whole = key.partition(":")[2].startswith(WHOLE)
        computed = tensor.dtype == torch.float32 and not whole
        tolerance = ROUNDED[bundle] if computed else 0.0
        torch.testing.assert_close(
            found[key], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_all_are_here() -> None:
    folders = {path.stem for path in FOLDER.glob("*.bundle")}
    files = {path.stem for path in (FOLDER / "expected").iterdir()}
    assert folders == files == set(expect.BUNDLES)
    manifests = [FOLDER / f"{bundle}.bundle/manifest.json" for bundle in expect.BUNDLES]
    versions = [json.loads(path.read_text())["format_version"] for path in manifests]
    assert versions == [1, 2, 3, 6, 6, 7]


@pytest.mark.parametrize("bundle", expect.BUNDLES)
def test_what_is_expected_is_what_the_script_gives(bundle: str) -> None:
    check(expect.expected(bundle), bundle)


@pytest.mark.parametrize("bundle", expect.BUNDLES)
def test_a_bundle_opens(bundle: str) -> None:
    golden = opened(bundle)
    states = {task: golden.state_dict(task) for task in golden.tasks}
    found = {f"{task}:{name}": t for task, state in states.items() for name, t in state.items()}
    check(found, bundle)


@pytest.mark.parametrize("bundle", expect.BUNDLES)
def test_a_live_model_becomes_its_tasks(bundle: str) -> None:
    module = ReuseModule(base(), FOLDER / f"{bundle}.bundle")
    found = {}
    for task in module.tasks:
        module.switch(task)
        state = module.model.state_dict()
        found |= {f"{task}:{name}": tensor.clone() for name, tensor in state.items()}
    check(found, bundle)


def test_the_same_family_makes_the_same_files(tmp_path: Path) -> None:
    """To the byte, but for the rescalers: the last digit of a long sum is the processor's."""
    compress(base(), finetuned(), EMR(), tmp_path / "b", private=PRIVATE, frozen=FROZEN)
    golden = FOLDER / "emr.bundle"
    assert contents(tmp_path / "b").keys() == contents(golden).keys()
    for path in golden.glob("*.safetensors"):
        made, known = load_file(tmp_path / "b" / path.name), load_file(path)
        assert made.keys() == known.keys()
        for name, tensor in known.items():
            exact = not name.endswith("/rescaler")
            assert made[name].dtype == tensor.dtype
            assert torch.allclose(made[name], tensor, rtol=0 if exact else 1e-6, atol=0), name
    manifests = [json.loads((f / "manifest.json").read_text()) for f in (tmp_path / "b", golden)]
    for manifest in manifests:
        manifest.pop("checksum")
        manifest["base"].pop("kinds", None)  # what holds the matrices, said since then
        for record in manifest["tasks"].values():
            record["file"].pop("header_sha256")
    assert manifests[0] == manifests[1]


def test_a_calibration_resumes_and_ends_as_it_did(tmp_path: Path) -> None:
    module = ReuseModule(
        base(),
        codec=DBMS(MagnitudePrune(0.2)),
        finetuned={task: str(path) for task, path in finetuned().items()},
        private=PRIVATE,
        frozen=FROZEN,
    )
    epochs = Epochs()
    bundle = calibrate(
        module,
        Rows(),
        tmp_path / "b",
        settings=Calibration(rows=ROWS, learning_rate=0.05),
        trainer=trainer(20, epochs),
        ckpt_path=str(FOLDER / "calibrate.ckpt"),
    )
    assert epochs.run == list(range(10, 20))
    golden = opened("dbms").manifest.tasks
    assert list(bundle.tasks) == list(golden)
    for task, record in bundle.manifest.tasks.items():
        old = golden[task].calibration
        assert record.calibration
        assert old
        for key, value in vars(record.calibration).items():
            # Sums of floats are each processor's own, so not to the bit on all of them.
            then = getattr(old, key)
            same = pytest.approx(then, rel=1e-4) if isinstance(then, float) else then
            assert value == same, (task, key)


def test_a_fine_tuning_resumes_and_ends_as_it_did(tmp_path: Path) -> None:
    module = Finetune(
        base(), "ant", "lora", private=PRIVATE, target_modules=["hidden"], rank=2, alpha=4,
        dropout=0.0, learning_rate=1e-2,
    )  # fmt: skip
    epochs = Epochs()
    fit(trainer(4, epochs), module, Rows("ant"), str(FOLDER / "finetune.ckpt"))
    assert epochs.run == [2, 3]
    found = load_file(module.save(tmp_path / "adapter") / "adapter_model.safetensors")
    ended = load_file(FOLDER / "finetune.safetensors")
    assert found.keys() == ended.keys()
    for name, tensor in ended.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
