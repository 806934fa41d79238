"""Lossless: every bit back, in every dtype, and fewer of them on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from fusionkit_lossless import Lossless
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fusionkit
from fusionkit import DBMS, Bundle, MagnitudePrune, ReuseModule
from fusionkit.bundles.part_writer import Part, PartWriter
from fusionkit.errors import BundleError, CodecError
from fusionkit.testing import CodecContract, models

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class TestContract(CodecContract):
    codecs = (Lossless(), Lossless(level=19))


def same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    whole = INTEGERS[one.dtype.itemsize]
    return torch.equal(one.contiguous().view(whole), other.contiguous().view(whole))


@pytest.mark.parametrize("of_base", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.0, 1e-8, 1e-3, 1.0, 100.0]))
@settings(max_examples=5, deadline=None)
def test_every_bit_comes_back(
    dtype: torch.dtype, of_base: torch.dtype, seed: int, scale: float
) -> None:
    """Whatever the two dtypes, zeros of either sign and subnormals included."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(7, 33, generator=generator).to(of_base)
    tuned = (base.float() + scale * torch.randn(7, 33, generator=generator)).to(dtype)
    tuned[0, :4] = torch.tensor([0.0, -0.0, 1e-40, -6e-8]).to(dtype)
    tuned[1, 0], tuned[1, 1] = torch.finfo(dtype).max, torch.finfo(dtype).min
    parts = Lossless().encode_restorable(tuned, base)
    if parts:
        assert same_bits(Lossless().restore(parts, base), tuned)
    else:
        assert same_bits(tuned, base)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_checkpoint_comes_back_from_disk(dtype: torch.dtype, tmp_path: Path) -> None:
    """Its own dtype, also against a base of another, and in a file again."""
    arguments = models(dtype)
    arguments["base"] = {name: t.float() for name, t in arguments["base"].items()}
    arguments["base"]["decoder"] = arguments["base"]["embedding"]
    fusionkit.compress(codec=Lossless(), out=tmp_path / "b", **arguments)
    bundle = Bundle(tmp_path / "b", arguments["base"])
    for task, state in arguments["finetuned"].items():
        found = bundle.state_dict(task)
        assert found.keys() == state.keys()
        assert all(same_bits(found[name], tensor) for name, tensor in state.items())
    path = fusionkit.bundles.export_model.export_task(bundle, "bee", tmp_path / "bee.safetensors")
    exported = load_file(path)
    assert all(same_bits(t, arguments["finetuned"]["bee"][n]) for n, t in exported.items())


def test_what_did_not_change_costs_nothing() -> None:
    base = torch.randn(100)
    assert Lossless().encode_restorable(base.clone(), base) == {}
    assert Lossless().encode_restorable(base.half(), base)  # another dtype is a change


def test_a_delta_is_the_difference() -> None:
    arguments = models(torch.bfloat16)
    bundle = fusionkit.compress(codec=Lossless(), **arguments)
    found = bundle.delta("ant", "square")
    wanted = arguments["finetuned"]["ant"]["square"].float() - arguments["base"]["square"].float()
    assert found is not None
    assert torch.equal(found, wanted)


def test_weights_have_no_error() -> None:
    arguments = models(torch.bfloat16)
    found = fusionkit.sweep(codecs={"all": Lossless()}, **arguments).rows[0]
    assert (found.weight_error, found.projection, found.noise) == (0, 1, 0)


def test_a_switched_model_has_the_fine_tuned_weights() -> None:
    base = nn.Linear(20, 5)
    tuned = {n: (t + 0.01 * torch.randn_like(t)).half() for n, t in base.state_dict().items()}
    module = ReuseModule(base, finetuned={"a": tuned}, codec=Lossless())
    module.switch("a")
    assert all(torch.equal(t, tuned[n].float()) for n, t in module.model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_it_is_smaller_than_plain_zstandard(dtype: torch.dtype, tmp_path: Path) -> None:
    """On a normal fine-tune: the checkpoint's file, at Zstandard's default level."""
    base = {"w": torch.randn(512, 512) / 20}
    tuned = {"w": (base["w"] + 5e-4 * torch.randn(512, 512)).to(dtype)}
    save_file(tuned, tmp_path / "tuned.safetensors")
    plain = len(zstandard.compress((tmp_path / "tuned.safetensors").read_bytes(), 3))
    bundle = fusionkit.compress(base, {"a": tuned}, Lossless(), tmp_path / "b")
    [path] = bundle.path.glob("task-*")
    assert path.stat().st_size < 0.85 * plain


def test_a_truncated_plane_is_named(tmp_path: Path) -> None:
    base = torch.randn(64, 64)
    parts: dict[str, Any] = dict(Lossless().encode_restorable((base * 1.01).half(), base))
    for cut in ({**parts, "float16.0": parts["float16.0"][:-9]}, {"float16.0": parts["float16.0"]}):
        with pytest.raises((zstandard.ZstdError, KeyError, ValueError)):
            Lossless().restore(cut, base)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (b"no frame at all", "no Zstandard frame"),
        (b"\x28\xb5\x2f\xfd\xff\xff", "expected 4096 bytes"),
    ],
)
def test_a_plane_that_is_no_frame_is_named(bad: bytes, said: str, tmp_path: Path) -> None:
    """In a file with all its digests right: task and tensor are named, as of any payload."""
    base = {"w": torch.randn(64, 64)}
    tuned = {"w": (base["w"] * 1.001).bfloat16()}
    bundle = fusionkit.compress(base, {"a": tuned}, Lossless(), tmp_path / "b")
    sound = {part: tensor.clone() for part, tensor in bundle.task_parts("a", "w").items()}
    assert "bfloat16.1" in sound
    writer = PartWriter(tmp_path / "b" / "task-a.safetensors")
    for part, tensor in sound.items():
        cut = torch.frombuffer(bytearray(bad), dtype=torch.uint8)
        writer.add(Part.of(f"w/{part}", cut if part == "bfloat16.1" else tensor))
    record = replace(bundle.manifest.tasks["a"], file=writer.finish())
    bundle.update(replace(bundle.manifest, tasks={"a": record}))
    with pytest.raises(BundleError, match=rf"'w' of task 'a' can't be decoded by .*{said}"):
        bundle.state_dict("a")
    assert same_bits(Lossless().restore(sound, base["w"]), tuned["w"])  # nothing stays behind


def test_what_it_can_not_do_is_refused() -> None:
    with pytest.raises(CodecError, match=r"level in 1 to 22, got 0"):
        Lossless(0)
    with pytest.raises(CodecError, match="DBMS can't have Lossless as its codec: it gives back"):
        DBMS(Lossless())
    with pytest.raises(CodecError, match="DBMS can't have Lossless as its shift"):
        DBMS(MagnitudePrune(), Lossless())
    with pytest.raises(CodecError, match="beside the base"):
        Lossless().decode({}, torch.Size(()))
    assert issubclass(BundleError, Exception)
