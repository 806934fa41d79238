"""Codecs on other devices: the meta device, which has no values, and CUDA where there is one."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusionkit import (
    DBMS,
    EMR,
    SVD,
    TIES,
    Dense,
    MagnitudePrune,
    Mean,
    Merged,
    Normalized,
    TaskArithmetic,
)
from fusionkit.bundles.compress import compress
from fusionkit.codecs.base import WHOLE_MODEL, DeltaCodec
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.vectors import TaskVectors
from fusionkit.testing import models

META = torch.device("meta")
CODECS: dict[str, DeltaCodec] = {
    "EMR": EMR(),
    "EMR int4": EMR(dtype="int4", scope="tensor", rescale="l2"),
    "dense": Dense(),
    "dense int8": Dense("int8"),
    "merged": Merged(Normalized(TIES())),
    "SVD": SVD(rank=2),
    "SVD int4": SVD(ratio=0.3, dtype="int4"),
    "pruned": MagnitudePrune(0.2),
    "pruned per tensor": MagnitudePrune(0.2, scope="tensor"),
    "PERU-FFT": MagnitudePrune(0.2, merge=TaskArithmetic()),
    "DBMS": DBMS(MagnitudePrune(0.1), grid=()),
}
FREE = ["EMR", "EMR int4", "dense", "dense int8", "merged", "SVD", "SVD int4"]
"""Those whose decoding does not hang on values: how many are kept, or two scalars."""


@pytest.mark.parametrize("name", FREE)
def test_decoding_stays_on_the_parts_device(name: str) -> None:
    """No tensor of another device is made on the way: the meta device mixes with none."""
    bundle = compress(codec=CODECS[name], **models())
    for task in bundle.tasks:
        for tensor in bundle.manifest.base.names("delta"):
            parts = {
                **bundle.shared_parts(WHOLE_MODEL),
                **bundle.task_parts(task, WHOLE_MODEL),
                **bundle.shared_parts(tensor),
                **bundle.task_parts(task, tensor),
            }
            if not bundle.task_parts(task, tensor) and not bundle.shared_parts(tensor):
                continue
            there = {part: value.to(META) for part, value in parts.items()}
            shape = bundle.base[tensor].shape
            found = bundle.codec.decode(there, shape)
            assert (found.device, found.shape, found.dtype) == (META, shape, torch.float32)


class OnMeta(TaskVectors):
    """Task vectors without values."""

    def blocks(
        self,
        size: int | None = None,
        tasks: Sequence[int] | None = None,
        step: int | None = None,
    ) -> Iterator[tuple[slice, Tensor]]:
        """All in one."""
        count = self.shape.numel()
        yield slice(0, count), torch.empty(len(tasks or self.tasks), count, device=META)


@pytest.mark.parametrize("merge", [Mean(), TaskArithmetic(), TIES(), Normalized()], ids=repr)
def test_merging_stays_on_the_vectors_device(merge: Any) -> None:
    family = Family(**models())
    merge_tensor = merge.prepare(family)
    square = family.vectors("square")
    assert merge_tensor(OnMeta(square.base_at, square.tuned_at, META)).device == META


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CODECS)
def test_a_bundle_made_on_cuda(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The same parts as on the CPU; masks and positions to the bit, values to rounding."""
    arguments = models(dtype)
    here = compress(codec=CODECS[name], out=tmp_path / "cpu", **arguments)
    there = compress(codec=CODECS[name], out=tmp_path / "cuda", device="cuda", **arguments)
    for task in here.tasks:
        for tensor in here.manifest.base.names("delta"):
            ours, theirs = here.task_parts(task, tensor), there.task_parts(task, tensor)
            assert ours.keys() == theirs.keys()
            for part, value in ours.items():
                exact = part in ("mask", "positions") and "PERU" not in name
                check_close(theirs[part], value, exact)


@needs_cuda
@pytest.mark.parametrize("name", CODECS)
def test_decoding_on_cuda(name: str) -> None:
    bundle = compress(codec=CODECS[name], **models())
    for task in bundle.tasks:
        for tensor in bundle.manifest.base.names("delta"):
            here, there = (bundle.delta(task, tensor, torch.device(d)) for d in ("cpu", "cuda"))
            assert (here is None) == (there is None)
            if here is not None and there is not None:
                assert there.device.type == "cuda"
                check_close(there.cpu(), here)


@needs_cuda
def test_what_is_not_finite_in_both_is_no_delta_on_cuda() -> None:
    inf = float("inf")
    base = torch.tensor([inf, -inf, float("nan"), 1.0], dtype=torch.float16)
    tuned = {"w": torch.cat([base[:3].float(), torch.tensor([3.0])])}
    vectors = Family({"w": base}, {"a": tuned}, device="cuda").vectors("w")
    assert vectors[0].tolist() == [0, 0, 0, 2]
    assert next(vectors.blocks())[1].tolist() == [[0, 0, 0, 2]]


def check_close(found: Tensor, wanted: Tensor, exact: bool = False) -> None:
    if exact or not wanted.is_floating_point():
        difference = (found != wanted).sum()
        assert difference <= (0 if exact else 0.01 * wanted.numel())
        return
    assert torch.allclose(found.float(), wanted.float(), rtol=1e-2, atol=1e-3)
