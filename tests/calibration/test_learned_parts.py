"""Calibration of a codec's own scales: what it may learn, and that nothing else changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from tiny_net import TASKS, TESTS, TinyNet
from tiny_tasks import PRIVATE, Rows, States, kl, logits, module, opened, rows_of, settings, trainer
from torch import Tensor

import fusionkit
from fusionkit import Bundle, calibrate
from fusionkit.calibration.learned_parts import PartsCalibration
from fusionkit.codecs.base import DeltaCodec
from fusionkit.errors import FusionKitError
from fusionkit.registry import load

EPOCHS = 12


@pytest.fixture
def codec(monkeypatch: pytest.MonkeyPatch) -> DeltaCodec:
    """A third party's, whose magnitudes can be learned."""
    monkeypatch.syspath_prepend(TESTS / "plugin")
    ternary: Any = load("fusionkit.codecs", "ternary")
    found: DeltaCodec = ternary(0.3)
    return found


def stored(bundle: Bundle, task: str) -> dict[str, Tensor]:
    return load_file(bundle.path / f"task-{task}.safetensors")


def test_it_learns_the_magnitudes_and_nothing_else(
    base: TinyNet, finetuned: States, codec: DeltaCodec, tmp_path: Path
) -> None:
    plain = fusionkit.compress(TinyNet().eval(), finetuned, codec, private=PRIVATE)
    reuse = module(base, finetuned, codec)
    plain = reuse.compress()
    bundle = calibrate(reuse, Rows(), tmp_path / "b", settings=settings(), trainer=trainer(EPOCHS))
    assert Bundle(tmp_path / "b").codec == codec
    assert bundle.nbytes - (bundle.path / "manifest.json").stat().st_size == (
        plain.nbytes - (plain.path / "manifest.json").stat().st_size
    )
    for task in TASKS:
        before, after = stored(plain, task), stored(bundle, task)
        assert before.keys() == after.keys()
        moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
        assert moved
        assert {name.rpartition("/")[2] for name in moved} == {"magnitude"}
        record = bundle.manifest.tasks[task].calibration
        assert record is not None
        assert record.shift is record.scale is None
        tokens, _ = rows_of(task)
        teacher = logits(finetuned[task], tokens)
        base_state = reuse.base_weights
        for source, value in ((plain, record.loss_before), (bundle, record.loss_after)):
            source.attach_base(fusionkit.Checkpoint.of(base_state))
            found = kl(teacher, logits(source.state_dict(task), tokens))
            assert value == pytest.approx(found, rel=1e-4, abs=1e-7)
        assert record.loss_after < 0.9 * record.loss_before


def test_gradients_are_those_of_the_decoded_model(
    base: TinyNet, finetuned: States, codec: DeltaCodec
) -> None:
    """Against finite differences, through every tensor's magnitude."""
    reuse = module(base, finetuned, codec)
    calibrator = opened(PartsCalibration, reuse)
    count = len(calibrator.progress[1].start)
    assert count == len([n for n in stored(reuse.compress(), "bee") if n.endswith("/magnitude")])

    def loss_at(values: Tensor) -> Tensor:
        return calibrator.loss_of(1, values, rows_of("bee"), 0)

    at = torch.linspace(-1, 1, count).requires_grad_()
    (gradient,) = torch.autograd.grad(loss_at(at), at)
    step = 0.05
    for place in range(count):
        around = [at.detach() + sign * step * torch.eye(count)[place] for sign in (1, -1)]
        up, down = (float(loss_at(each)) for each in around)
        assert float(gradient[place]) == pytest.approx((up - down) / (2 * step), rel=0.03, abs=2e-5)


def test_resumed_is_as_if_never_interrupted(
    base: TinyNet, finetuned: States, codec: DeltaCodec, tmp_path: Path
) -> None:
    def run(folder: Path, epochs: int, ckpt_path: str | None = None) -> None:
        kept = ModelCheckpoint(tmp_path / "ckpt", save_last=True, enable_version_counter=False)
        run = trainer(epochs, callbacks=[kept], enable_checkpointing=True)
        reuse = module(base, finetuned, codec)
        calibrate(reuse, Rows(), folder, settings=settings(), trainer=run, ckpt_path=ckpt_path)

    run(tmp_path / "whole", EPOCHS)
    run(tmp_path / "part", 4)
    run(tmp_path / "again", EPOCHS, str(tmp_path / "ckpt/last.ckpt"))
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_a_search_is_refused(base: TinyNet, finetuned: States, codec: DeltaCodec) -> None:
    reuse = module(base, finetuned, codec)
    with pytest.raises(FusionKitError, match=r"Ternary has too many scales .*method gradient"):
        calibrate(reuse, Rows(), settings=settings(method="search"), trainer=trainer(EPOCHS))
