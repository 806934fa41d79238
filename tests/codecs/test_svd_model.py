"""SVD over whole models: factors of adapters, ranks by pattern, one energy or budget for all."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from fusionkit import SVD, Bundle
from fusionkit.bundles.compress import compress
from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.codecs.decomposition import svd_exact, svd_gram, svd_product
from fusionkit.codecs.values import ValueDtype, pack_values, stored_bytes
from fusionkit.errors import CodecError

SHAPES = {"a.weight": (20, 30), "b.weight": (30, 12), "c.weight": (16, 16)}
RANK = 6


def base() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def adapter(folder: Path, seed: int = 1, rank: int = RANK) -> dict[str, Tensor]:
    """Write a LoRA in PEFT's format; returns the products, scaled."""
    generator = torch.Generator().manual_seed(seed)
    tensors, products = {}, {}
    for place, (name, (rows, columns)) in enumerate(SHAPES.items(), start=1):
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a = torch.randn(rank, columns, generator=generator) * place
        b = torch.randn(rows, rank, generator=generator) * 0.5 ** torch.arange(rank)
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        products[name] = 2.0 * b @ a
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return products


def ranks(bundle: Bundle, task: str = "t") -> dict[str, int]:
    found = {name: bundle.factors(task, name) for name in SHAPES}
    return {name: 0 if f is None else f.left.shape[1] for name, f in found.items()}


def test_the_product_is_never_formed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    products = adapter(tmp_path / "t")

    def forbidden(self: LowRank, shape: torch.Size) -> Tensor:
        raise AssertionError("formed")

    with monkeypatch.context() as context:
        context.setattr(LowRank, "dense", forbidden)
        bundle = compress(base(), {"t": str(tmp_path / "t")}, SVD(rank=4, dtype="fp32"))
    for name, product in products.items():
        delta = bundle.delta("t", name)
        assert delta is not None
        s = torch.linalg.svdvals(product)
        torch.testing.assert_close((delta - product).norm(), s[4:].square().sum().sqrt())


@pytest.mark.parametrize("rank", [RANK, RANK + 3])
def test_at_its_own_rank_nothing_is_lost(rank: int, tmp_path: Path) -> None:
    products = adapter(tmp_path / "t")
    bundle = compress(base(), {"t": str(tmp_path / "t")}, SVD(rank=rank, dtype="fp32"))
    for name, product in products.items():
        torch.testing.assert_close(bundle.delta("t", name), product, rtol=1e-4, atol=1e-4)


def test_full_fine_tunes_and_adapters_are_cut_alike(tmp_path: Path) -> None:
    products = adapter(tmp_path / "t")
    full = {name: tensor + products[name] for name, tensor in base().items()}
    bundle = compress(base(), {"t": str(tmp_path / "t"), "full": full}, SVD(rank=2, dtype="fp32"))
    for name in SHAPES:
        torch.testing.assert_close(
            bundle.delta("t", name), bundle.delta("full", name), rtol=1e-3, atol=1e-3
        )


def test_ranks_by_pattern(tmp_path: Path) -> None:
    adapter(tmp_path / "t")
    codec = SVD(rank={"a.*": 1, "[ab].weight": 5, "*": 2})
    bundle = compress(base(), {"t": str(tmp_path / "t")}, codec, tmp_path / "bundle")
    assert ranks(bundle) == {"a.weight": 1, "b.weight": 5, "c.weight": 2}
    assert Bundle(tmp_path / "bundle").codec == codec
    with pytest.raises(
        CodecError, match=r"none of SVD's rank patterns \(a\.\*\) matches 'b.weight'"
    ):
        compress(base(), {"t": str(tmp_path / "t")}, SVD(rank={"a.*": 1}))


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_energy_of_the_whole_model(energy: float, tmp_path: Path) -> None:
    """The fewest directions over all matrices that hold the share; found here by sorting."""
    products = adapter(tmp_path / "t")
    codec = SVD(energy=energy, scope="model", dtype="fp32")
    bundle = compress(base(), {"t": str(tmp_path / "t")}, codec)
    squares = torch.cat([torch.linalg.svdvals(p)[:RANK].square() for p in products.values()])
    held = squares.sort(descending=True).values.cumsum(0) / squares.sum()
    assert sum(ranks(bundle).values()) == int((held < energy).sum()) + 1
    lost = sum(
        float((p - d).square().sum())
        if (d := bundle.delta("t", n)) is not None
        else float(p.square().sum())
        for n, p in products.items()
    )
    assert lost <= (1 - energy) * float(squares.sum()) * (1 + 1e-3)


@settings(max_examples=15, deadline=None)
@given(budget=st.integers(150, 4000), dtype=st.sampled_from(["fp32", "fp16", "int8", "int3"]))
def test_a_budget_is_kept_and_used(
    budget: int, dtype: ValueDtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("adapters")
    adapter(folder / "t")
    adapter(folder / "u", seed=2)
    bundle = compress(base(), {t: str(folder / t) for t in "tu"}, SVD(budget=budget, dtype=dtype))
    for task in "tu":
        parts = [bundle.task_parts(task, name) for name in SHAPES]
        spent = sum(part.nbytes for own in parts for part in own.values())
        dearest = max(
            stored_bytes((rows, 1), dtype) + stored_bytes((columns, 1), dtype)
            for rows, columns in SHAPES.values()
        )
        assert spent <= budget
        full = all(rank >= RANK for rank in ranks(bundle, task).values())
        assert full or spent > budget - dearest


def test_a_budget_goes_where_it_holds_most(tmp_path: Path) -> None:
    """No direction that was left out holds more per byte than one that was kept."""
    products = adapter(tmp_path / "t")
    bundle = compress(base(), {"t": str(tmp_path / "t")}, SVD(budget=900))
    kept, left = [], []
    for name, product in products.items():
        worth = torch.linalg.svdvals(product)[:RANK].square() / sum(SHAPES[name])
        kept.append(worth[: ranks(bundle)[name]])
        left.append(worth[ranks(bundle)[name] :])
    assert torch.cat(kept).min() >= torch.cat(left).max()


def test_a_budget_that_is_too_small_is_refused(tmp_path: Path) -> None:
    adapter(tmp_path / "t")
    with pytest.raises(CodecError, match=r"task 't': a budget of 10 bytes.*raise it"):
        compress(base(), {"t": str(tmp_path / "t")}, SVD(budget=10))


def test_vectors_count_towards_the_budget(tmp_path: Path) -> None:
    start = {"a.weight": torch.randn(20, 30), "a.bias": torch.randn(20)}
    tuned = {name: tensor + torch.randn(tensor.shape) for name, tensor in start.items()}
    bundle = compress(start, {"t": tuned}, SVD(budget=300))
    parts = [bundle.task_parts("t", name) for name in start]
    assert sum(part.nbytes for own in parts for part in own.values()) == 40 + 2 * 50 * 2
    with pytest.raises(CodecError, match=r"its vectors \(40 bytes\)"):
        compress(start, {"t": tuned}, SVD(budget=100))


def test_scope_model_without_energy_is_refused() -> None:
    with pytest.raises(CodecError, match="scope: model is for an energy"):
        SVD(rank=3, scope="model")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(0, 5),
    dtype=st.sampled_from(["fp32", "fp16", "bf16", "int8", "int4", "int3", "int2"]),
)
def test_stored_bytes_are_those_of_pack_values(rows: int, columns: int, dtype: ValueDtype) -> None:
    shape = (rows, columns) if columns else (rows,)
    parts = pack_values(torch.randn(shape), dtype)
    assert stored_bytes(shape, dtype) == sum(part.nbytes for part in parts.values())


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), rank=st.integers(1, 15))
def test_svd_of_factors_is_that_of_the_product(rows: int, columns: int, rank: int) -> None:
    """Also where the rank is larger than the matrix."""
    factors = LowRank(torch.randn(rows, rank), torch.randn(columns, rank))
    product = factors.dense(torch.Size((rows, columns)))
    found, expected = svd_product(factors), torch.linalg.svdvals(product)
    size = len(expected)
    torch.testing.assert_close(found.s[:size], expected[: len(found.s)], rtol=1e-3, atol=1e-4)
    again = found.cut(rank).dense(product.shape)
    torch.testing.assert_close(again, product, rtol=1e-3, atol=1e-4)


def test_both_factors_carry_the_scale_alike() -> None:
    matrix = torch.randn(9, 7) * 1e4
    for spectral in (svd_exact(matrix, 7), svd_gram(matrix, 7)):
        left, right = spectral.cut(3)
        torch.testing.assert_close(left.norm(dim=0), right.norm(dim=0), rtol=1e-4, atol=0)
