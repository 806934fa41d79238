"""One run at a time writes a folder, and what a killed one left goes: said, never another's."""

import threading
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from fusionkit import Bundle, Dense, compress
from fusionkit.checkpoints.exchange import exchange
from fusionkit.checkpoints.output_folder import new_folder
from fusionkit.errors import BundleError


def bundle(path: Path, overwrite: bool = False, tasks: int = 1) -> Bundle:
    tuned = {f"t{i}": {"w": torch.full((40,), 1.0 + i)} for i in range(tasks)}
    return compress({"w": torch.zeros(40)}, tuned, Dense(), path, overwrite=overwrite)


def test_two_folders_exchange_their_names(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system can't")
    assert (tmp_path / "a" / "b").exists()
    assert (tmp_path / "b" / "a").exists()
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "c")


@pytest.mark.filterwarnings("ignore:.*a run that was replacing it")
@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_bundle_is_there_while_it_is_replaced(
    tmp_path: Path, in_one_step: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where names can't be exchanged: a reader brings the old one back."""
    if not in_one_step:
        monkeypatch.setattr("fusionkit.checkpoints.sole_writer.exchange", lambda *_: False)
    bundle(tmp_path / "b")
    seen: list[str] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                seen.append(",".join(Bundle(tmp_path / "b").tasks))
            except Exception as error:
                seen.append(repr(error))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for turn in range(20):
            bundle(tmp_path / "b", overwrite=True, tasks=1 + turn % 2)
    finally:
        done.set()
        reader.join()
    assert set(seen) <= {"t0", "t0,t1"}
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_another_writer_is_refused_and_its_files_stay(tmp_path: Path) -> None:
    with new_folder(tmp_path / "b", False, known_by="manifest.json") as folder:
        with pytest.raises(BundleError, match="another run is writing there; wait for it to end"):
            bundle(tmp_path / "b")
        assert folder.is_dir()
        (folder / "manifest.json").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_bundle_is_changed_by_one_at_a_time(tmp_path: Path) -> None:
    """Whoever opened it before another changed it would undo that, and is refused."""
    bundle(tmp_path / "b", tasks=3)
    one, other = Bundle(tmp_path / "b"), Bundle(tmp_path / "b")
    one.remove("t0")
    with pytest.raises(BundleError, match="another run has changed it since"):
        other.remove("t1")
    with (
        FileLock(tmp_path / ".b.lock"),
        pytest.raises(BundleError, match="another run is writing there"),
    ):
        one.remove("t1")
    one.remove("t1")
    assert Bundle(tmp_path / "b").tasks == ("t2",)


def test_what_is_left_over_goes_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    held = bundle(tmp_path / "b", tasks=2)
    for name in (".b.0123abcd.tmp", ".b.0123abcd.old", ".bb.0123abcd.tmp", ".b.tmp"):
        (tmp_path / name).mkdir()
    for name in ("task-gone.safetensors", "README.md", "task-notes.txt"):
        (tmp_path / "b" / name).touch()
    with pytest.warns(UserWarning, match="killed had left") as said:
        held.remove("t0")
    assert "task-gone.safetensors" in str(said[1].message)
    assert {path.name for path in tmp_path.iterdir()} == {"b", ".bb.0123abcd.tmp", ".b.tmp"}
    names = {"manifest.json", "task-t1.safetensors", "README.md", "task-notes.txt"}
    assert {path.name for path in (tmp_path / "b").iterdir()} == names
