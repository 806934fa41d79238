"""However a run ends — interrupted, on a full disk, killed — no half bundle is left behind."""

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checks import contents
from processes import by_itself
from tiny_net import Files, TinyNet
from torch import Tensor

from fusionkit import EMR, Bundle, Dense, MagnitudePrune, add_tasks
from fusionkit.bundles.compress import compress
from fusionkit.bundles.export_model import export_task
from fusionkit.errors import BundleError, FamilyError
from fusionkit.merges.mean import Mean

PRIVATE = ["head.*"]
States = dict[str, dict[str, Tensor]]


def interrupt(run: int, done: int, total: int) -> None:
    if done == total - 1:
        raise KeyboardInterrupt


@pytest.mark.parametrize("codec", [EMR(), MagnitudePrune(merge=Mean())], ids=repr)
def test_interrupted(
    base: TinyNet, finetuned: States, tmp_path: Path, temporary: Path, codec: EMR
) -> None:
    for out in (None, tmp_path / "b"):
        with pytest.raises(KeyboardInterrupt):
            compress(base, finetuned, codec, out, private=PRIVATE, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]
    assert not list(temporary.iterdir())


def test_interrupted_while_adding(base: TinyNet, finetuned: States, tmp_path: Path) -> None:
    bundle = compress(base, {"ant": finetuned["ant"]}, Dense(), tmp_path / "b", private=PRIVATE)
    before = contents(tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        add_tasks(bundle, {"bee": finetuned["bee"]}, progress=interrupt)
    assert contents(tmp_path / "b") == before
    add_tasks(bundle, {"bee": finetuned["bee"]})
    assert Bundle(tmp_path / "b").tasks == ("ant", "bee")


def test_not_a_number_in_the_last_tensor(
    base: TinyNet, finetuned: States, tmp_path: Path, temporary: Path
) -> None:
    finetuned["cat"]["hidden.bias"][2] = torch.nan
    for out in (None, tmp_path / "b"):
        with pytest.raises(FamilyError, match=r"'hidden.bias' holds 1 values .*\(task 'cat'\)"):
            compress(base, finetuned, EMR(), out, private=PRIVATE)
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]
    assert not list(temporary.iterdir())


def test_the_end_of_a_temporary_bundle(base: TinyNet, finetuned: States, temporary: Path) -> None:
    bundle = compress(base, finetuned, EMR(), private=PRIVATE)
    assert list(temporary.iterdir()) == [bundle.path]
    del bundle
    assert not list(temporary.iterdir())


def limit(nbytes: int) -> None:
    """Let no file of this process grow beyond so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))


def said(call: Callable[[], object]) -> str:
    try:
        call()
    except BundleError as error:
        return str(error)
    return "no error"


def write_all(folder: Path, nbytes: int) -> list[str]:
    models = {"a": {"w": torch.randn(30_000)}, "b": {"w": torch.randn(30_000)}}
    base = {"w": torch.zeros(30_000)}
    compress(base, {"small": models["a"]}, Dense("int4"), folder / "there")
    there = Bundle(folder / "there", base)
    limit(nbytes)
    return [
        said(lambda: compress(base, models, Dense(), folder / "b")),
        said(lambda: compress(base, models, Dense(), folder / "there", overwrite=True)),
        said(lambda: add_tasks(there, models)),
        said(lambda: there.save(folder / "copy")),
        said(lambda: export_task(there, "small", folder / "out.safetensors")),
        said(lambda: export_task(there, "small", folder / "out.pt")),
    ]


@pytest.mark.parametrize("nbytes", [100, 10_000])
def test_a_full_disk(tmp_path: Path, nbytes: int) -> None:
    """One clear error each, and no file more or less than before."""
    code, lines = by_itself(write_all, tmp_path, nbytes)
    assert code == 0
    targets = ["b", "there", "there", "copy", "out.safetensors", "out.pt"]
    for line, target in zip(lines, targets, strict=True):
        assert line.startswith(f"{tmp_path / target}: could not be written (")
    assert all("File too large" in line for line in lines[:4])
    assert {path.name for path in tmp_path.iterdir()} == {"there"}
    assert set(contents(tmp_path / "there")) == {"manifest.json", "task-small.safetensors"}
    bundle = Bundle(tmp_path / "there", {"w": torch.zeros(30_000)})
    assert bundle.tasks == ("small",)
    assert bundle.state_dict("small")["w"].any()


def change(folder: Path) -> list[str]:
    base = {f"a long name of a tensor {i}": torch.zeros(1) for i in range(40)}
    bundle = compress(base, {"a": base, "b": base}, Dense(), folder / "b")
    limit((folder / "b" / "manifest.json").stat().st_size - 200)
    adding = said(lambda: add_tasks(bundle, {"c": base}))
    limit(200)
    return [adding, said(lambda: bundle.remove("a"))]


def test_a_disk_that_fills_up_with_the_manifest(tmp_path: Path) -> None:
    """The tasks' files had room, but the manifest has not: everything stays as it was."""
    code, lines = by_itself(change, tmp_path)
    assert code == 0
    assert len(lines) == 2
    for line in lines:
        assert line.startswith(f"{tmp_path / 'b'}: could not be written (File too large)")
    assert Bundle(tmp_path / "b").tasks == ("a", "b")
    assert {path.name for path in (tmp_path / "b").iterdir()} == {
        "manifest.json",
        "task-a.safetensors",
        "task-b.safetensors",
    }


def killed_at_the_end(files: Files, out: Path) -> None:
    def progress(run: int, done: int, total: int) -> None:
        if done == total:
            os.kill(os.getpid(), signal.SIGKILL)

    tuned = files.finetuned
    compress(files.base, tuned, EMR(), out, private=PRIVATE, progress=progress, overwrite=True)


def test_killed(files: Files, tmp_path: Path) -> None:
    """No folder of the final name appears; a bundle that is there stays whole."""
    killed = (-signal.SIGKILL, None)
    assert by_itself(killed_at_the_end, files, tmp_path / "b") == killed
    assert not (tmp_path / "b").exists()
    compress(files.base, files.finetuned, Dense(), tmp_path / "b", private=PRIVATE)
    before = contents(tmp_path / "b")
    assert by_itself(killed_at_the_end, files, tmp_path / "b") == killed
    assert contents(tmp_path / "b") == before
    compress(files.base, files.finetuned, EMR(), tmp_path / "b", private=PRIVATE, overwrite=True)
    assert Bundle(tmp_path / "b").codec == EMR()


def test_a_folder_that_may_not_be_written(files: Files, tmp_path: Path) -> None:
    """A file is where the bundle's parent folder should be."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BundleError, match=r"b: can't be written: .*file is no folder"):
        compress(files.base, files.finetuned, EMR(), tmp_path / "file" / "b", private=PRIVATE)
