"""However a run ends — interrupted, on a full disk, killed — no half bundle is left behind."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import contents
from tiny_net import Files, TinyNet
from torch import Tensor

from fusionkit import EMR, Bundle, Dense, MagnitudePrune, add_tasks
from fusionkit.bundles.compress import compress
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


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, where limits and signals hurt nobody."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


LIMITED = """
import resource, signal, sys
from pathlib import Path
import torch
from fusionkit import Bundle, Dense, add_tasks, compress
from fusionkit.errors import BundleError
from fusionkit.bundles.export_model import export_task

folder, limit = Path(sys.argv[1]), int(sys.argv[2])
models = {"a": {"w": torch.randn(30_000)}, "b": {"w": torch.randn(30_000)}}
base = {"w": torch.zeros(30_000)}
compress(base, {"small": models["a"]}, Dense("int4"), folder / "there")
there = Bundle(folder / "there", base)

def attempt(call):
    try:
        call()
    except BundleError as error:
        print(error)
    else:
        print("no error")

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
attempt(lambda: compress(base, models, Dense(), folder / "b"))
attempt(lambda: compress(base, models, Dense(), folder / "there", overwrite=True))
attempt(lambda: add_tasks(there, models))
attempt(lambda: there.save(folder / "copy"))
attempt(lambda: export_task(there, "small", folder / "out.safetensors"))
attempt(lambda: export_task(there, "small", folder / "out.pt"))
"""


@pytest.mark.parametrize("limit", [100, 10_000])
def test_a_full_disk(tmp_path: Path, limit: int) -> None:
    """One clear error each, and no file more or less than before."""
    done = run(LIMITED, tmp_path, limit)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 6
    targets = ["b", "there", "there", "copy", "out.safetensors", "out.pt"]
    for line, target in zip(said, targets, strict=True):
        assert line.startswith(f"{tmp_path / target}: could not be written (")
    assert all("File too large" in line for line in said[:4])
    assert {path.name for path in tmp_path.iterdir()} == {"there"}
    assert set(contents(tmp_path / "there")) == {"manifest.json", "task-small.safetensors"}
    bundle = Bundle(tmp_path / "there", {"w": torch.zeros(30_000)})
    assert bundle.tasks == ("small",)
    assert bundle.state_dict("small")["w"].any()


NO_MANIFEST = """
import resource, signal, sys
from pathlib import Path
import torch
from fusionkit import Bundle, Dense, add_tasks, compress
from fusionkit.errors import BundleError

folder = Path(sys.argv[1])
base = {f"a long name of a tensor {i}": torch.zeros(1) for i in range(40)}
first = {name: torch.ones(1) for name in base}
bundle = compress(base, {"a": base, "b": base}, Dense(), folder / "b")
room = (folder / "b" / "manifest.json").stat().st_size - 200
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
changes = [(room, lambda: add_tasks(bundle, {"c": base})), (200, lambda: bundle.remove("a"))]
for limit, change in changes:
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        change()
    except BundleError as error:
        print(error)
"""


def test_a_disk_that_fills_up_with_the_manifest(tmp_path: Path) -> None:
    """The tasks' files had room, but the manifest has not: everything stays as it was."""
    done = run(NO_MANIFEST, tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 2
    for line in said:
        assert line.startswith(f"{tmp_path / 'b'}: could not be written (File too large)")
    assert Bundle(tmp_path / "b").tasks == ("a", "b")
    assert {path.name for path in (tmp_path / "b").iterdir()} == {
        "manifest.json",
        "task-a.safetensors",
        "task-b.safetensors",
    }


KILLED = """
import os, signal, sys
from fusionkit import EMR, compress

def progress(run, done, total):
    if done == total:
        os.kill(os.getpid(), signal.SIGKILL)

base, out, *finetuned = sys.argv[1:]
tasks = {str(place): path for place, path in enumerate(finetuned)}
compress(base, tasks, EMR(), out, private=["head.*"], progress=progress, overwrite=True)
"""


@pytest.mark.slow
def test_killed(files: Files, tmp_path: Path) -> None:
    """No folder of the final name appears; a bundle that is there stays whole."""
    paths = files.finetuned.values()
    done = run(KILLED, files.base, tmp_path / "b", *paths)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "b").exists()
    compress(files.base, files.finetuned, Dense(), tmp_path / "b", private=PRIVATE)
    before = contents(tmp_path / "b")
    assert run(KILLED, files.base, tmp_path / "b", *paths).returncode == -signal.SIGKILL
    assert contents(tmp_path / "b") == before
    compress(files.base, files.finetuned, EMR(), tmp_path / "b", private=PRIVATE, overwrite=True)
    assert Bundle(tmp_path / "b").codec == EMR()


def test_a_folder_that_may_not_be_written(files: Files, tmp_path: Path) -> None:
    """A file is where the bundle's parent folder should be."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BundleError, match=r"b: could not be written \((Not a dir|File exists)"):
        compress(files.base, files.finetuned, EMR(), tmp_path / "file" / "b", private=PRIVATE)
