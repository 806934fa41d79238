"""Files of parts: stable bytes, plain safetensors, and damage that never goes unseen."""

import json
import random
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fusionkit.bundles.part_file import FileRecord, PartFile
from fusionkit.bundles.part_writer import Part, PartWriter
from fusionkit.errors import BundleError

RANDOM = torch.Generator().manual_seed(0)
PARTS: dict[str, Tensor] = {
    "encoder.layer.0.weight/values": torch.randn(5, 3, generator=RANDOM).to(torch.bfloat16),
    "encoder.layer.0.weight/mask": torch.tensor([1, 128, 255], dtype=torch.uint8),
    "a/b/c.d/values": torch.randn(7, generator=RANDOM).to(torch.float16),
    "/rescaler": torch.tensor([0.5]),
    "ids/tensor": torch.tensor([-3, 2**40]),
    "on/tensor": torch.tensor([True, False, True]),
    "scalar/tensor": torch.tensor(7),
    "empty/tensor": torch.empty(0, 4),
    "double/tensor": torch.tensor([1e300, -0.1], dtype=torch.float64),
    "ünïcode ∆/values": torch.arange(5, dtype=torch.int8),
}


def write(path: Path, parts: dict[str, Tensor]) -> FileRecord:
    writer = PartWriter(path)
    for key, tensor in parts.items():
        writer.add(Part.of(key, tensor))
    return writer.finish()


def read_all(path: Path, record: FileRecord) -> dict[str, Tensor]:
    file = PartFile(path, record)
    return {
        f"{name}/{part}": tensor
        for name in file.names()
        for part, tensor in file.parts(name).items()
    }


def check_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype
        assert found[key].shape == tensor.shape
        assert torch.equal(found[key], tensor)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "parts.safetensors"
    record = write(path, PARTS)
    assert record.bytes == path.stat().st_size
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # no spool is left
    check_same(read_all(path, record), PARTS)


def test_parts_come_by_the_tensors_name(tmp_path: Path) -> None:
    path = tmp_path / "parts.safetensors"
    file = PartFile(path, write(path, PARTS))
    assert set(file.names()) == {key.rpartition("/")[0] for key in PARTS}
    assert set(file.parts("encoder.layer.0.weight")) == {"values", "mask"}
    assert set(file.parts("a/b/c.d")) == {"values"}
    assert set(file.parts("")) == {"rescaler"}
    assert file.parts("a") == {}


def test_any_reader_of_safetensors_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "parts.safetensors"
    write(path, PARTS)
    check_same(load_file(path), PARTS)
    with safe_open(path, framework="pt") as handle:
        metadata = handle.metadata()
    assert metadata["format"] == "pt"
    assert len(metadata["digests"]) == 16 * len(PARTS)


@settings(deadline=None, max_examples=25)
@given(st.randoms(use_true_random=False))
def test_data_are_in_the_order_of_writing(
    tmp_path_factory: pytest.TempPathFactory, order: random.Random
) -> None:
    """Whatever that order does to their alignment."""
    folder = tmp_path_factory.mktemp("parts")
    keys = list(PARTS)
    order.shuffle(keys)
    record = write(folder / "a", {key: PARTS[key] for key in keys})
    check_same(load_file(folder / "a"), PARTS)
    assert [f"{n}/{p}" for n, p in _in_file(folder / "a")] == keys
    check_same(read_all(folder / "a", record), PARTS)


def _in_file(path: Path) -> list[tuple[str, ...]]:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__")
    assert [header[key]["data_offsets"] for key in header] == sorted(
        header[key]["data_offsets"] for key in header
    )
    return [tuple(key.rpartition("/")[::2]) for key in header]


def test_tensors_larger_than_the_buffer(tmp_path: Path) -> None:
    # Below, at and above the writer's 256 KiB; the last ones stay in the buffer until the end.
    sizes = [10, 1 << 16, (1 << 16) - 3, 1, 200_000, 3]
    parts = {f"t{i}/values": torch.randn(size) for i, size in enumerate(sizes)}
    path = tmp_path / "parts.safetensors"
    check_same(read_all(path, write(path, parts)), parts)
    check_same(load_file(path), parts)


def test_views_are_written_alone_and_in_row_major_order(tmp_path: Path) -> None:
    whole = torch.randn(100, 100)
    parts = {"cut/values": whole[:, :2], "turned/values": whole[:3].T, "step/values": whole[0, ::7]}
    path = tmp_path / "parts.safetensors"
    record = write(path, parts)
    assert record.bytes < 4000
    check_same(read_all(path, record), parts)


def test_a_gradient_does_not_hinder_writing(tmp_path: Path) -> None:
    path = tmp_path / "parts.safetensors"
    tensor = torch.randn(3, requires_grad=True)
    check_same(read_all(path, write(path, {"w/values": tensor})), {"w/values": tensor.detach()})


def test_a_file_without_parts(tmp_path: Path) -> None:
    path = tmp_path / "parts.safetensors"
    record = write(path, {})
    assert read_all(path, record) == {}
    assert PartFile(path, record).parts("w") == {}
    assert load_file(path) == {}


def test_the_spool_of_an_interrupted_run_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "parts.safetensors"
    interrupted = PartWriter(path)
    interrupted.add(Part.of("w/values", torch.randn(100_000)))  # large enough to be spooled
    assert list(tmp_path.iterdir())
    check_same(read_all(path, write(path, PARTS)), PARTS)


def test_reading_twice_gives_the_same(tmp_path: Path) -> None:
    path = tmp_path / "parts.safetensors"
    file = PartFile(path, write(path, PARTS))
    for _ in range(2):
        key = "encoder.layer.0.weight"
        assert torch.equal(file.parts(key)["values"], PARTS[f"{key}/values"])


def test_a_key_cannot_be_written_twice(tmp_path: Path) -> None:
    writer = PartWriter(tmp_path / "task-a.safetensors")
    writer.add(Part.of("w/values", torch.ones(1)))
    with pytest.raises(BundleError, match=r"task-a\.safetensors: part 'w/values' is written twice"):
        writer.add(Part.of("w/values", torch.ones(1)))


def test_a_dtype_that_safetensors_lacks_is_refused_by_name(tmp_path: Path) -> None:
    writer = PartWriter(tmp_path / "task-a.safetensors")
    with pytest.raises(BundleError, match=r"part 'w/values' is torch\.compl"):
        writer.add(Part.of("w/values", torch.ones(1, dtype=torch.complex128)))


# --- damage -----------------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "parts.safetensors"
    with pytest.raises(BundleError, match=f"{path}: missing from the bundle"):
        PartFile(path, FileRecord(100, ""))


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, -1])
def test_a_truncated_file_is_refused_before_it_is_read(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "parts.safetensors"
    record = write(path, PARTS)
    path.write_bytes(path.read_bytes()[:kept])
    size = path.stat().st_size
    said = f"{path}: has {size} bytes, the manifest says {record.bytes}; the file was truncated"
    with pytest.raises(BundleError, match=re.escape(said)):
        PartFile(path, record)


def test_a_longer_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "parts.safetensors"
    record = write(path, PARTS)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(BundleError, match="copy or compress it again"):
        PartFile(path, record)


@cache
def written(folder: Path) -> tuple[bytes, FileRecord]:
    record = write(folder / "whole", PARTS)
    return (folder / "whole").read_bytes(), record


@settings(deadline=None, max_examples=300)
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@example(share=0.0, bit=0)
@example(share=0.0, bit=7)
def test_every_flipped_bit_is_found(
    tmp_path_factory: pytest.TempPathFactory, share: float, bit: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    content, record = written(folder)
    damaged = bytearray(content)
    damaged[int(share * len(content))] ^= 1 << bit
    path = folder / "damaged"
    path.write_bytes(damaged)
    with pytest.raises(BundleError, match=f"{path}: .* is not what was written .*again"):
        read_all(path, record)


def test_damage_is_named_by_part_and_leaves_the_others_readable(tmp_path: Path) -> None:
    path = tmp_path / "parts.safetensors"
    record = write(path, {"w/values": torch.ones(4), "v/values": torch.full((4,), 2.0)})
    content = path.read_bytes()
    path.write_bytes(content.replace(torch.ones(4).numpy().tobytes(), bytes(16)))
    file = PartFile(path, record)
    assert file.parts("v")["values"].tolist() == [2.0] * 4
    for _ in range(2):  # not only the first time
        with pytest.raises(BundleError, match=f"{path}: part 'w/values' is not what was written"):
            file.parts("w")


def test_another_file_of_the_same_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "parts.safetensors"
    record = write(path, {"w/values": torch.ones(4)})
    write(path, {"w/values": torch.zeros(4)})
    assert path.stat().st_size == record.bytes
    with pytest.raises(BundleError, match="its header is not what was written"):
        PartFile(path, record).parts("w")
