"""Small parts in one tensor: the same parts, in a tenth of the bytes; damage is refused."""

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import fusionkit
from fusionkit.bundles import part_writer
from fusionkit.bundles.format import task_file
from fusionkit.bundles.part_file import FileRecord, PartFile
from fusionkit.bundles.part_writer import Part, PartWriter
from fusionkit.bundles.small_parts import DTYPES, Names, SmallPart
from fusionkit.checkpoints.json_text import json_text
from fusionkit.checkpoints.safetensors_file import SAFETENSORS_DTYPES
from fusionkit.codecs import overhead
from fusionkit.codecs.overhead import SMALL
from fusionkit.errors import BundleError

NAMES = Names([f"layer.{place}.ünïcode" for place in range(300)])
SMALL_PARTS = {
    "layer.7.ünïcode/codes": torch.arange(9, dtype=torch.uint8),
    "/gains": torch.rand(3, 2, dtype=torch.float16),
    "layer.299.ünïcode/codes": torch.empty(0, 5, dtype=torch.int64),
    "layer.0.ünïcode/scale": torch.tensor(0.5),
}
OTHERS = {
    "layer.7.ünïcode/large": torch.zeros(SMALL, dtype=torch.uint8),
    "head.weight/tensor": torch.randn(3, 4),
}


def write(path: Path, parts: dict[str, Tensor]) -> FileRecord:
    writer = PartWriter(path, packed=NAMES)
    for key, tensor in parts.items():
        writer.add(Part.of(key, tensor))
    return writer.finish()


def check_holds(path: Path, record: FileRecord, parts: dict[str, Tensor]) -> None:
    file = PartFile(path, record, NAMES)
    found = {f"{n}/{p}": t for n in file.names() for p, t in file.parts(n).items()}
    assert found.keys() == parts.keys()
    for key, tensor in parts.items():
        assert found[key].dtype == tensor.dtype
        assert found[key].shape == tensor.shape
        assert torch.equal(found[key], tensor)


def test_small_parts_are_packed_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "parts.safetensors"
    parts = SMALL_PARTS | OTHERS
    record = write(path, parts)
    assert record.packed
    assert load_file(path).keys() == {*OTHERS, "packed"}
    check_holds(path, record, parts)


def test_an_entry_takes_as_many_bytes_as_a_budget_counts(tmp_path: Path) -> None:
    sizes = {}
    for count in (1, 200):
        codes = torch.zeros(SMALL - 1, dtype=torch.uint8)
        data = {f"layer.{place}.ünïcode/codes": codes for place in range(count)}
        sizes[count] = write(tmp_path / "parts", data).bytes - count * (SMALL - 1)
    assert sizes[200] - sizes[1] <= 199 * overhead.PACKED_ENTRY + 8
    assert not write(
        tmp_path / "parts", {"layer.0.ünïcode/codes": torch.zeros(SMALL).byte()}
    ).packed


def test_a_large_file_is_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_writer, "_LARGE", 20)
    path = tmp_path / "parts.safetensors"
    record = write(path, SMALL_PARTS)
    assert not record.packed
    assert load_file(path).keys() == SMALL_PARTS.keys()
    check_holds(path, record, SMALL_PARTS)


def test_the_places_of_dtypes_are_for_ever() -> None:
    assert set(DTYPES) == set(SAFETENSORS_DTYPES)
    assert DTYPES[:4] == ("F64", "F32", "F16", "BF16")


@given(st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_refused_or_parts_that_lie_within(data: bytes) -> None:
    try:
        found = NAMES.read(memoryview(data))
    except ValueError:
        return
    assert all(0 <= start <= start + part.nbytes <= len(data) for part, start in found)


@pytest.mark.parametrize(
    ("part", "where"),
    [
        (SmallPart("layer.1.ünïcode", "codes", "F32", [1 << 40]), "take"),
        (SmallPart("layer.1.ünïcode", "codes", "F32", [1 << 62, 1 << 62]), "take"),
        (SmallPart("layer.1.ünïcode", "codes", "U8", [0]), "take"),
        (None, "cut short"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, part: SmallPart | None, where: str) -> None:
    """With all checksums mended, as someone who means harm would."""
    pack = (NAMES.index([part]) if part else b"\x01\x7f") + b"abcd"
    digest = hashlib.sha256(pack).hexdigest()[:16]
    header = {
        "__metadata__": {"format": "pt", "digests": digest},
        "packed": {"dtype": "U8", "shape": [len(pack)], "data_offsets": [0, len(pack)]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "parts.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + pack)
    record = FileRecord(path.stat().st_size, hashlib.sha256(text).hexdigest(), packed=True)
    with pytest.raises(BundleError, match=rf"parts\.safetensors.*{where}.*compress it again"):
        PartFile(path, record, NAMES).parts("layer.1.ünïcode")


def test_a_bundle_says_so_and_tasks_can_be_added(tmp_path: Path) -> None:
    base = {f"w{place}": torch.randn(24, 16) for place in range(20)}
    tuned = {t: {n: w + 0.1 * torch.randn(24, 16) for n, w in base.items()} for t in "abc"}
    codec = fusionkit.Sketch(bits=2.0)
    alone = fusionkit.compress(base, {"c": tuned["c"]}, codec)
    bundle = fusionkit.compress(base, {"a": tuned["a"], "b": tuned["b"]}, codec, tmp_path / "b")
    content = json.loads((bundle.path / "manifest.json").read_text())
    assert content["format_version"] == 7
    assert content["tasks"]["a"]["file"]["packed"] is True
    fusionkit.add_tasks(bundle, {"c": tuned["c"]})
    again = fusionkit.Bundle(bundle.path, base)
    for name in base:
        found, wanted = again.delta("c", name), alone.delta("c", name)
        assert found is not None
        assert wanted is not None
        assert torch.equal(found, wanted)

    plain = fusionkit.compress(base, tuned, fusionkit.SVD(2))
    assert json.loads((plain.path / "manifest.json").read_text())["format_version"] == 1
    assert all("/" in key for key in load_file(plain.path / task_file("a")))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=40),
        lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=9), inner),
        max_leaves=40,
    )
)
@settings(max_examples=50, deadline=None)
def test_json_reads_back_as_it_was(value: object) -> None:
    assert json.loads(json_text(value)) == value


def test_json_is_on_a_line_where_it_fits() -> None:
    long = {"shape": list(range(100)), "role": "delta"}
    text = json_text({"short": {"a": [1, 2]}, "long": long})
    assert text.splitlines()[1] == ' "short": {"a": [1, 2]},'
    assert len(text.splitlines()) > 100
