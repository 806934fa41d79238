"""Compressing by several processes: to the byte the bundle of one, or no bundle and one message."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import contents
from processes import as_rank, forking
from safetensors.torch import load_file, save_file
from tiny_net import TESTS, Files, TinyNet
from torch import Tensor

from fusionkit import (
    DBMS,
    EMR,
    SVD,
    TIES,
    Bundle,
    Dense,
    Elect,
    MagnitudePrune,
    Merged,
    Normalized,
    Sketch,
)
from fusionkit.bundles import journal, part_writer
from fusionkit.bundles.compress import compress
from fusionkit.codecs.base import DeltaCodec
from fusionkit.errors import FusionKitError
from fusionkit.reuse.module import ReuseModule
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.processes import ALONE, Group, Processes
from fusionkit.task_vectors.workers import Workers
from fusionkit.testing import models

CODECS: dict[str, DeltaCodec] = {
    "EMR": EMR(),
    "EMR per tensor": EMR(scope="tensor", rescale="l2", dtype="int4"),
    "pruned": MagnitudePrune(0.3),
    "pruned per tensor": MagnitudePrune(0.3, scope="tensor"),
    "PERU-FFT": MagnitudePrune(0.2, merge=TIES(0.5)),
    "normalized": Merged(Normalized(Elect())),
    "SVD": SVD(rank=2),
    "SVD by budget": SVD(budget=900, dtype="int8"),
    "SVD by energy": SVD(energy=0.5, scope="model"),
    "DBMS": DBMS(MagnitudePrune(0.1)),
    "DBMS of EMR": DBMS(EMR(), shift=MagnitudePrune(0.05)),
    "dense": Dense("bf16"),
    "Sketch": Sketch(noise=0.02),
}
FAMILIES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "large files": torch.float32,
}
LARGE = 256
"""Bytes from which files count as large, in that family."""


def save(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The contract's family, in files, its deltas so coarse that many magnitudes are equal."""
    arguments = models(dtype)
    base = _plain(arguments["base"])
    save_file(base, folder / "base.safetensors")
    finetuned = {}
    for task, state in arguments["finetuned"].items():
        for name, tensor in state.items():
            if name in base and dtype == torch.bfloat16 and tensor.shape == base[name].shape:
                moved = ((tensor - base[name]) * 16).round() / 16
                state[name] = base[name].to(torch.float32) + moved
        finetuned[task] = folder / f"{task}.safetensors"
        save_file(_plain({n: t.to(dtype) for n, t in state.items()}), finetuned[task])
    return {
        "base": folder / "base.safetensors",
        "finetuned": finetuned,
        "private": arguments["private"],
    }


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.clone().contiguous() for name, t in state.items() if name != "decoder"}


def work(rank: int, count: int, job: str, folder: str, result: str) -> None:
    """What each process does."""
    as_rank(rank, count)
    store = f"file://{folder}/{job}.store"
    torch.distributed.init_process_group("gloo", store, rank=rank, world_size=count)
    said = ""
    try:
        JOBS[job](Path(folder), Group())
    except FusionKitError as error:
        said = f"{type(error).__name__}: {error}"
    Path(result + f".{rank}").write_text(said)


def run(count: int, job: str, folder: Path) -> list[str]:
    """Run a job in several processes; what each said in the end."""
    result = folder / f"{job}.said"
    context = forking()
    started = [
        context.Process(target=work, args=(rank, count, job, str(folder), str(result)))
        for rank in range(count)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(240)
        assert process.exitcode is not None, "a process hangs"
    (folder / f"{job}.store").unlink(missing_ok=True)
    found = [Path(f"{result}.{rank}") for rank in range(count)]
    return [path.read_text() if path.exists() else "ended" for path in found]


def all_codecs(folder: Path, processes: Processes) -> None:
    for family, dtype in FAMILIES.items():
        part_writer._LARGE = LARGE if family == "large files" else 1 << 26
        inputs = folder / family
        if processes.rank == 0:
            inputs.mkdir()
            save(inputs, dtype)
        processes.gather(None)
        for name, codec in CODECS.items():
            compress(
                inputs / "base.safetensors",
                {task: inputs / f"{task}.safetensors" for task in ("ant", "bee", "cat")},
                codec,
                folder / f"{family}, {name}",
                private=["head.*"],
                processes=processes,
            )


def not_a_number(folder: Path, processes: Processes) -> None:
    arguments = save_once(folder, processes)
    compress(codec=EMR(), out=folder / "bundle", processes=processes, **arguments)


def killed(folder: Path, processes: Processes) -> None:
    journal._DUE = 0  # after each tensor
    arguments = save_once(folder, processes)

    def progress(run: int, done: int, total: int) -> None:
        if processes.rank == 1 and done == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    compress(
        codec=Dense(), out=folder / "bundle", processes=processes, progress=progress, **arguments
    )


def again(folder: Path, processes: Processes) -> None:
    """Ends what was killed; only tensors that were not written yet are encoded."""
    arguments = save_once(folder, processes)
    done: list[int] = []
    compress(
        codec=Dense(),
        out=folder / "bundle",
        processes=processes,
        progress=lambda run, now, total: done.append(total),
        **arguments,
    )
    (folder / f"encoded.{processes.rank}").write_text(json.dumps(done[-1] if done else 0))


def exists(folder: Path, processes: Processes) -> None:
    arguments = save_once(folder, processes)
    compress(codec=Dense(), out=folder, processes=processes, **arguments)


def save_once(folder: Path, processes: Processes) -> dict[str, Any]:
    inputs = folder / "inputs"
    if processes.rank == 0 and not inputs.exists():
        inputs.mkdir()
        save(inputs, torch.float32)
    processes.gather(None)
    return {
        "base": inputs / "base.safetensors",
        "finetuned": {task: inputs / f"{task}.safetensors" for task in ("ant", "bee", "cat")},
        "private": ["head.*"],
    }


JOBS: dict[str, Callable[[Path, Processes], None]] = {
    each.__name__: each for each in (all_codecs, not_a_number, killed, again, exists)
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(2, marks=pytest.mark.slow),
        pytest.param(3, marks=[pytest.mark.slow, pytest.mark.nightly]),
    ],
)
def by_several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles by all codecs, compressed by several processes."""
    folder = tmp_path_factory.mktemp("several")
    assert run(request.param, "all_codecs", folder) == [""] * request.param
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CODECS)
def test_the_bundle_is_that_of_one_process(
    by_several: Path, family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family == "large files":
        monkeypatch.setattr(part_writer, "_LARGE", LARGE)
    inputs = by_several / family
    compress(
        inputs / "base.safetensors",
        {task: inputs / f"{task}.safetensors" for task in ("ant", "bee", "cat")},
        CODECS[name],
        tmp_path / "bundle",
        private=["head.*"],
    )
    assert contents(by_several / f"{family}, {name}") == contents(tmp_path / "bundle")


def test_every_process_ends_with_one_message(tmp_path: Path) -> None:
    """One meets a NaN in its share; no bundle is left, nor anything else."""
    inputs = save_once(tmp_path, ALONE)
    tuned = inputs["finetuned"]["bee"]
    state = load_file(tuned)
    state["embedding"][3, 3] = torch.nan
    save_file(state, tuned)
    said = run(2, "not_a_number", tmp_path)
    own, other = sorted(said, key=lambda each: each.startswith("ProcessError"))
    assert own.startswith("FamilyError: ")
    assert "'embedding' holds 1 values that are NaN or infinite (task 'bee')" in own
    assert other.startswith("ProcessError: process ")
    assert own.removeprefix("FamilyError: ") in other
    assert not (tmp_path / "bundle").exists()


def test_a_folder_that_exists_ends_every_process(tmp_path: Path) -> None:
    said = run(2, "exists", tmp_path)
    assert "exists; choose another folder" in said[0]
    assert said[1].startswith("ProcessError: process 0 of 2 failed: ")


def test_a_process_that_dies_leaves_no_bundle(tmp_path: Path) -> None:
    said = run(2, "killed", tmp_path)
    assert said[0].startswith("ProcessError: another of the 2 processes has ended")
    assert said[1] == "ended"
    assert not (tmp_path / "bundle").exists()
    assert run(2, "again", tmp_path) == ["", ""]
    arguments = save_once(tmp_path, ALONE)
    family = Family(**arguments)
    encoded = [int((tmp_path / f"encoded.{rank}").read_text()) for rank in range(2)]
    shares = [len(Workers(Of(rank, 2)).share(family.sizes)) for rank in range(2)]
    assert encoded[1] == shares[1] - 2  # not those that had been written
    assert encoded[0] <= shares[0]
    compress(codec=Dense(), out=tmp_path / "one", **arguments)
    assert contents(tmp_path / "bundle") == contents(tmp_path / "one")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


class Of(Processes):
    """One of several, without the others."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count


def test_shares_are_neighbours_and_everything_is_someones() -> None:
    sizes = {"a": 10, "b": 0, "c": 1, "d": 7, "e": 30, "f": 2}
    for count in range(1, 9):
        shares = [Workers(Of(rank, count)).share(sizes) for rank in range(count)]
        assert [name for share in shares for name in share] == list(sizes)
    two = [Workers(Of(rank, 2)).share(sizes) for rank in range(2)]
    assert two == [["a", "b", "c", "d"], ["e", "f"]]
    assert [Workers(Of(rank, 3)).share({"a": 0, "b": 0}) for rank in range(3)] == [
        ["a", "b"],
        [],
        [],
    ]


@pytest.mark.slow
def test_the_command_line_starts_them(files: Files, tmp_path: Path) -> None:
    """As Lightning does: by --trainer.devices; the bundle is there, and reported once."""
    recipe = {
        "model": {
            "model": {"class_path": "tiny_net.TinyNet"},
            "base": {
                "class_path": "fusionkit.Checkpoint.of",
                "init_args": {"source": str(files.base)},
            },
            "finetuned": {task: str(path) for task, path in files.finetuned.items()},
            "private": ["head.*"],
            "codec": {"class_path": "EMR"},
            "bundle": str(tmp_path / "bundle"),
        },
        "trainer": {"accelerator": "cpu", "devices": 2},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    script = tmp_path / "run.py"
    script.write_text("from fusionkit.cli.main import main; main()")
    command = [sys.executable, str(script), "compress", "--config", str(tmp_path / "recipe.yaml")]
    paths = os.pathsep.join([str(TESTS), *sys.path])
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        timeout=240,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bundle of 3") == 1
    finetuned: Any = {task: str(path) for task, path in files.finetuned.items()}
    alone = ReuseModule(TinyNet(), finetuned=finetuned, private=["head.*"], base=str(files.base))
    alone.compress(tmp_path / "one", codec=EMR())
    assert contents(tmp_path / "bundle") == contents(tmp_path / "one")
    assert Bundle(tmp_path / "bundle", files.base).state_dict("bee")
