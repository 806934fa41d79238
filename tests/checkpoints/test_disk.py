"""Whether a disk may be written, and has room: known before the work, and told when it fills up."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import torch
from processes import by_itself
from torch import Tensor

from fusionkit import DBMS, SVD, Bundle, Dense, Sketch, add_tasks, compress
from fusionkit.bundles.export_model import export_task
from fusionkit.bundles.export_peft import export_adapter
from fusionkit.bundles.served_folder import export_adapters
from fusionkit.checkpoints.disk import (
    Needed,
    SpaceWarning,
    check_space,
    check_writable,
    disk_errors,
)
from fusionkit.errors import BundleError, FusionKitError

BASE = {"w": torch.zeros(400, 100), "head": torch.zeros(50, 100)}
TUNED = {"a": {"w": torch.ones(400, 100), "head": torch.ones(50, 100)}}


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have disks with so many bytes left."""
    return lambda nbytes: monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, nbytes))


def test_what_can_not_fit_is_refused_and_what_may_not_is_told(
    tmp_path: Path, free: Callable[[int], None]
) -> None:
    free(1000)
    check_space(tmp_path / "b", Needed(900, 1000))
    with pytest.warns(SpaceWarning, match=r"b: will take about 1.1 kB, and 1.0 kB are free on "):
        check_space(tmp_path / "b", Needed(900, 1100))
    check_space(tmp_path / "b", Needed(1900, 1900), there=900)
    with pytest.raises(
        BundleError, match=r"needs 1.9 kB at least, .* 900 B are missing; make room"
    ):
        check_space(tmp_path / "b", Needed(1900, 1900))


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(BundleError) as caught:
        call()
    return str(caught.value)


def test_each_verb_looks_for_room_first(tmp_path: Path, free: Callable[[int], None]) -> None:
    bundle = compress(BASE, TUNED, Dense(), tmp_path / "b", private=["head"])
    before = sorted(tmp_path.rglob("*"))
    free(15_000)
    new = {"c": TUNED["a"]}
    said = [
        refused(lambda: compress(BASE, TUNED, Dense(), tmp_path / "d", private=["head"])),
        refused(lambda: add_tasks(bundle, new)),
        refused(lambda: bundle.save(tmp_path / "copy")),
        refused(lambda: export_task(bundle, "a", tmp_path / "a.safetensors")),
        refused(lambda: export_task(bundle, "a", tmp_path / "a.pt")),
    ]
    assert all("at least, and 15.0 kB are free on the file system at /" in each for each in said)
    assert sorted(tmp_path.rglob("*")) == before
    free(30_000)
    with pytest.warns(SpaceWarning, match=r"will take about 100.0 kB"):
        compress(BASE, TUNED, Dense(), tmp_path / "d", private=["head"])


def test_room_for_adapters_is_looked_for_first(tmp_path: Path, free: Callable[[int], None]) -> None:
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.0.self_attn.q_proj.weight"
    base = {name: torch.zeros(300, 200)}
    tuned = {task: {name: torch.randn(300, 200, generator=generator)} for task in ("x", "y")}
    bundle = compress(base, tuned, SVD(rank=4), tmp_path / "b")
    free(3000)
    with pytest.warns(SpaceWarning, match=r"served: will take about 8.0 kB, and 3.0 kB are free"):
        said = refused(lambda: export_adapters(bundle, tmp_path / "served"))
    assert "needs 4.0 kB at least, and 3.0 kB are free on the file system at /" in said
    with pytest.warns(SpaceWarning, match=r"x: will take about 4.0 kB"):
        refused(lambda: export_adapter(bundle, "x", tmp_path / "x"))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["b"]


@pytest.mark.parametrize(
    ("codec", "settings"),
    [
        ("dense", {"dtype": "int8"}),
        ("svd", {"rank": 4}),
        ("svd", {"ratio": 0.1, "dtype": "int4"}),
        ("emr", {}),
        ("magnitude_prune", {"density": 0.1}),
        ("merged", {}),
        ("sketch", {"bits": 0.5}),
        ("dbms", {}),
    ],
)
def test_what_a_codec_says_that_it_takes(codec: str, settings: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {f"w{i}": torch.zeros(300, 200) for i in range(2)}
    tuned = {
        task: {name: torch.randn(w.shape, generator=generator) for name, w in base.items()}
        for task in "ab"
    }
    made = DBMS(SVD(rank=4)) if codec == "dbms" else codec
    bundle = compress(base, tuned, made, **settings)
    shapes = {name: w.shape for name, w in base.items()}
    said = bundle.codec.likely_bytes(shapes, 2)
    assert said is not None
    assert 0.8 < said / bundle.nbytes < 1.2


def test_what_can_not_be_told_beforehand() -> None:
    assert SVD(energy=0.9).likely_bytes({"w": (10, 10)}, 2) is None
    assert Sketch(noise=0.1).likely_bytes({"w": (10, 10)}, 2) is None


def full(kept: Path | None, needed: Needed | None, path: Path) -> str:
    with pytest.raises(BundleError) as caught, disk_errors(path, kept, needed):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return str(caught.value)


def test_a_full_disk_says_what_is_missing(tmp_path: Path, free: Callable[[int], None]) -> None:
    free(1000)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_bytes(b"0" * 300)
    said = full(None, Needed(0, 5000), tmp_path / "b")
    assert f"{tmp_path / 'b'}: could not be written (No space left on device); nothing was " in said
    assert "left behind; 1.0 kB are free on the file system at /" in said
    assert said.endswith(", about 4.0 kB more are needed: make room there, or choose another place")
    said = full(tmp_path / "kept", Needed(0, 5000), tmp_path / "b")
    assert "about 3.7 kB more are needed" in said
    assert said.endswith("choose another place, and run it again to go on from there")
    assert "more are needed" not in full(None, None, tmp_path / "b")


def as_nobody(folder: Path) -> list[str] | None:
    """What somebody is told who may not write there; None if nobody may read what is installed."""
    base: dict[str, Tensor] = {"w": torch.zeros(4)}
    bundle = Bundle(folder / "b", base)
    with TemporaryDirectory() as there:  # what is imported at its first use, before nobody may
        compress(base, {"a": base, "b": base}, Dense(), Path(there, "b")).remove("b")
        bundle.save(Path(there, "copy"))
        for ending in ("safetensors", "pt"):
            export_task(bundle, "a", Path(there, f"a.{ending}"))
        add_tasks(Bundle(Path(there, "b"), base), {"c": base})
    os.setuid(65534)
    if not os.access(torch.__file__, os.R_OK):
        return None
    said = []
    for call in (
        lambda: check_writable(folder / "x"),
        lambda: compress(base, {"a": base}, Dense(), folder / "new" / "b"),
        lambda: bundle.save(folder / "copy"),
        lambda: export_task(bundle, "a", folder / "a.safetensors"),
        lambda: export_task(bundle, "a", folder / "a.pt"),
        lambda: add_tasks(bundle, {"c": base}),
        lambda: bundle.remove("a"),
        lambda: bundle.save(folder / "closed" / "b"),
    ):
        try:
            call()
            said.append("no error")
        except FusionKitError as error:
            said.append(str(error))
    return said


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may")
def test_who_may_not_write_is_told_first() -> None:
    base = {"w": torch.zeros(4)}
    with TemporaryDirectory() as temporary:  # nobody may look into pytest's own
        folder = Path(temporary)
        folder.chmod(0o755)
        (folder / "closed").mkdir(mode=0o700)
        compress(base, {"a": base, "b": base}, Dense(), folder / "b")
        code, said = by_itself(as_nobody, folder)
    assert code == 0
    if said is None:
        pytest.skip("others may not read the installed packages")
    assert len(said) == 8
    refusal = f"can't be written in {folder}: you may not write there"
    assert [each for each in said[:-1] if refusal not in each] == []
    assert f"{folder / 'closed' / 'b'}: you may not look there (Permission denied)" in said[-1]
