"""The same of the plugins' codecs."""

from typing import Any

import numpy as np
import torch

from bounds.formulas import check_cut, check_error, top_k
from bounds.merging import merged
from bounds.rounding import Allowed, allowed
from bounds.seen import SLACK, TINY, Seen, check_within, double
from fusionkit import SVD
from fusionkit.codecs.decomposition import matrix_of
from fusionkit.codecs.merged import decode_shared
from fusionkit.registry import load

_FLOAT = 2.0**-11
"""By which sums over a whole tensor may be off in float32."""
_ALL = 1e-3
"""Of ‖δ‖, what float32 and the ends of iterations leave."""


def _registered(id_: str) -> Any:
    return check_error.register(load("fusionkit.codecs", id_))


@_registered("bitdelta")
def _(codec: Any, seen: Seen) -> None:
    """A sgn(δ), a the mean of |δ|; the error's energy is ‖δ‖² - n a² of every scale's n entries."""
    for name, place, task in places(seen):
        wanted, parts = seen.wanted[name][place], seen.own(task, name)
        what = f"{name} of {task}"
        if not parts:
            assert not wanted.any(), what
            continue
        if "values" in parts:
            limit = allowed(wanted.reshape(-1), codec.dtype)
            check_within(seen.found[name][place], wanted, limit, what)
            continue
        matrix = np.abs(wanted).reshape(matrix_of(torch.Size(wanted.shape)))
        axis = {"matrix": None, "row": 1, "column": 0}[codec.scales]
        scale = np.broadcast_to(matrix.mean(axis, keepdims=True), matrix.shape)
        half = allowed(scale, "fp32" if codec.scales == "matrix" else "bf16").each
        limit = Allowed(half + _FLOAT * scale, float(np.square(half + _FLOAT * scale).sum()))
        signed = np.where(wanted >= 0, 1, -1) * scale.reshape(wanted.shape)
        check_within(seen.found[name][place], signed, limit, what)


@_registered("compeft")
def _(codec: Any, seen: Seen) -> None:
    """The largest entries become plus or minus one scalar a task, the others zero."""
    kept = top_k(seen.flat, codec.density)
    for place, task in seen.tasks:
        values, mask = seen.flat[place], kept[place] > 0
        scale = np.abs(values[mask]).mean() if mask.any() else 0.0
        if codec.scale is not None:
            scale = codec.scale * values.std()
        wanted = np.sign(values) * mask * scale
        each = np.full(len(wanted), 1e-5 * scale)
        limit = Allowed(each, float(np.square(each).sum()))
        check_within(seen.joined(seen.found)[place], wanted, limit, task)


@_registered("dare")
def _(codec: Any, seen: Seen) -> None:
    """γ δ / (1 - p) where its key keeps an entry, else 0; kept values are off by rounding."""
    from fusionkit_dare import kept, key_of

    for name, place, task in places(seen):
        wanted, parts = seen.wanted[name][place].reshape(-1), seen.own(task, name)
        if not parts:
            continue
        key, *more = parts["key"].tolist()
        assert key == key_of(codec.seed, task, name), f"{name} of {task}"
        drop = 1 - more[0] / 2**53 if more else codec.drop
        assert abs(drop - codec.drop) <= codec.spread * (1 + len(wanted)), f"{name} of {task}"
        mask = kept(key, len(wanted), drop, torch.device("cpu")).numpy()
        factor = 1.0
        if codec.shrink < 1:
            factor = _shrunk(codec, seen, place)
        stored = wanted[mask] * factor
        limit = allowed(stored, codec.dtype)
        each, value = np.zeros(len(wanted)), np.zeros(len(wanted))
        each[mask], value[mask] = limit.each / (1 - drop), stored / (1 - drop)
        each += 1e-4 * (factor < 1) * np.abs(value)
        bound = Allowed(each, limit.energy / (1 - drop) ** 2 + float(np.square(each).sum()))
        check_within(seen.found[name][place], value, bound, f"{name} of {task}", TINY / (1 - drop))


def _shrunk(codec: Any, seen: Seen, place: int) -> float:
    """γ: the least trace norm of any task over this one's."""
    norms = np.zeros(len(seen.flat))
    for wanted in seen.wanted.values():
        if wanted.ndim > 2 and wanted[0].size:
            for task, delta in enumerate(wanted):
                matrix = delta.reshape(matrix_of(torch.Size(delta.shape)))
                norms[task] += np.linalg.svd(matrix, compute_uv=False).sum()
    if not norms[place]:
        return 1.0
    return float(np.clip(norms[norms > 0].min() / norms[place], codec.shrink, 1.0))


@_registered("jd")
def _(codec: Any, seen: Seen) -> None:
    """Never further off than zero is; nothing is lost where the rank is all tasks' together."""
    for name, wanted in seen.wanted.items():
        rows, columns = matrix_of(torch.Size(wanted.shape[1:]))
        for place, task in seen.tasks:
            delta, parts = wanted[place], seen.own(task, name)
            found, what = seen.found[name][place], f"{name} of {task}"
            if "values" in parts:
                check_within(found, delta, allowed(delta.reshape(-1), codec.dtype), what)
                continue
            size = float(np.sqrt(np.square(delta).sum()))
            off = float(np.sqrt(np.square(found - delta).sum()))
            rounding = _of_core(codec, seen, name, parts, rows, columns)
            assert off <= size * (1 + _ALL) + rounding, f"{what}: off by {off:.3g} of {size:.3g}"
            exact = (
                codec.form == "full" and codec.rank >= min(rows, columns) and codec.dtype == "fp32"
            )
            if exact and "core" in parts and codec.clusters == 1:
                assert off <= 0.01 * size + rounding, f"{what}: off by {off:.3g} of {size:.3g}"


def _of_core(codec: Any, seen: Seen, name: str, parts: Any, rows: int, columns: int) -> float:
    """‖U‖ ‖V‖ times what rounding takes from Σ."""
    from fusionkit.codecs.values import unpack_values

    if "core" not in parts:
        return 0.0
    cluster = int(parts["cluster"]) if "cluster" in parts else 0
    shared = seen.bundle.shared_parts(name)
    left = double(unpack_values(shared, rows, codec.dtype, f"left.{cluster}"))
    right = double(unpack_values(shared, columns, codec.dtype, f"right.{cluster}"))
    core = double(unpack_values(parts, left.shape[1], codec.dtype, "core"))
    error = 3 * allowed(core, codec.dtype).norm  # of values that are larger by what they are off
    return error * float(np.linalg.norm(left, 2) * np.linalg.norm(right, 2))


@_registered("lossless")
def _(codec: Any, seen: Seen) -> None:
    """Every bit."""
    for name in seen.family.names("delta"):
        for task, model in seen.family.finetuned.items():
            base = seen.bundle.base[name]
            found = seen.bundle.tensor(task, name, base)
            whole = base if found is None else found
            tuned = model[name]
            assert whole.dtype == tuned.dtype, f"{name} of {task}"
            bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (whole, tuned)]
            assert torch.equal(*bits), f"{name} of {task}"


@_registered("tall_mask")
def _(codec: Any, seen: Seen) -> None:
    """M_t ⊙ τ*, as stored; M_t where |τ_t| ≥ λ |τ* - τ_t|, but where rounding decides."""
    one, _, slack = merged(codec.merge, seen.flat)
    spread = (seen.split(np.broadcast_to(each, seen.flat.shape)) for each in (one, slack))
    stars, slacks = spread
    for name, place, task in places(seen):
        shape = torch.Size(seen.wanted[name].shape[1:])
        star = double(decode_shared(seen.bundle.shared_parts(name), shape, codec.dtype)).reshape(-1)
        check_within(
            star, stars[name][0], allowed(stars[name][0], codec.dtype), name, slacks[name][0]
        )
        delta = seen.wanted[name][place].reshape(-1)
        gap = np.abs(delta) - codec.threshold * np.abs(star - delta)
        sure = np.abs(gap) > SLACK * (np.abs(delta) + codec.threshold * np.abs(star)) + TINY
        value = np.where(gap > 0, star, 0.0)
        found = seen.found[name][place].reshape(-1)
        none = Allowed(np.zeros(int(sure.sum())), 0.0)
        check_within(found[sure], value[sure], none, f"{name} of {task}")
        near = np.minimum(np.abs(found), np.abs(found - star))
        assert (near <= SLACK * np.abs(star) + TINY).all(), f"{name} of {task} is no mask"


@_registered("tsv")
def _(codec: Any, seen: Seen) -> None:
    """The tail of the spectrum beyond a T-th of it, as of an SVD."""
    svd = SVD(ratio=1 / (codec.tasks or len(seen.flat)), dtype=codec.dtype)
    for name, place, task in places(seen):
        check_cut(svd, seen, name, place, task)


def places(seen: Seen) -> list[tuple[str, int, str]]:
    """Each tensor's name, task's place and name."""
    return [(name, place, task) for name in seen.wanted for place, task in seen.tasks]
