"""The parsers that are fuzzed, each as a function of bytes that raises where there is a fault."""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from manifests import sign

from fusionkit import Bundle
from fusionkit.bundles.small_parts import Names
from fusionkit.codecs import entropy, mixing, packing, sketch_codes
from fusionkit.codecs.entropy import Bits, Gaps, Gaussian, Laplace, Model
from fusionkit.errors import FusionKitError

FILES = Path(__file__).parent / "corpus" / "bundles"
"""Small bundles, and their base."""


def manifest(data: bytes) -> None:
    """The first byte says of which bundle, the others are its manifest; checksums are mended."""
    folder = _bundle(data[:1])[1]
    try:
        content = json.loads(data[1:])
        if isinstance(content, dict) and "checksum" in content:
            sign(folder, content)
        else:
            (folder / "manifest.json").write_text(json.dumps(content))
    except (ValueError, RecursionError):
        (folder / "manifest.json").write_bytes(data[1:])
    _read(folder)


def parts(data: bytes) -> None:
    """The first byte says of which bundle, the second which file the others are.

    What the manifest says of the file is mended, and so are the digests in its header.
    """
    name, folder = _bundle(data[:1])
    content = json.loads((FILES / name / "manifest.json").read_text())
    records = {f"task-{task}.safetensors": each["file"] for task, each in content["tasks"].items()}
    if content["shared"]:
        records["shared.safetensors"] = content["shared"]
    file = sorted(records)[(data[1] if len(data) > 1 else 0) % len(records)]
    payload = _with_digests(data[2:])
    length = int.from_bytes(payload[:8], "little")
    records[file]["bytes"] = len(payload)
    records[file]["header_sha256"] = hashlib.sha256(payload[8 : 8 + length]).hexdigest()
    sign(folder, content)
    (folder / file).write_bytes(payload)
    try:
        _read(folder)
    finally:
        shutil.copyfile(FILES / name / file, folder / file)
        shutil.copyfile(FILES / name / "manifest.json", folder / "manifest.json")


def codes(data: bytes) -> None:
    """The first byte says what the others are."""
    if len(data) < 4:
        return
    kinds = (_positions, _integers, _stream, _sketch, _pack)
    try:
        kinds[data[0] % len(kinds)](data[1], data[2], data[3], data[4:])
    except ValueError as error:
        if not str(error):
            raise AssertionError("refused without a word") from error


RUN: dict[str, Callable[[bytes], None]] = {"manifest": manifest, "parts": parts, "codes": codes}


def seeds(target: str) -> dict[str, bytes]:
    """What fuzzing starts from, by name: real bundles' files, and what lies in the corpus."""
    found = {}
    for place, name in enumerate(_bundles()[1]):
        if target == "manifest":
            found[name] = bytes([place]) + (FILES / name / "manifest.json").read_bytes()
        files = sorted(path.name for path in (FILES / name).glob("*.safetensors"))
        for number, file in enumerate(files):
            if target == "parts":
                found[f"{name}-{file}"] = (
                    bytes([place, number]) + (FILES / name / file).read_bytes()
                )
    folder = FILES.parent / target
    found |= {path.name: path.read_bytes() for path in sorted(folder.glob("*"))}
    return found


def _positions(low: int, high: int, _: int, data: bytes) -> None:
    """Sparse positions: increasing, inside, and the same after another round."""
    total = low | high << 8
    found = packing.decode_positions(_tensor(data), total)
    array = found.numpy()
    assert (np.diff(array, prepend=-1) > 0).all(), "positions do not increase"
    assert not len(array) or array[-1] < total, "a position lies outside"
    again = packing.decode_positions(packing.encode_positions(found, total), total)
    assert torch.equal(again, found), "positions change from round to round"


def _integers(count: int, bits: int, columns: int, data: bytes) -> None:
    """Small integers: the very bits, whatever they are."""
    bits, columns = bits % 8 + 1, columns % 3 + 1
    packed = _tensor(data[: len(data) // columns * columns]).view(-1, columns)
    found = packing.unpack_integers(packed, count, bits)
    assert found.shape == (count, columns)
    assert int(found.max() if found.numel() else 0) < 1 << bits
    whole = count * bits // 8
    again = packing.pack_integers(found, bits)
    assert torch.equal(again[:whole], packed[:whole]), "integers lose bits"


def _stream(first: int, second: int, third: int, data: bytes) -> None:
    """Runs of symbols: what is decoded is what makes these bytes."""
    runs: list[tuple[int, Model]] = [
        (first, Gaussian(second % 64)),
        (second, Laplace(third % 64)),
        (third, Gaps(third, 8 * third + first)),
        (first % 16, Bits()),
    ]
    stream = _tensor(data)
    symbols = entropy.decode(stream, runs)
    again = entropy.encode(list(zip(symbols, (model for _, model in runs), strict=True)))
    assert torch.equal(again, stream), "bytes are read that encode does not write"


def _sketch(rows: int, columns: int, _: int, data: bytes) -> None:
    """One tensor's codes: in their ranges, and read the same when written again."""
    rows, columns = rows % 48 + 1, columns % 48 + 1
    found = sketch_codes.read(_tensor(data), rows, columns)
    if found.positions is not None:
        array = found.positions.numpy()
        assert (np.diff(array, prepend=-1) > 0).all(), "positions do not increase"
        assert not len(array) or array[-1] < rows * columns, "a position lies outside"
    if found.factors is not None:
        left, right = found.factors.product()
        assert left.shape == (rows, right.shape[1])
        assert right.shape == (columns, left.shape[1])
    if found.mixed is not None and not os.environ.get("NUMBA_DISABLE_JIT"):
        whole = mixing.rebuild(found.mixed, (rows, columns), 0, 1.0)
        assert whole.isfinite().all(), "values that no table has"


def _pack(names: int, _: int, __: int, data: bytes) -> None:
    """An index of packed parts, and their bytes: all inside, none twice the same byte."""
    known = Names([f"layer.{place}.weight" for place in range(names % 8)])
    end = 0
    for part, start in known.read(memoryview(data)):
        assert start >= end, "parts overlap"
        end = start + part.nbytes
    assert end <= len(data), "a part lies outside"


@cache
def _bundles() -> tuple[Path, list[str]]:
    """A folder with a copy of every bundle, for as long as this process is."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    shutil.copytree(FILES, folder, dirs_exist_ok=True)
    return folder, sorted(path.name for path in FILES.iterdir() if path.is_dir())


def _bundle(first: bytes) -> tuple[str, Path]:
    folder, names = _bundles()
    name = names[(first[0] if first else 0) % len(names)]
    return name, folder / name


def _read(folder: Path) -> None:
    """Open a bundle, and make all tasks' models."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            bundle = Bundle(folder, FILES / "base.safetensors")
            for task in bundle.tasks[:4]:
                bundle.state_dict(task)
        except FusionKitError as error:
            if not str(error):
                raise AssertionError("refused without a word") from error


def _with_digests(payload: bytes) -> bytes:
    """The same file, with the digests of its data, where its header can be read."""
    length = int.from_bytes(payload[:8], "little")
    try:
        header: Any = json.loads(payload[8 : 8 + length])
        data, digests = payload[8 + length :], ""
        for key, entry in header.items():
            if key != "__metadata__":
                start, end = entry["data_offsets"]
                digests += hashlib.sha256(data[start:end]).hexdigest()[:16]
        header["__metadata__"]["digests"] = digests
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return payload
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _tensor(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))
