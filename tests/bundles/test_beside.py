"""A bundle that many read at once, or that changes while it is read."""

import errno
import fcntl
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checks import check_same, contents
from safetensors.torch import save_file
from tiny_net import TASKS, Files, TinyNet
from torch import Tensor

from fusionkit import (
    DBMS,
    EMR,
    Bundle,
    Checkpoint,
    Dense,
    MagnitudePrune,
    Sketch,
    add_tasks,
    compress,
)
from fusionkit.bundles import reader
from fusionkit.checkpoints.output_folder import new_file
from fusionkit.checkpoints.sole_writer import sole_writer
from fusionkit.codecs.base import DeltaCodec
from fusionkit.errors import BundleError, WrongBaseError

AGAIN = "b: another run has changed it since it was opened here; open it again"
States = dict[str, dict[str, Tensor]]


@pytest.fixture
def often() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("codec", [Sketch(bits=60), EMR(), DBMS(MagnitudePrune(0.3))], ids=repr)
def test_many_threads_read_one_bundle(
    files: Files, tmp_path: Path, codec: DeltaCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reads what one alone would; files are opened, and closed, all the time."""
    compress(files.base, files.finetuned, codec, tmp_path / "b", private=["head.*"])
    alone = Bundle(tmp_path / "b", files.base)
    known = {task: alone.state_dict(task) for task in TASKS}
    monkeypatch.setattr(reader, "_OPEN", 1)
    faults: list[object] = []
    for _ in range(6):
        bundle = Bundle(tmp_path / "b", files.base)
        start = threading.Barrier(6)

        def read(place: int, bundle: Bundle = bundle, start: threading.Barrier = start) -> None:
            start.wait()
            for turn in range(3):
                task = TASKS[(place + turn) % 3]
                try:
                    found = bundle.state_dict(task)
                except Exception as error:
                    faults.append(error)
                    return
                faults.extend(n for n in known[task] if not torch.equal(found[n], known[task][n]))

        threads = [threading.Thread(target=read, args=(place,)) for place in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not faults


def test_rereading_a_bundle_that_became_another(files: Files, tmp_path: Path) -> None:
    """Of another codec, with other roles, of another base: it is as if it were opened again."""
    path, moved = tmp_path / "b", tmp_path / "moved.safetensors"
    compress(files.base, files.finetuned, EMR(), path, private=["head.*"])
    given, found = Bundle(path, files.base), Bundle(path)
    for bundle in (given, found):
        bundle.state_dict("ant")
    base = {
        name: tensor + 1 if tensor.is_floating_point() else tensor.clone()
        for name, tensor in Checkpoint.of(files.base).items()
    }
    save_file(base, moved)
    tuned = {"ant": files.finetuned["ant"]}
    compress(moved, tuned, Dense("fp16"), path, private=["head.*", "norm.*"], overwrite=True)
    found.reread()
    fresh = Bundle(path)
    assert (found.codec, found.roles, found.tasks) == (fresh.codec, fresh.roles, fresh.tasks)
    assert found.version == 1
    check_same(found.state_dict("ant"), fresh.state_dict("ant"))
    given.reread()
    with pytest.raises(WrongBaseError, match="is not the base that this bundle was made from"):
        given.state_dict("ant")
    given.attach_base(Checkpoint.of(moved))
    check_same(given.state_dict("ant"), fresh.state_dict("ant"))


def changes(kind: str, files: Files, path: Path) -> None:
    tuned = files.finetuned
    if kind == "removed":
        Bundle(path).remove("bee")
    elif kind == "replaced":
        compress(files.base, tuned, Dense("fp32"), path, private=["head.*"], overwrite=True)
    elif kind == "gone":
        shutil.rmtree(path)
    else:
        other = Bundle(path, files.base)
        other.remove("bee")
        add_tasks(other, {"bee": tuned["cat"]})


@pytest.mark.parametrize("kind", ["removed", "replaced", "gone", "other values"])
def test_a_reader_is_told_that_its_bundle_has_changed(
    files: Files, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "b"
    compress(files.base, files.finetuned, Dense(), path, private=["head.*"])
    bundle = Bundle(path, files.base)
    changes(kind, files, path)
    for call in (
        lambda: bundle.state_dict("bee"),
        lambda: bundle.check(["bee"]),
        lambda: bundle.save(tmp_path / "copy"),
        lambda: add_tasks(bundle, {"dog": files.finetuned["cat"]}),
    ):
        if kind == "gone" and call.__code__.co_names[0] == "add_tasks":
            continue
        with pytest.raises(BundleError, match=AGAIN):
            call()
    assert not (tmp_path / "copy").exists()


def test_what_was_opened_in_time_is_read_as_it_was(files: Files, tmp_path: Path) -> None:
    compress(files.base, files.finetuned, Dense(), tmp_path / "b", private=["head.*"])
    bundle = Bundle(tmp_path / "b", files.base)
    before = bundle.state_dict("ant")
    Bundle(tmp_path / "b").remove("bee")
    assert all(torch.equal(value, before[n]) for n, value in bundle.state_dict("ant").items())


def test_a_damaged_file_is_no_change(files: Files, tmp_path: Path) -> None:
    compress(files.base, files.finetuned, Dense(), tmp_path / "b", private=["head.*"])
    bundle = Bundle(tmp_path / "b", files.base)
    (tmp_path / "b" / "task-bee.safetensors").unlink()
    with pytest.raises(BundleError, match="missing from the bundle"):
        bundle.state_dict("bee")


def no_locks(number: int) -> object:
    def flock(file: int, operation: int) -> None:
        raise OSError(number, "no locks here")

    return flock


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_the_file_system_has_no_locks(
    base: TinyNet, finetuned: States, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file stands for one: nobody else writes meanwhile, and it is gone afterwards."""
    monkeypatch.setattr(fcntl, "flock", no_locks(number))
    bundle = compress(base, finetuned, Dense(), tmp_path / "b", private=["head.*"])
    with sole_writer(tmp_path / "b"), pytest.raises(BundleError) as caught:
        bundle.remove("ant")
    held = tmp_path / ".b.held"
    assert str(caught.value) == (
        f"{tmp_path / 'b'}: another run is writing there, on another machine it may be; wait for "
        f"it to end, or remove {held}, if it was killed"
    )
    before = contents(tmp_path / "b")
    held.write_text("1\nanother-machine\n")
    with pytest.raises(BundleError, match=r"or remove .*held, if it was killed"):
        bundle.remove("ant")
    assert contents(tmp_path / "b") == before
    held.unlink()
    bundle.remove("ant")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_file_that_another_run_is_writing(tmp_path: Path) -> None:
    with new_file(tmp_path / "f.pt") as new:
        new.write_text("one")
        with (
            pytest.raises(BundleError, match="another run is writing there"),
            new_file(tmp_path / "f.pt"),
        ):
            pass
    assert (tmp_path / "f.pt").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["f.pt"]
