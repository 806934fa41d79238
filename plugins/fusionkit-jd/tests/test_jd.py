"""Joint diagonalisation (2407.00066): closed forms, optima, clusters, adapters, bundles."""

import json
from pathlib import Path

import pytest
import torch
from fusionkit_jd import JointDiagonalization
from safetensors.torch import save_file
from torch import Tensor

import fusionkit
from fusionkit import LowRank
from fusionkit.errors import CodecError
from fusionkit.testing import CodecContract

ROWS, COLUMNS = 40, 30


class TestContract(CodecContract):
    codecs = (
        JointDiagonalization(rank=4),
        JointDiagonalization(rank=3, form="diagonal", normalize=False),
        JointDiagonalization(rank=2, clusters=2, dtype="int8"),
    )


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator)).Q


def draw(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def low(rank: int, seed: int) -> Tensor:
    return draw(ROWS, rank, seed) @ draw(rank, COLUMNS, seed + 100)


def compressed(deltas: list[Tensor], **settings: object) -> fusionkit.Bundle:
    base = {"w": torch.zeros(deltas[0].shape)}
    tuned = {f"t{place}": {"w": delta} for place, delta in enumerate(deltas)}
    codec = JointDiagonalization(**{"dtype": "fp32", **settings})  # type: ignore[arg-type]
    return fusionkit.compress(base, tuned, codec)


def decoded(bundle: fusionkit.Bundle, place: int) -> Tensor:
    found = bundle.delta(f"t{place}", "w")
    assert found is not None
    return found


def errors(deltas: list[Tensor], **settings: object) -> list[float]:
    bundle = compressed(deltas, **settings)
    return [
        float((decoded(bundle, t) - delta).norm() / delta.norm()) for t, delta in enumerate(deltas)
    ]


@pytest.mark.parametrize("form", ["full", "diagonal"])
@pytest.mark.parametrize("clusters", [1, 2])
def test_nothing_is_lost_at_the_sum_of_the_ranks(form: str, clusters: int) -> None:
    deltas = [low(2, 0), 0.01 * low(3, 1), 30 * low(1, 2)]
    assert max(errors(deltas, rank=6, form=form, clusters=clusters)) < 1e-4


@pytest.mark.parametrize("form", ["full", "diagonal"])
def test_of_one_task_it_is_the_truncated_svd(form: str) -> None:
    delta = draw(ROWS, COLUMNS, 0)
    s = torch.linalg.svdvals(delta)
    for rank in (1, 4):
        [found] = errors([delta], rank=rank, form=form)
        assert found == pytest.approx(float(s[rank:].norm() / s.norm()), rel=1e-4)


def test_shared_directions_are_found() -> None:
    """δ_t = U Σ_t Vᵀ with full cores: exact at the rank of U and V, whatever T is."""
    u, v = orthonormal(ROWS, 3, 0), orthonormal(COLUMNS, 3, 1)
    deltas = [u @ draw(3, 3, seed) @ v.T for seed in range(6)]
    assert max(errors(deltas, rank=3)) < 1e-4
    bundle = compressed(deltas, rank=3)
    for place in range(6):
        assert bundle.task_parts(f"t{place}", "w")["core"].shape == (3, 3)


def test_shared_rank_one_terms_are_found() -> None:
    """δ_t = U D_t Vᵀ: a diagonal is enough, and U and V need not be orthonormal."""
    u, v = draw(ROWS, 4, 0), draw(COLUMNS, 4, 1)
    deltas = [(u * draw(1, 4, seed)) @ v.T for seed in range(2, 9)]
    assert max(errors(deltas, rank=4, form="diagonal")) < 1e-3
    bundle = compressed(deltas, rank=4, form="diagonal")
    assert bundle.task_parts("t0", "w")["core"].shape == (4,)
    u, v = orthonormal(ROWS, 4, 0), orthonormal(COLUMNS, 4, 1)
    deltas = [(u * draw(1, 4, seed)) @ v.T for seed in range(2, 9)]
    assert max(errors(deltas, rank=4, form="diagonal")) < 1e-4


def test_the_full_form_holds_the_most_there_is() -> None:
    """Rank-one deltas in orthogonal places: the r strongest are kept, of each normalized share."""
    u, v = orthonormal(ROWS, 5, 0), orthonormal(COLUMNS, 5, 1)
    strengths = [5.0, 4.0, 3.0, 2.0, 1.0]
    deltas = [s * torch.outer(u[:, k], v[:, k]) for k, s in enumerate(strengths)]
    for form in ("full", "diagonal"):
        found = errors(deltas, rank=2, form=form, normalize=False)
        assert found == pytest.approx([0, 0, 1, 1, 1], abs=1e-3)
        found = errors(deltas, rank=2, form=form)  # all count alike: any two
        assert sum(found) == pytest.approx(3, abs=1e-3)


def test_no_small_turn_of_the_shared_factors_holds_more() -> None:
    deltas = [low(4, seed) for seed in range(5)]
    bundle = compressed(deltas, rank=6)
    shared = bundle.shared_parts("w")
    u, v = (torch.linalg.qr(shared[f"{side}.0"].double()).Q for side in ("left", "right"))
    unit = [delta.double() / delta.norm() for delta in deltas]

    def held(u: Tensor, v: Tensor) -> float:
        return sum(float((u.T @ delta @ v).square().sum()) for delta in unit)

    best = held(u, v)
    for seed in range(20):
        turned = [
            torch.linalg.qr(side + 0.02 * draw(*side.shape, seed).double()).Q for side in (u, v)
        ]
        assert held(*turned) < best
        random = [orthonormal(side.shape[0], 6, seed).double() for side in (u, v)]
        assert held(*random) < best


def test_cores_are_least_squares_for_the_factors_as_they_are_stored() -> None:
    """Coarse U and V are no longer orthonormal; Σ_t makes up for it."""
    deltas = [low(3, seed) for seed in range(4)]
    bundle = compressed(deltas, rank=8, dtype="int8")
    for place, delta in enumerate(deltas):
        parts = {**bundle.shared_parts("w"), **bundle.task_parts(f"t{place}", "w")}
        left, right = (
            parts[f"{side}.0"].float() * parts[f"{side}.0.scale"].float()
            for side in ("left", "right")
        )
        wanted = torch.linalg.lstsq(right, torch.linalg.lstsq(left, delta).solution.T).solution.T
        core = parts["core"].float() * parts["core.scale"].float()
        assert (core - wanted).abs().max() < 0.01 * wanted.abs().max()


def test_clusters_find_the_sets() -> None:
    """Tasks of three subspaces, mixed: three U and V hold all, one alone does not."""
    spaces = [(orthonormal(ROWS, 3, s), orthonormal(COLUMNS, 3, s + 10)) for s in range(3)]
    deltas = [spaces[t % 3][0] @ draw(3, 3, t) @ spaces[t % 3][1].T for t in range(12)]
    assert max(errors(deltas, rank=3, clusters=3)) < 1e-4
    assert max(errors(deltas, rank=3)) > 0.5
    bundle = compressed(deltas, rank=3, clusters=3)
    found = [int(bundle.task_parts(f"t{t}", "w")["cluster"]) for t in range(12)]
    assert all(found[t] == found[t % 3] for t in range(12))
    assert len(set(found)) == 3


@pytest.mark.parametrize("form", ["full", "diagonal"])
def test_a_task_added_later_is_fitted_to_what_is_there(form: str, tmp_path: Path) -> None:
    u, v = orthonormal(ROWS, 3, 0), orthonormal(COLUMNS, 3, 1)
    deltas = [(u * draw(1, 3, seed)) @ v.T for seed in range(5)]
    base = {"w": torch.zeros(ROWS, COLUMNS)}
    tuned = {f"t{place}": {"w": delta} for place, delta in enumerate(deltas)}
    last = tuned.pop("t4")
    codec = JointDiagonalization(rank=3, form=form, dtype="fp32")  # type: ignore[arg-type]
    bundle = fusionkit.compress(base, tuned, codec, tmp_path / "b")
    fusionkit.add_tasks(bundle, {"t4": last, "other": {"w": low(2, 9)}}, keep_shared=True)
    opened = fusionkit.Bundle(tmp_path / "b", base)
    torch.testing.assert_close(opened.delta("t4", "w"), last["w"], rtol=1e-3, atol=1e-4)
    other = opened.delta("other", "w")
    assert other is not None
    assert float((other - low(2, 9)).norm()) < float(low(2, 9).norm())


def test_a_task_that_did_not_move_stays() -> None:
    deltas = [low(2, 0), torch.zeros(ROWS, COLUMNS), low(2, 1)]
    bundle = compressed(deltas, rank=4)
    assert not bundle.task_parts("t1", "w")
    found = bundle.delta("t1", "w")
    assert found is None or not found.any()
    assert bundle.factors("t1", "w") is None
    torch.testing.assert_close(decoded(bundle, 2), deltas[2], rtol=1e-3, atol=1e-4)


def test_deltas_too_small_for_fp16_are_none() -> None:
    """As they are to every codec; in bf16 they are kept."""
    deltas = [1e-30 * low(2, seed) for seed in range(3)]
    for form in ("full", "diagonal"):
        assert not decoded(compressed(deltas, rank=6, form=form, dtype="fp16"), 0).any()
        found = decoded(compressed(deltas, rank=6, form=form, dtype="bf16"), 0)
        torch.testing.assert_close(found, deltas[0], rtol=0, atol=1e-31)


def test_what_would_not_become_smaller_is_kept_whole() -> None:
    deltas = [draw(6, 5, seed) for seed in range(2)]
    bundle = compressed(deltas, rank=8)
    assert not bundle.shared_parts("w")
    assert torch.equal(decoded(bundle, 1), deltas[1])


def adapter(folder: Path, seed: int, rank: int = 4) -> Tensor:
    """Write a LoRA of one layer in PEFT's format; returns its product, scaled."""
    a, b = draw(rank, COLUMNS, seed), draw(ROWS, rank, seed + 50)
    folder.mkdir(parents=True)
    names = {"lora_A": a, "lora_B": b}
    tensors = {f"base_model.model.layer.{n}.weight": each for n, each in names.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return 2 * b @ a


@pytest.mark.parametrize("form", ["full", "diagonal"])
def test_adapters_products_are_never_formed(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    products = {f"t{seed}": adapter(tmp_path / f"t{seed}", seed) for seed in range(3)}
    base = {"layer.weight": torch.randn(ROWS, COLUMNS)}
    codec = JointDiagonalization(rank=12, form=form, clusters=1, dtype="fp32")  # type: ignore[arg-type]

    def forbidden(self: LowRank, shape: torch.Size) -> Tensor:
        raise AssertionError("formed")

    with monkeypatch.context() as context:
        context.setattr(LowRank, "dense", forbidden)
        bundle = fusionkit.compress(base, {t: str(tmp_path / t) for t in products}, codec)
    for task, product in products.items():
        torch.testing.assert_close(
            bundle.delta(task, "layer.weight"), product, rtol=1e-3, atol=1e-3
        )
        factors = bundle.factors(task, "layer.weight")
        assert factors is not None
        assert factors.left.shape[1] <= 12


def test_it_is_exported_as_a_lora(tmp_path: Path) -> None:
    for seed in range(3):
        adapter(tmp_path / f"t{seed}", seed)
    base = {"layer.weight": torch.randn(ROWS, COLUMNS)}
    tuned = {f"t{seed}": str(tmp_path / f"t{seed}") for seed in range(3)}
    bundle = fusionkit.compress(base, tuned, JointDiagonalization(rank=5), tmp_path / "bundle")
    fusionkit.export_adapter(bundle, "t1", tmp_path / "lora")
    again = fusionkit.compress(
        base, {"t1": str(tmp_path / "lora")}, fusionkit.SVD(rank=5, dtype="fp32")
    )
    torch.testing.assert_close(
        again.delta("t1", "layer.weight"), bundle.delta("t1", "layer.weight"), rtol=1e-2, atol=2e-2
    )


def test_a_task_costs_a_core_on_disk(tmp_path: Path) -> None:
    deltas = [draw(200, 300, seed) for seed in range(2)]
    base = {"w": torch.zeros(200, 300)}
    tuned = {f"t{place}": {"w": delta} for place, delta in enumerate(deltas)}
    for form, values in (("full", 64), ("diagonal", 8)):
        codec = JointDiagonalization(rank=8, form=form)  # type: ignore[arg-type]
        bundle = fusionkit.compress(base, tuned, codec, tmp_path / form)
        assert sum(part.nbytes for part in bundle.task_parts("t0", "w").values()) == 2 * values
        shared = sum(part.nbytes for part in bundle.shared_parts("w").values())
        assert shared == 2 * 8 * (200 + 300)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 0}, "rank to be at least 1, got 0"),
        ({"clusters": 0}, "clusters in 1 to 256, got 0"),
        ({"clusters": 257}, "clusters in 1 to 256, got 257"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, int], said: str) -> None:
    with pytest.raises(CodecError, match=said):
        JointDiagonalization(**settings)
