"""Sketch: closed forms, no bias, budgets that are never exceeded, codes that are refused."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from msgspec.structs import replace
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fusionkit
from fusionkit import Sketch
from fusionkit.bundles.format import task_file
from fusionkit.bundles.part_writer import Part, PartWriter
from fusionkit.codecs import sketch_codes
from fusionkit.codecs.decomposition import svd_gram
from fusionkit.codecs.overhead import overhead
from fusionkit.codecs.quantized_factors import quantize, rate
from fusionkit.codecs.rounded_sketch import noise
from fusionkit.errors import BundleError, CodecError
from fusionkit.registry import to_config
from fusionkit.task_vectors.family import Family
from fusionkit.testing import models

pytestmark = pytest.mark.filterwarnings("ignore:task .* comes back with an error")

ALPHA = {"w": (160, 96), "conv": (24, 8, 3, 3), "bias": (160,), "embedding": (300, 32)}


def family(shapes: dict[str, tuple[int, ...]], tasks: int = 1, scale: float = 0.1, seed: int = 0):
    """A base, and models tuned from it by a few strong directions and noise."""
    draw = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    tuned = {}
    for task in range(tasks):
        tuned[f"t{task}"] = {}
        for name, tensor in base.items():
            delta = torch.randn(tensor.shape, generator=draw)
            if tensor.ndim > 1:
                rows = tensor.shape[0]
                left = torch.randn(rows, 2, generator=draw)
                right = torch.randn(2, tensor.numel() // rows, generator=draw)
                delta += 2 * (left @ right).view(tensor.shape)
            tuned[f"t{task}"][name] = tensor + scale * delta
    return base, tuned


def flat(tensors: dict[str, Tensor | None], like: dict[str, Tensor]) -> Tensor:
    parts = [torch.zeros(t.numel()) if (d := tensors[n]) is None else d.flatten()
             for n, t in like.items()]  # fmt: skip
    return torch.cat(parts).to(torch.float64)


def decoded(bundle: fusionkit.Bundle, task: str, base: dict[str, Tensor]) -> Tensor:
    return flat({name: bundle.delta(task, name) for name in base}, base)


def delta_of(base: dict[str, Tensor], tuned: dict[str, Tensor]) -> Tensor:
    return flat({name: tuned[name] - tensor for name, tensor in base.items()}, base)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e15, 1e30])
def test_a_rank_1_delta_comes_back(scale: float) -> None:
    """Its direction is coded finely, as there is nothing else to spend on."""
    delta = scale * torch.outer(torch.randn(256), torch.randn(200))
    base = {"w": torch.zeros(256, 200)}
    for sketch in (True, False):
        bundle = fusionkit.compress(base, {"a": {"w": delta}}, Sketch(bits=1.0, sketch=sketch))
        found = bundle.delta("a", "w")
        assert found is not None
        ratio = ((found - delta) / scale).square().sum() / (delta / scale).square().sum()
        assert ratio < 0.01


def test_deltas_of_zero_cost_nothing(tmp_path: Path) -> None:
    base, tuned = family(ALPHA)
    tuned["same"] = base
    bundle = fusionkit.compress(base, tuned, Sketch(bits=1.0), tmp_path / "b")
    assert not list(bundle.task_names("same"))
    assert (tmp_path / "b" / "task-same.safetensors").stat().st_size < 100
    assert all(bundle.delta("same", name) is None for name in base)


def test_each_direction_counts_by_its_energy() -> None:
    """⟨X̂ Xᵀ, X Xᵀ⟩ = ‖X Xᵀ‖² of what is sketched: strong directions come back as weak ones do."""
    base = {"w": torch.zeros(192, 320)}
    delta = torch.randn(192, 320)
    bundle = fusionkit.compress(base, {"a": {"w": delta}}, Sketch(bits=0.3))
    codes = sketch_codes.read(bundle.task_parts("a", "w")["codes"], 192, 320)
    assert codes.form == sketch_codes.TRELLIS
    assert codes.factors is None
    found = bundle.delta("a", "w")
    assert found is not None
    gram = delta @ delta.mT
    assert float((found @ delta.mT * gram).sum() / gram.square().sum()) == pytest.approx(
        1, abs=0.02
    )
    assert float((found * delta).sum() / delta.square().sum()) == pytest.approx(1, abs=0.02)


def test_what_a_few_rows_hold_is_rotated() -> None:
    """Of a trellis's windows most would say nothing of it; where all rows are alike, none."""
    few = torch.zeros(64, 320)
    few[::13] = torch.randn(5, 320)
    for delta, form in (few, sketch_codes.INTEGERS), (torch.randn(64, 320), sketch_codes.TRELLIS):
        bundle = fusionkit.compress(
            {"w": torch.zeros(64, 320)}, {"a": {"w": delta}}, Sketch(bits=0.7)
        )
        codes = sketch_codes.read(bundle.task_parts("a", "w")["codes"], 64, 320)
        assert codes.form == form
        found = bundle.delta("a", "w")
        assert found is not None
        error = float((found - delta).square().sum() / delta.square().sum())
        assert error < 1.5 * float(noise(np.array(0.65)))


def test_no_direction_is_rounded_to_zero() -> None:
    """As that of a constant would be, whose entries are all half a step."""
    matrix = torch.full((120, 40), 0.7)
    leading = svd_gram(matrix, 1).first(1)
    for theta in (1e-6, 1.0, 1e3):
        left, right = quantize(matrix, leading, theta, 0.8, 0.0).product()
        assert torch.allclose(left @ right.mT, matrix, rtol=0.05)


def test_the_whole_budget_is_used() -> None:
    base, tuned = family({"w": (600, 400), "v": (400, 500), "b": (600,)}, 3)
    for codec in (Sketch(bits=0.4), Sketch(bytes=90_000)):
        bundle = fusionkit.compress(base, tuned, codec)
        asked = codec.bytes or 0.4 * 440_600 * 3 / 8
        assert 0.96 * asked < bundle.nbytes <= asked
        assert codec.bits is None or bundle.bits_per_parameter <= codec.bits


def test_bits_go_to_tasks_by_the_cube_root_of_their_energy() -> None:
    base = {"w": torch.zeros(600, 400)}
    tuned = {"t0": {"w": torch.randn(600, 400)}}
    tuned["t1"] = {"w": base["w"] + 8 * (tuned["t0"]["w"] - base["w"])}
    sizes = {}
    for share in ("energy", "equal"):
        bundle = fusionkit.compress(base, tuned, Sketch(bits=0.2, share=share))
        first, second = (len(bundle.task_parts(task, "w")["codes"]) for task in ("t0", "t1"))
        sizes[share] = second / first
    assert sizes["equal"] == pytest.approx(1, rel=0.02)
    assert sizes["energy"] == pytest.approx(4, rel=0.1)


def test_deltas_far_larger_than_their_base_are_stored() -> None:
    base, tuned = family({"w": (60, 40), "v": (50, 30)}, 2)
    base = {name: 1e-9 * tensor for name, tensor in base.items()}
    bundle = fusionkit.compress(base, tuned, Sketch(bits=4.0))
    assert all(bundle.delta(task, name) is not None for task in tuned for name in base)


@pytest.mark.parametrize("wanted", [0.003, 0.03])
def test_noise_is_what_was_asked_for(wanted: float) -> None:
    base, tuned = family({"w": (300, 400), "v": (256, 256)}, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bundle = fusionkit.compress(base, tuned, Sketch(noise=wanted))
    energy = sum(float(tensor.square().sum()) for tensor in base.values())
    for task, state in tuned.items():
        error = (decoded(bundle, task, base) - delta_of(base, state)).square().sum()
        assert float(error) / energy == pytest.approx(wanted, rel=0.15)


def test_too_few_bits_are_warned_of_and_the_mend_works() -> None:
    base, tuned = family({"w": (300, 400)}, scale=0.5)
    with pytest.warns(UserWarning, match=r"task 't0': at 0\.1\d* bits .* takes") as caught:
        fusionkit.compress(base, tuned, Sketch(bits=0.15))
    bits = float(str(caught[0].message).rpartition("as by bits=")[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fusionkit.compress(base, tuned, Sketch(bits=bits))


def test_of_a_small_delta_it_is_said_what_the_mend_spends_on_it(tmp_path: Path) -> None:
    """It would be quiet without a byte; what is asked for stores it."""
    base, tuned = family({"w": (300, 400)}, 2, scale=0.5)
    tuned["t1"]["w"] = base["w"] + 0.05 * (tuned["t1"]["w"] - base["w"])
    with pytest.warns(UserWarning, match="hardly felt") as caught:
        fusionkit.compress(base, tuned, Sketch(bits=0.15))
    of_small = next(str(each.message) for each in caught if "'t1'" in str(each.message))
    task_bits, bits = map(float, of_small.rpartition("that takes ")[2].split(" bits, as by bits="))
    bundle = fusionkit.compress(base, tuned, Sketch(bits=bits), tmp_path / "b")
    assert bundle.delta("t1", "w") is not None
    nbytes = (tmp_path / "b" / "task-t1.safetensors").stat().st_size
    assert 8 * nbytes / base["w"].numel() == pytest.approx(task_bits, rel=0.2)


def test_what_is_quiet_left_out_whole_is_sketched_as_quietly() -> None:
    """A vector that is worth its bits is not enough, though nothing else need be stored."""
    base, tuned = family({"w": (300, 400), "v": (40,)}, scale=0.04)
    tuned["t0"]["v"] = base["v"] + 25 * (tuned["t0"]["v"] - base["v"])
    bundle = fusionkit.compress(base, tuned, Sketch(noise=0.04))
    truth = tuned["t0"]["w"] - base["w"]
    energy = base["w"].square().sum()
    assert truth.square().sum() < 0.04 * energy
    delta = bundle.delta("t0", "w")
    assert delta is not None
    assert 0.01 * energy < (delta - truth).square().sum() < 0.045 * energy
    assert (delta * truth).sum() / truth.square().sum() == pytest.approx(1, abs=0.2)


def test_a_budget_for_headers_alone_is_warned_of_and_the_mend_works() -> None:
    base, tuned = family(ALPHA)
    with pytest.warns(
        UserWarning, match=r"Sketch\(bytes=900\) leaves 900 bytes.* for bytes=\d+ or more"
    ) as caught:
        bundle = fusionkit.compress(base, tuned, Sketch(bytes=900))
    assert all(bundle.delta("t0", name) is None for name in base)
    enough = str(caught[0].message).rpartition("bytes=")[2].partition(" ")[0]
    bundle = fusionkit.compress(base, tuned, Sketch(bytes=int(enough)))
    assert any(bundle.delta("t0", name) is not None for name in base)


@pytest.mark.parametrize(
    "settings",
    [{}, {"bits": 0.1, "bytes": 100}, {"bits": 0}, {"noise": -1.0}, {"bits": float("inf")}],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(CodecError, match=r"expected (exactly one of )?Sketch's"):
        Sketch(**settings)
    with pytest.raises(CodecError, match="without one, give bits or bytes"):
        Sketch(noise=0.01, sketch=False)


def test_codes_that_are_damaged_are_refused() -> None:
    """By an error that a bundle says the place of; or they decode to something finite."""
    base, tuned = family({"w": (40, 30), "b": (5000,)})
    codec = Sketch(bits=4.0)
    bundle = fusionkit.compress(base, tuned, codec)
    gains = bundle.task_parts("t0", fusionkit.WHOLE_MODEL)
    draw = np.random.default_rng(0)
    refused = 0
    for name, tensor in base.items():
        codes = bundle.task_parts("t0", name)["codes"]
        for length in (0, 3, 14, 15, 20, len(codes) - 1):
            with pytest.raises(ValueError, match=r"[a-z]{3}"):
                codec.decode({**gains, "codes": codes[:length].clone()}, tensor.shape)
        for _ in range(300):
            bad = codes.clone()
            bad[draw.integers(0, min(len(bad), 40))] = int(draw.integers(0, 256))
            try:
                found = codec.decode({**gains, "codes": bad}, tensor.shape)
            except (ValueError, LookupError, RuntimeError):
                refused += 1
            else:
                assert found.shape == tensor.shape
    assert refused > 100


def test_a_bundle_says_where_its_codes_are_damaged(tmp_path: Path) -> None:
    """Damage that its digests don't know of: a bundle that a faulty program wrote."""
    base, tuned = family({"w": (40, 30)})
    bundle = fusionkit.compress(base, tuned, Sketch(bits=8.0), tmp_path / "b")
    path = bundle.path / task_file("t0")
    stored = {
        f"{name}/{part}": tensor
        for name in bundle.task_names("t0")
        for part, tensor in bundle.task_parts("t0", name).items()
    }
    stored["w/codes"] = stored["w/codes"][:-9].clone()
    writer = PartWriter(path)
    for key, tensor in stored.items():
        writer.add(Part.of(key, tensor))
    record = replace(bundle.manifest.tasks["t0"], file=writer.finish())
    bundle.update(replace(bundle.manifest, tasks={"t0": record}))
    with pytest.raises(BundleError, match="'w' of task 't0' can't be decoded by Sketch"):
        bundle.delta("t0", "w")


def test_directions_alone_are_factors(tmp_path: Path) -> None:
    base, tuned = family({"w": (160, 96), "b": (160,)})
    bundle = fusionkit.compress(base, tuned, Sketch(bits=2.0, sketch=False))
    factors, found = bundle.factors("t0", "w"), bundle.delta("t0", "w")
    assert factors is not None
    assert found is not None
    assert torch.allclose(factors.left @ factors.right.mT, found, atol=1e-6)
    sketched = fusionkit.compress(base, tuned, Sketch(bits=2.0))
    assert sketched.factors("t0", "w") is None


def test_vectors_have_no_gains(tmp_path: Path) -> None:
    """Neither a matrix's beside them, nor, where only biases were tuned, one that is not there."""
    base, tuned = family({"bias": (4000,), "w": (160, 96)})
    codec = Sketch(noise=1e-4)
    codes = fusionkit.compress(base, tuned, codec).task_parts("t0", "bias")
    gains = torch.tensor([[2.0, 3.0]], requires_grad=True)
    found = codec.decode({**codes, "gains": gains}, torch.Size((4000,)))
    assert not found.requires_grad
    assert torch.equal(found, codec.decode({**codes, "gains": torch.ones(1, 2)}, found.shape))

    base, tuned = family({"bias": (4000,), "other": (4000,)})
    delta = delta_of(base, tuned["t0"])
    bundle = fusionkit.compress(base, tuned, codec, tmp_path / "bundle")
    assert (decoded(bundle, "t0", base) - delta).norm() < 0.2 * delta.norm()


def test_gains_scale_the_directions_and_the_sketch() -> None:
    base, tuned = family({"w": (160, 96)})
    codec = Sketch(bits=1.0)
    bundle = fusionkit.compress(base, tuned, codec)
    codes = bundle.task_parts("t0", "w")

    def at(first: float, second: float) -> Tensor:
        gains = torch.tensor([[float(first), second]], requires_grad=True)
        found = codec.decode({**codes, "gains": gains}, torch.Size((160, 96)))
        found.sum().backward()
        assert gains.grad is not None
        assert gains.grad.all()
        return found.detach()

    whole, directions, sketch = at(1, 1), at(1, 1e-9), at(1e-9, 1)
    assert torch.allclose(whole, directions + sketch, atol=1e-5)
    assert torch.allclose(at(2, 0.5), 2 * directions + 0.5 * sketch, atol=1e-5)
    assert torch.linalg.matrix_rank(directions, atol=1e-3) == 2


class Rows(LightningDataModule):
    """Unlabelled rows of one task."""

    tasks = ("a",)

    def train_dataloader(self) -> list[DataLoader[Any]]:
        rows = TensorDataset(torch.randn(64, 48), torch.zeros(64, dtype=torch.int64))
        return [DataLoader(rows, batch_size=32)]


def test_gains_are_learned(tmp_path: Path) -> None:
    """Within the budget that there is without them."""
    base = nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 8))
    tuned = {n: t + 0.1 * torch.randn_like(t) for n, t in base.state_dict().items()}
    module = fusionkit.ReuseModule(base, finetuned={"a": tuned}, codec=Sketch(bits=2.0))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=15, accelerator="cpu", enable_checkpointing=False, **quiet)
    bundle = fusionkit.calibrate(module, Rows(), tmp_path / "b", trainer=trainer)
    record = bundle.manifest.tasks["a"]
    assert record.calibration is not None
    assert record.calibration.loss_after < record.calibration.loss_before
    assert 8 * record.file.bytes <= 2.0 * module.family().parameters
    gains = bundle.task_parts("a", fusionkit.WHOLE_MODEL)["gains"]
    assert gains.dtype == torch.float16
    assert (gains != 1).any()


def test_the_bounds_on_what_is_beside_hold() -> None:
    arguments = models()
    bundle = fusionkit.compress(codec=Sketch(bits=12), **arguments)
    found = overhead(Family(**arguments), to_config(bundle.codec), 10_000)
    manifest = (bundle.path / "manifest.json").stat().st_size
    whole = sum(record.private_bytes for record in bundle.manifest.tasks.values())
    assert manifest <= found.manifest <= manifest + 3 * 600
    assert found.whole == whole


@pytest.mark.filterwarnings("ignore::fusionkit.checkpoints.from_config.UnknownClassWarning")
def test_files_beside_the_weights_are_within_a_budget(tmp_path: Path) -> None:
    base, tuned = family({"w": (300, 200)}, 2)
    models = {"base": base, **tuned}
    for name, state in models.items():
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
        draw = np.random.default_rng(len(name))
        labels = {str(i): str(draw.random()) for i in range(300 * (name != "base"))}
        config = {"model_type": "mine", "id2label": labels}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    folders = {task: tmp_path / task for task in tuned}
    for nbytes in (20_000, 40_000):
        bundle = fusionkit.compress(tmp_path / "base", folders, Sketch(bytes=nbytes))
        assert 0.9 * nbytes < bundle.nbytes <= nbytes


def test_rates_are_entropies() -> None:
    """Of a wide Gaussian: known in closed form."""
    wide = 0.5 * np.log2(2 * np.pi * np.e * (np.array([4.0, 25.0, 1e4]) + 1 / 12))
    assert np.allclose(rate(np.array([2.0, 5.0, 100.0])), wide, atol=2e-3)


def test_more_bits_are_less_noise() -> None:
    """And never less than theory allows: of an unbiased code of R bits, 1 / (4^R − 1)."""
    bits = np.geomspace(1e-4, 7, 400)
    found = noise(bits)
    assert (np.diff(found) <= 0).all()
    assert (found > 1 / np.expm1(bits * np.log(4))).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize(
    "codec", [Sketch(bits=0.5), Sketch(bits=3.0), Sketch(bits=1, sketch=False)]
)
def test_a_bundle_made_on_cuda(codec: Sketch) -> None:
    """It decodes there as here; signs that hang on rounding apart, it is what is made here."""
    base, tuned = family({"w": (300, 200), "b": (4000,)})
    here = fusionkit.compress(base, tuned, codec)
    there = fusionkit.compress(base, tuned, codec, device="cuda")
    assert abs(here.nbytes - there.nbytes) < 100
    for name in base:
        one, other = here.delta("t0", name), there.delta("t0", name)
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            on_device = here.delta("t0", name, torch.device("cuda"))
            assert on_device is not None
            assert torch.allclose(on_device.cpu(), one, rtol=1e-4, atol=1e-5)
            assert (one - other).norm() < 0.1 * one.norm()
