"""Files that others change while they are read: an error, never a dead process or other values."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import by_itself
from safetensors.torch import save_file

from fusionkit import EMR, Bundle, Checkpoint, compress
from fusionkit.checkpoints.steady_file import SteadyFile
from fusionkit.errors import FusionKitError

SIDE = 700
"""Of a matrix that takes many pages."""


def spoil(path: Path, how: str) -> None:
    """What `cp` of another file over one does, at its start, and at its end."""
    with path.open("r+b") as file:
        if how == "cut":
            file.truncate(100)
        else:
            file.write(os.urandom(path.stat().st_size))
    if how == "written over":  # a clock that stands still would hide it
        os.utime(path, ns=(1, 1))


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(SIDE, SIDE, generator=generator), "b": torch.zeros(SIDE)}


def of_safetensors(folder: Path) -> tuple[Path, Callable[[], object]]:
    save_file(weights(0), folder / "model.safetensors")
    opened = Checkpoint.of(folder / "model.safetensors")
    return opened.files[0], lambda: opened["w"]


def of_pieces(folder: Path) -> tuple[Path, Callable[[], object]]:
    save_file(weights(0), folder / "model.safetensors")
    opened = Checkpoint.of(folder / "model.safetensors")
    pieces = opened.pieces("w")
    return opened.files[0], lambda: pieces(slice(SIDE, 3 * SIDE))


def of_pickle(folder: Path) -> tuple[Path, Callable[[], object]]:
    torch.save({"state_dict": weights(0)}, folder / "model.ckpt")
    opened = Checkpoint.of(folder / "model.ckpt")
    return opened.files[0], lambda: opened["w"]


def of_bundle(folder: Path) -> tuple[Path, Callable[[], object]]:
    compress(weights(0), {"x": weights(1), "y": weights(2)}, EMR(), folder / "bundle")
    bundle = Bundle(folder / "bundle", weights(0))
    return folder / "bundle" / "task-x.safetensors", lambda: bundle.delta("x", "w")


def of_shared_parts(folder: Path) -> tuple[Path, Callable[[], object]]:
    _, read = of_bundle(folder)
    return folder / "bundle" / "shared.safetensors", read


KINDS = {
    "safetensors": of_safetensors,
    "pieces": of_pieces,
    "pickle": of_pickle,
    "bundle": of_bundle,
    "shared": of_shared_parts,
}


def read_twice(kind: str, how: str, folder: Path) -> str:
    path, read = KINDS[kind](folder)
    read()
    spoil(path, how)
    try:
        read()
    except FusionKitError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("how", ["cut", "written over"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_changed_while_it_is_read_is_named(
    kind: str, how: str, tmp_path: Path
) -> None:
    code, said = by_itself(read_twice, kind, how, tmp_path)
    assert code == 0  # and not the signal of a page that is not there
    assert str(tmp_path) in said
    assert "the file was cut short" in said or "the file was changed" in said


def test_of_many_files_few_stay_open(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    files = [SteadyFile(path) for _ in range(300)]
    for file in files:
        assert file.read(3, 2).tolist() == [ord("3"), ord("4")]
    assert len(list(Path("/proc/self/fd").iterdir())) < 300
    again = pickle.loads(pickle.dumps(files[0]))  # as another process gets it
    assert again.read(9, 1).tolist() == [ord("9")]
    with pytest.raises(OSError, match="it ends at byte 10, before 11"):
        again.read(9, 2)
