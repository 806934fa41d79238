"""Codecs with any of their settings, for Hypothesis."""

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from fusionkit import (
    DBMS,
    EMR,
    SVD,
    TIES,
    Dense,
    Elect,
    MagnitudePrune,
    Mean,
    Merged,
    Normalized,
    Sketch,
    TaskArithmetic,
)
from fusionkit.codecs.base import DeltaCodec
from fusionkit.registry import load

DTYPE = st.sampled_from(("fp32", "fp16", "bf16", "int8", "int4", "int3", "int2"))
DENSITY = st.sampled_from((0.0, 0.01, 0.1, 0.5, 1.0))


def _plugin(id_: str) -> type[DeltaCodec]:
    """A plugin's codec."""
    found: type[DeltaCodec] = load(DeltaCodec.group, id_)
    return found


def merges() -> st.SearchStrategy[Any]:
    """Merges, some of them nested."""
    some = st.one_of(
        st.just(Mean()),
        st.just(Elect()),
        st.builds(TaskArithmetic, st.sampled_from((0.3, 1.0, -2.0))),
        st.builds(
            TIES, st.sampled_from((0.1, 0.5, 1.0)), aggregate=st.sampled_from(("mean", "sum"))
        ),
    )
    return st.one_of(some, st.builds(Normalized, some, st.sampled_from((0.5, 1.0))))


def svds() -> st.SearchStrategy[SVD]:
    """Each way to say how much is kept."""
    rest = {"dtype": DTYPE, "vectors": st.sampled_from(("whole", "drop"))}
    any_method = st.sampled_from(("auto", "exact", "gram", "randomized"))
    whole = st.sampled_from(("auto", "exact", "gram"))
    share = st.sampled_from((0.3, 0.9, 1.0))
    return st.one_of(
        st.builds(SVD, rank=st.sampled_from((1, 2, 5, 100)), method=any_method, **rest),
        st.builds(SVD, ratio=st.sampled_from((0.1, 0.5, 1.0)), method=any_method, **rest),
        st.builds(
            SVD, energy=share, method=whole, scope=st.sampled_from(("tensor", "model")), **rest
        ),
        st.builds(SVD, budget=st.sampled_from((600, 2000, 20_000)), method=whole, **rest),
    )


def wrapped() -> st.SearchStrategy[DeltaCodec]:
    """Codecs that take each task by itself."""
    return st.one_of(
        st.builds(Dense, DTYPE),
        st.builds(MagnitudePrune, DENSITY, st.sampled_from(("model", "tensor")), dtype=DTYPE),
        st.builds(SVD, rank=st.sampled_from((1, 3)), dtype=DTYPE),
    )


def sketches() -> st.SearchStrategy[Sketch]:
    """By bits, bytes and noise."""
    return st.one_of(
        st.builds(Sketch, bits=st.sampled_from((0.05, 1.0, 8.0)), sketch=st.booleans()),
        st.builds(Sketch, bytes=st.sampled_from((1, 5000, 200_000)), sketch=st.booleans()),
        st.builds(Sketch, noise=st.sampled_from((1e-4, 0.01, 1.0))),
    )


CODECS: dict[str, Callable[[], st.SearchStrategy[DeltaCodec]]] = {
    "dense": lambda: st.builds(Dense, DTYPE),
    "magnitude_prune": lambda: st.builds(
        MagnitudePrune,
        DENSITY,
        st.sampled_from(("model", "tensor")),
        st.one_of(st.none(), merges()),
        DTYPE,
    ),
    "merged": lambda: st.builds(Merged, merges(), DTYPE),
    "emr": lambda: st.builds(
        EMR,
        st.sampled_from(("l1", "l1_mean", "l2", "none")),
        st.sampled_from(("model", "tensor")),
        DTYPE,
    ),
    "svd": svds,
    "sketch": sketches,
    "bitdelta": lambda: st.builds(
        _plugin("bitdelta"),
        keep=st.sampled_from(((), ("*.0.*",))),
        dtype=DTYPE,
        scales=st.sampled_from(("matrix", "row", "column")),
    ),
    "compeft": lambda: st.builds(
        _plugin("compeft"), st.sampled_from((0.01, 0.3, 1.0)), st.sampled_from((None, 0.5, 2.0))
    ),
    "dare": lambda: st.builds(
        _plugin("dare"),
        st.sampled_from((0.1, 0.5, 0.9)),
        st.integers(0, 3),
        DTYPE,
        st.sampled_from((0.0, 0.05)),
        st.sampled_from((1.0, 0.5)),
    ),
    "jd": lambda: st.builds(
        _plugin("jd"),
        st.sampled_from((1, 3, 40)),
        st.sampled_from(("full", "diagonal")),
        st.sampled_from((1, 2)),
        st.booleans(),
        DTYPE,
    ),
    "lossless": lambda: st.builds(_plugin("lossless"), st.sampled_from((1, 9))),
    "tall_mask": lambda: st.builds(
        _plugin("tall_mask"),
        st.sampled_from((0.0, 0.4, 2.0)),
        st.one_of(st.none(), st.just(Mean())),
        DTYPE,
    ),
    "tsv": lambda: st.builds(_plugin("tsv"), st.sampled_from((None, 1, 4)), DTYPE),
    "dbms": lambda: st.builds(
        DBMS,
        wrapped(),
        st.one_of(st.none(), wrapped()),
        st.sampled_from(((), (0.0,), (0.0, 1.0, 2.0))),
    ),
}
"""Codec's id → it, with any of its settings."""
