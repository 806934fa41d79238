"""What each built-in codec may miss, by the formula that its docstring states."""

from functools import singledispatch

import numpy as np
import torch

from bounds.merging import merged, unsure_of
from bounds.rounding import Allowed, Doubles, allowed
from bounds.seen import SLACK, TINY, Seen, check_within, double
from fusionkit import DBMS, EMR, SVD, Dense, Elect, MagnitudePrune, Merged, Sketch, compress
from fusionkit.codecs.base import DeltaCodec
from fusionkit.codecs.decomposition import matrix_of
from fusionkit.codecs.merged import decode_shared
from fusionkit.codecs.values import unpack_values

_GRAM = 1e-5
"""Of ‖δ‖, by which a decomposition may miss the optimum."""
_LEVELS = {"int8": 254, "int4": 14, "int3": 7, "int2": 3}


@singledispatch
def check_error(codec: DeltaCodec, seen: Seen) -> None:
    """Hold what was found to what the codec says that it keeps."""
    raise TypeError(f"no bound of {codec!r}")


@check_error.register
def _(codec: Dense, seen: Seen) -> None:
    for name, wanted in seen.wanted.items():
        for place, task in seen.tasks:
            limit = allowed(wanted[place].reshape(-1), codec.dtype)
            check_within(seen.found[name][place], wanted[place], limit, f"{name} of {task}")


@check_error.register
def _(codec: Merged, seen: Seen) -> None:
    one, other, slack = merged(codec.merge, seen.flat)
    count = len(seen.flat)
    parts = (seen.split(np.broadcast_to(each, (count, len(each)))) for each in (one, other, slack))
    for (name, a), b, s in zip(
        next(parts).items(), *(each.values() for each in parts), strict=True
    ):
        limit = allowed(np.maximum(np.abs(a[0]), np.abs(b[0])), codec.dtype)
        for place, task in seen.tasks:
            found = seen.found[name][place].reshape(-1)
            nearest = np.where(np.abs(found - a[0]) <= np.abs(found - b[0]), a[0], b[0])
            wider = limit.each.max(initial=0.0) * SLACK if codec.dtype.startswith("int") else 0.0
            check_within(found, nearest, limit, f"{name} of {task}", s[0] * 1.1 + wider)


@check_error.register
def _(codec: MagnitudePrune, seen: Seen) -> None:
    """Each entry that is kept is off by rounding, the others by all of what they were."""
    star = {
        name: double(
            decode_shared(seen.bundle.shared_parts(name), torch.Size(w.shape[1:]), codec.dtype)
        )
        for name, w in seen.wanted.items()
    }
    rest = {
        name: (w.astype(np.float32) - star[name].astype(np.float32)).astype(np.float64)
        for name, w in seen.wanted.items()
    }
    of_model = seen.split(top_k(seen.joined(rest), codec.density))
    for name, residual in rest.items():
        flat = residual.reshape(len(residual), -1)
        kept = of_model[name] if codec.scope == "model" else top_k(flat, codec.density)
        for place, task in seen.tasks:
            mask = kept[place] > 0
            limit = allowed(flat[place][mask], codec.dtype)
            each = np.zeros(flat.shape[1])
            each[mask] = limit.each
            wanted = np.where(mask, flat[place], 0) + star[name].reshape(-1)
            slack = SLACK * np.abs(star[name]).reshape(-1)
            check_within(
                seen.found[name][place],
                wanted,
                Allowed(each, limit.energy),
                f"{name} of {task}",
                slack,
            )


def top_k(flat: Doubles, density: float) -> Doubles:
    """1 at each row's largest magnitudes, the first of equal ones; never at zeros."""
    kept = np.zeros_like(flat)
    for row, values in zip(kept, np.abs(flat), strict=True):
        first = np.argsort(-values, kind="stable")[: round(density * len(values))]
        row[first] = values[first] > 0
    return kept


@check_error.register
def _(codec: EMR, seen: Seen) -> None:
    """λ_t M_t ⊙ τ_uni; its masks and rescalers by the formula, from the task vectors alone."""
    stored: dict[str, Doubles] = {}
    for name, wanted in seen.wanted.items():
        parts, count = seen.bundle.shared_parts(name), wanted[0].size
        stored[name] = (
            double(unpack_values(parts, count, codec.dtype, "elected"))
            if parts
            else np.zeros(count)
        )
    masks, sums = {}, []
    for name, wanted in seen.wanted.items():
        flat = wanted.reshape(len(wanted), -1)
        elected, other, _ = merged(Elect(), flat)
        elected = np.where(elected * stored[name] < 0, other, elected)
        limit = allowed(elected, codec.dtype)
        if seen.bundle.shared_parts(name):
            check_within(stored[name], elected, limit, f"elected {name}")
        # Products of the smallest values vanish: the signs count.
        mask = (np.sign(flat) * np.sign(elected)) > 0
        masks[name] = mask, elected, limit, unsure_of(flat)
        sums.append(_rescaler_sums(codec, flat, mask * np.abs(elected)))
    total = np.sum(sums, 0) if sums else np.ones((2, len(seen.flat)))
    for (name, (mask, elected, limit, unsure)), own in zip(masks.items(), sums, strict=True):
        top, bottom = total if codec.scope == "model" else own
        for place, task in seen.tasks:
            parts = {**seen.own(task), **seen.own(task, name)}
            if "mask" not in parts:
                assert not elected.any(), f"{name} of {task} is not stored"
                continue
            found = float(parts["rescaler"])
            wanted = top[place] / bottom[place] if bottom[place] > 0 else 1.0
            if codec.rescale == "none":
                wanted = 1.0
            if not any(each[3].any() for each in masks.values()):
                assert abs(found - wanted) <= 1e-3 * wanted, (
                    f"{name} of {task}: λ {found}, {wanted}"
                )
            sure = ~unsure
            value = found * mask[place] * elected
            spread = Allowed(found * limit.each[sure], found**2 * limit.energy)
            got = seen.found[name][place].reshape(-1)[sure]
            check_within(got, value[sure], spread, f"{name} of {task}", TINY * (1 + found))


def _rescaler_sums(codec: EMR, flat: Doubles, masked: Doubles) -> Doubles:
    """Numerator and denominator of λ: `(2, T)`."""
    if codec.rescale == "l2":
        return np.stack([(np.abs(flat) * masked).sum(1), np.square(masked).sum(1)])
    found = np.stack([np.abs(flat).sum(1), masked.sum(1)])
    return found / max(flat.shape[1], 1) if codec.rescale == "l1_mean" else found


@check_error.register
def _(codec: SVD, seen: Seen) -> None:
    for name in seen.wanted:
        for place, task in seen.tasks:
            check_cut(codec, seen, name, place, task)
    if codec.budget is not None:
        for _, task in seen.tasks:
            parts = [part for name in seen.wanted for part in seen.own(task, name).values()]
            assert sum(part.nbytes for part in parts) <= codec.budget, task


def check_cut(codec: SVD, seen: Seen, name: str, place: int, task: str) -> None:
    """The tail of the spectrum, and what the factors' rounding takes."""
    wanted, parts = seen.wanted[name][place], seen.own(task, name)
    found, what = seen.found[name][place], f"{name} of {task}"
    rows, columns = matrix_of(torch.Size(wanted.shape))
    full = min(rows, columns)
    if not parts:
        dropped = wanted.ndim < 2 and codec.vectors == "drop"
        shared_out = codec.budget is not None or codec.scope == "model"
        assert dropped or shared_out or not wanted.any(), f"{what} is not stored"
        return
    if "values" in parts:
        check_within(found, wanted, allowed(wanted.reshape(-1), codec.dtype), what)
        return
    spectrum = np.linalg.svd(wanted.reshape(rows, columns), compute_uv=False)
    rank = parts["right"].shape[1]
    tail, total = np.square(spectrum[rank:]).sum(), np.square(spectrum).sum()
    if codec.rank is not None or codec.ratio is not None:
        asked = codec.rank if isinstance(codec.rank, int) else round((codec.ratio or 0) * full)
        assert rank == min(max(asked, 1), full), what
    elif codec.energy is not None and codec.scope == "tensor":
        assert tail <= (1 - codec.energy + 1e-6) * total, what
        assert np.square(spectrum[rank - 1 :]).sum() >= (1 - codec.energy - 1e-6) * total, what
    off = np.sqrt(np.square(found - wanted).sum())
    optimum = np.sqrt(tail) * (1.02 if codec.method == "randomized" else 1) + _GRAM * np.sqrt(total)
    most = optimum + rounded_factors(spectrum[:rank], rows, columns, codec.dtype)
    assert off <= most, f"{what}: off by {off:.3g}, allowed {most:.3g}"


def rounded_factors(spectrum: Doubles, rows: int, columns: int, dtype: str) -> float:
    """What rounding U √Σ and V √Σ takes from their product, at most."""
    root = np.sqrt(spectrum)
    sides = []
    for length in (rows, columns):
        if dtype in _LEVELS:
            error = np.sqrt(length) * root / _LEVELS[dtype] * 1.05 + length * 2.0**-126
        else:
            limit = allowed(root, dtype)
            error = limit.each + np.sqrt(length) * allowed(np.zeros(1), dtype).each
        sides.append(float(np.sqrt(np.square(error).sum())))
    left, right = sides
    return (left + right) * float(root[0]) + left * right + SLACK * float(spectrum.sum()) + TINY


@check_error.register
def _(codec: DBMS, seen: Seen) -> None:
    """Never worse than what it wraps, at its best scale; with no grid, the same."""
    alone = compress(seen.family.base, seen.family.finetuned, codec.codec)
    inner = Seen(codec.codec, seen.family, alone)
    if not codec.grid:
        for name, found in seen.found.items():
            assert np.array_equal(found, inner.found[name]), name
        return
    wanted, coded = seen.flat, inner.joined(inner.found)
    for place, task in seen.tasks:
        size = np.abs(wanted[place]).max(initial=0.0) or 1.0
        delta, other = wanted[place] / size, coded[place] / size
        square = float(other @ other)
        best = delta @ delta - (delta @ other) ** 2 / square if square else delta @ delta
        off = np.square(delta - seen.joined(seen.found)[place] / size).sum()
        assert off <= 1.001 * best + 1e-6 * float(delta @ delta), f"{task}: {off:.4g}, {best:.4g}"


@check_error.register
def _(codec: Sketch, seen: Seen) -> None:
    """What `families` holds it to; here that a zero stays one."""
    for name, wanted in seen.wanted.items():
        for place, task in seen.tasks:
            if not wanted[place].any():
                assert not seen.found[name][place].any(), f"{name} of {task}"
