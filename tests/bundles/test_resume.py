"""An interrupted compress goes on from the tensors that it wrote; the bundle is the same."""

import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import contents
from filelock import FileLock
from processes import by_itself
from safetensors.torch import load_file, save_file
from tiny_net import Files
from torch import Tensor

from fusionkit import DBMS, EMR, Bundle, Dense, MagnitudePrune, Mean, Sketch
from fusionkit.bundles import journal, part_writer
from fusionkit.bundles.compress import compress
from fusionkit.codecs.base import DeltaCodec
from fusionkit.errors import BundleError, FamilyError
from fusionkit.task_vectors.family import Family

PRIVATE = ["head.*"]
CODECS: dict[str, DeltaCodec] = {
    "EMR": EMR(),
    "pruned": MagnitudePrune(0.3, merge=Mean()),
    "dense": Dense("int4"),
    "DBMS": DBMS(EMR()),
    "Sketch": Sketch(noise=0.02),
}


@pytest.fixture(autouse=True)
def _each_tensor_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_DUE", 0)


def run(files: Files, codec: DeltaCodec, out: Path, stop_after: int | None = None) -> list[int]:
    """Compress; stop after so many tensors of the last pass. What is encoded, tensor by tensor."""
    encoded: list[int] = []
    last = {"pass": 0}

    def progress(run: int, done: int, total: int) -> None:
        if run != last["pass"]:
            last["pass"] = run
            encoded.clear()
        encoded.append(done)
        if done == stop_after and run == passes(codec):
            raise KeyboardInterrupt

    compress(files.base, files.finetuned, codec, out, private=PRIVATE, progress=progress)
    return encoded


def passes(codec: DeltaCodec) -> int:
    """How many passes the codec takes, over a family of its own."""
    seen = [0]
    base = {"w": torch.zeros(40)}
    compress(base, {"a": {"w": torch.randn(40)}}, codec, progress=lambda run, *_: seen.append(run))
    return seen[-1]


def partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


@pytest.mark.parametrize(
    ("name", "large"),
    [*((name, 1 << 26) for name in CODECS), ("dense", 64), ("EMR", 64)],
    ids=[*CODECS, "dense, large files", "EMR, large files"],
)
def test_it_goes_on_from_what_is_written(
    files: Files, tmp_path: Path, name: str, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_writer, "_LARGE", large)
    codec = CODECS[name]
    whole = run(files, codec, tmp_path / "one")
    for stops in ([2], [1, 2], [len(whole) - 1]):
        out = tmp_path / f"stopped {stops}"
        for stop in stops:
            with pytest.raises(KeyboardInterrupt):
                run(files, codec, out, stop)
            assert not out.exists()
            assert partial(out).is_dir()
        left = run(files, codec, out)
        assert len(left) == len(whole) - sum(stops)
        assert contents(out) == contents(tmp_path / "one")
        assert not partial(out).exists()
        assert Bundle(out).state_dict("ant")


def test_what_is_damaged_is_written_anew(files: Files, tmp_path: Path) -> None:
    run(files, Dense(), tmp_path / "one")
    out = tmp_path / "two"
    with pytest.raises(KeyboardInterrupt):
        run(files, Dense(), out, 3)
    spool = partial(out) / "task-bee.safetensors.spool"
    data = bytearray(spool.read_bytes())
    data[-3] ^= 1
    spool.write_bytes(data)
    left = run(files, Dense(), out)
    assert contents(out) == contents(tmp_path / "one")
    assert len(left) > len(run_all(files)) - 3


def run_all(files: Files) -> list[str]:
    return list(Family(files.base, files.finetuned, private=PRIVATE).sizes)


@pytest.mark.parametrize("change", ["codec", "checkpoint", "tasks", "journal"])
def test_another_run_begins_anew(files: Files, tmp_path: Path, change: str) -> None:
    """Nothing of the first run is in the bundle of the second."""
    out = tmp_path / "two"
    with pytest.raises(KeyboardInterrupt):
        run(files, Dense(), out, 3)
    codec: DeltaCodec = Dense()
    if change == "codec":
        codec = Dense("bf16")
    elif change == "checkpoint":
        state: dict[str, Tensor] = load_file(files.finetuned["ant"])
        state["hidden.weight"] *= 1.5
        save_file(state, files.finetuned["ant"])
        os.utime(files.finetuned["ant"], (1, 1))
    elif change == "tasks":
        del files.finetuned["cat"]
    else:
        (partial(out) / journal.JOURNAL).write_text("not JSON\n")
    left = run(files, codec, out)
    assert len(left) == len(run_all(files))
    run(files, codec, tmp_path / "one")
    assert contents(out) == contents(tmp_path / "one")


def test_a_line_half_written_is_left_out(files: Files, tmp_path: Path) -> None:
    out = tmp_path / "two"
    with pytest.raises(KeyboardInterrupt):
        run(files, Dense(), out, 3)
    path = partial(out) / journal.JOURNAL
    path.write_text(path.read_text()[:-9])
    assert len(run(files, Dense(), out)) == len(run_all(files)) - 2
    run(files, Dense(), tmp_path / "one")
    assert contents(out) == contents(tmp_path / "one")


@pytest.mark.parametrize("codec", [EMR(), Dense()], ids=["EMR", "dense"])
def test_a_damaged_journal_is_not_believed(files: Files, tmp_path: Path, codec: DeltaCodec) -> None:
    """Whatever is done to it, the bundle is the one that is written from the start."""
    run(files, codec, tmp_path / "one")
    with pytest.raises(KeyboardInterrupt):
        run(files, codec, tmp_path / "two", 3)
    random = np.random.default_rng(0)
    for trial in range(12):
        out = tmp_path / f"trial {trial}"
        shutil.copytree(partial(tmp_path / "two"), partial(out))
        path = partial(out) / journal.JOURNAL
        path.write_bytes(mangled(path.read_bytes(), random))
        run(files, codec, out)
        assert contents(out) == contents(tmp_path / "one"), trial


def mangled(data: bytes, random: np.random.Generator) -> bytes:
    """Bytes changed, or lines repeated, left out, swapped or changed with a number."""
    first, *lines, _ = data.split(b"\n")
    i, j = random.integers(len(lines), size=2)
    match random.integers(5):
        case 0:
            changed = bytearray(data)
            for at in random.integers(len(first) + 1, len(data), 3):
                changed[at] = random.integers(256)
            return bytes(changed)
        case 1:
            lines.insert(i, lines[j])
        case 2:
            del lines[i]
        case 3:
            lines[i], lines[j] = lines[j], lines[i]
        case 4:
            lines[i] = re.sub(rb"\d+", str(random.integers(99)).encode(), lines[i], count=1)
    return b"\n".join([first, *lines, b""])


def test_bad_input_leaves_nothing_to_go_on_from(files: Files, tmp_path: Path) -> None:
    state = load_file(files.finetuned["cat"])
    state["hidden.bias"][1] = torch.nan
    save_file(state, files.finetuned["cat"])
    with pytest.raises(FamilyError, match=r"'hidden\.bias' holds 1 values"):
        run(files, Dense(), tmp_path / "b")
    assert not partial(tmp_path / "b").exists()


def test_two_runs_do_not_write_one_folder(files: Files, tmp_path: Path) -> None:
    out = tmp_path / "b"
    with FileLock(tmp_path / ".b.lock"), pytest.raises(BundleError, match="another run is writing"):
        run(files, Dense(), out)
    run(files, Dense(), out)


def killed(files: Files, out: Path) -> None:
    journal._DUE = 0

    def progress(run: int, done: int, total: int) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    compress(files.base, files.finetuned, EMR(), out, private=PRIVATE, progress=progress)


def test_a_killed_run_can_be_followed(files: Files, tmp_path: Path) -> None:
    out = tmp_path / "b"
    assert by_itself(killed, files, out) == (-signal.SIGKILL, None)
    left = run(files, EMR(), out)
    assert len(left) == len(run_all(files)) - 3
    run(files, EMR(), tmp_path / "one")
    assert contents(out) == contents(tmp_path / "one")
