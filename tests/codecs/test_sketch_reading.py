"""Codes that were read are kept: what comes back is the same, whoever asked before, and how."""

import pytest
import torch
from torch import Tensor

from fusionkit import Sketch, compress
from fusionkit.codecs import sketch, sketch_codes
from fusionkit.codecs.quantized_factors import QuantizedFactors
from fusionkit.codecs.rounded_sketch import integers

SHAPE = torch.Size((96, 320))
CODEC = Sketch(bits=0.6)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """A matrix's directions and sketch, not read yet; of other gains than 1."""
    monkeypatch.setattr(sketch, "_KEPT", sketch.Kept(1 << 26, lambda read: read.nbytes))
    u, v = (torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in SHAPE)
    rest = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    delta = 0.02 * torch.outer(u, v) + 0.01 * rest
    bundle = compress({"w": torch.zeros(SHAPE)}, {"a": {"w": delta}}, CODEC)
    codes = bundle.task_parts("a", "w")["codes"]
    return {"codes": codes, "gains": torch.tensor([[1.25, 0.75]], dtype=torch.float16)}


def test_read_without_gradients_and_learned_from_then(parts: dict[str, Tensor]) -> None:
    with torch.inference_mode():
        wanted = CODEC.decode(parts, SHAPE)
    gains = parts["gains"].float().requires_grad_()
    found = CODEC.decode({**parts, "gains": gains}, SHAPE)
    assert torch.allclose(found, wanted, atol=1e-6)
    found.square().sum().backward()
    assert gains.grad is not None
    assert (gains.grad > 0).all()


def test_who_asked_may_change_what_came() -> None:
    codec = Sketch(bits=0.6, sketch=False)
    delta = torch.outer(torch.linspace(1, 2, 96), torch.linspace(-1, 1, 320))
    bundle = compress({"w": torch.zeros(SHAPE)}, {"a": {"w": delta}}, codec)
    first = bundle.factors("a", "w")
    assert first is not None
    wanted = first.dense(SHAPE)
    for factor in first:
        factor.zero_()
    again = bundle.factors("a", "w")
    assert again is not None
    assert torch.equal(again.dense(SHAPE), wanted)


def test_codes_of_another_dtype_are_refused_after_the_same_bytes(parts: dict[str, Tensor]) -> None:
    CODEC.decode(parts, SHAPE)
    with pytest.raises(ValueError, match=r"expected bytes of codes, got int8 \[\d+\]"):
        CODEC.decode({**parts, "codes": parts["codes"].view(torch.int8)}, SHAPE)


def test_a_vectors_direction_and_its_integers_are_summed() -> None:
    """As any form's, though none is written so."""
    left, right = (torch.ones(n, 1, dtype=torch.int32) for n in (1, 320))
    one = torch.zeros(1, dtype=torch.uint8)
    factors = QuantizedFactors(left, right, 1.0, one, one + 64)
    rounded = integers(torch.randn(320, generator=torch.Generator().manual_seed(0)), 640)
    parts = {}
    for name, kept in ("integers", None), ("both", factors):
        parts[name] = {"codes": sketch_codes.write(sketch_codes.PLAIN, 0, kept, rounded)}
    shape = torch.Size((320,))
    wanted = CODEC.decode(parts["integers"], shape) + 1
    assert torch.allclose(CODEC.decode(parts["both"], shape), wanted)


@pytest.mark.parametrize("shape", [(1, 0), (5, 0), (0, 5)])
def test_a_matrix_of_no_entries_has_no_codes(shape: tuple[int, int]) -> None:
    for form in range(5):
        codes = torch.zeros(20, dtype=torch.uint8)
        codes[0], codes[7] = form, 1
        with pytest.raises(ValueError, match=f"no codes of a {shape[0]} × {shape[1]} matrix"):
            sketch_codes.read(codes, *shape)


def test_a_parameter_is_written_to(parts: dict[str, Tensor]) -> None:
    out = torch.nn.Parameter(torch.zeros(SHAPE))
    assert CODEC.added(parts, torch.ones(SHAPE), out).data_ptr() == out.data_ptr()
    assert torch.equal(out, CODEC.added(parts, torch.ones(SHAPE)))
