"""Paths as people write them: `~`, environment variables, long names, two Unicode forms."""

import os
import re
import unicodedata
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fusionkit import (
    EMR,
    Bundle,
    Checkpoint,
    Dense,
    add_tasks,
    compress,
    export_adapter,
    export_task,
)
from fusionkit.checkpoints.checkpoint import find_checkpoints
from fusionkit.checkpoints.paths import open_path, written_out
from fusionkit.errors import BundleError, CheckpointError, FusionKitError

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "modèle-é") for form in ("NFC", "NFD"))


@pytest.fixture(autouse=True)
def _places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home with a base and a fine-tuned model, and an empty folder to work in."""
    home, work = tmp_path / "home", tmp_path / "work"
    (home / "tuned").mkdir(parents=True)
    work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MODELS", str(home))
    monkeypatch.setenv("BUCKET", "memory://zoo")
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(work)
    state = {"net.weight": torch.randn(8, 6)}
    save_file(state, home / "base.safetensors")
    save_file({"net.weight": state["net.weight"] + 0.1}, home / "tuned" / "ant.safetensors")


def here() -> list[str]:
    return os.listdir()


# --- ~ and variables --------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["~", "$HOME", "${MODELS}", "$MODELS/../home", "~root"])
def test_written_out_wherever_a_path_is_read_or_written(tmp_path: Path, place: str) -> None:
    home = tmp_path / "home"
    if place == "~root":
        assert open_path("~root/x") == Path(os.path.expanduser("~root")) / "x"
        return
    base = Checkpoint.of(f"{place}/base.safetensors")
    assert Path(base.label).resolve() == home / "base.safetensors"
    found = find_checkpoints(f"{place}/tuned/*.safetensors")
    compress(Path(place) / "base.safetensors", found, EMR(), f"{place}/b.bundle")
    bundle = Bundle.load(Path(place) / "b.bundle")
    bundle.save(f"{place}/c.bundle")
    written = export_task(bundle, "ant", Path(place) / "ant.pt")
    export_adapter(bundle, "ant", f"{place}/adapter", rank=1)
    assert written.resolve() == home / "ant.pt"
    assert {"b.bundle", "c.bundle", "ant.pt", "adapter"} <= set(os.listdir(home))
    assert here() == []
    manifest = (home / "b.bundle" / "manifest.json").read_text()
    assert "~" not in manifest  # another tool would not know what it means
    assert "$" not in manifest


def test_urls_and_hub_names_hold_variables_too() -> None:
    assert written_out("$BUCKET/base") == "memory://zoo/base"
    assert written_out("hf://${MODELS}x") == f"hf://{os.environ['MODELS']}x"
    assert written_out("org/name~1") == "org/name~1"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("$NOWHERE/base", ": the environment variable 'NOWHERE' is not set"),
        ("a/${NOWHERE}", ": the environment variable 'NOWHERE' is not set"),
        ("~no-such-user/base", ": no user 'no-such-user' has a home directory"),
    ],
)
def test_what_stands_for_nothing(path: str, said: str) -> None:
    for use in (Checkpoint.of, Bundle.load, lambda path: find_checkpoints(f"{path}/*")):
        with pytest.raises(FusionKitError, match=rf"^{re.escape(path)}.*{re.escape(said)}"):
            use(path)
    with pytest.raises(FusionKitError, match=re.escape(said)):
        compress("~/base.safetensors", find_checkpoints("~/tuned/*.safetensors"), EMR(), path)
    assert here() == []


def test_names_that_hold_such_signs_themselves(tmp_path: Path) -> None:
    for name in ("a$NOWHERE", "~no-such-user", "$5 model", "b$"):
        (tmp_path / "work" / name).mkdir()
        assert open_path(f"{name}/new") == Path(name) / "new" or name.startswith("~")
        assert open_path(name).samefile(tmp_path / "work" / name)
        assert open_path(open_path(name)).samefile(tmp_path / "work" / name)
    assert open_path("x~").name == "x~"
    (tmp_path / "home" / "~").mkdir()
    assert open_path("./~") == tmp_path / "work" / "~" or open_path("./~") == Path("./~")


# --- long names -------------------------------------------------------------------------------


def test_long_task_names(tmp_path: Path) -> None:
    """In UTF-8 and percent-encoded, a sign is nine bytes."""
    tuned = "~/tuned/ant.safetensors"
    names = ["模型" * 60, "模型" * 59 + "模式", "x" * 232, "x" * 233, "y"]
    bundle = compress("~/base.safetensors", dict.fromkeys(names, tuned), Dense(), "b")
    assert len(list(Path("b").glob("task-*"))) == len(names)
    assert (Path("b") / f"task-{'x' * 232}.safetensors").is_file()  # as it ever was
    add_tasks(bundle, {"z" * 1000: tuned})
    bundle.remove(names[1])
    bundle.save("c")
    again, wanted = Bundle.load("c"), bundle.state_dict("y")["net.weight"]
    for name in (names[0], *names[2:], "z" * 1000):
        assert torch.equal(again.state_dict(name)["net.weight"], wanted)


@pytest.mark.parametrize("name", ["b" * 255, "é" * 127])
def test_the_longest_names_can_be_written(name: str) -> None:
    """What is beside them while they are written has names that are no longer."""
    for overwrite in (False, True):
        bundle = compress(
            "~/base.safetensors",
            {"ant": "~/tuned/ant.safetensors"},
            EMR(),
            name,
            overwrite=overwrite,
        )
    export_task(bundle, "ant", f"{name[:100]}.safetensors")
    export_task(bundle, "ant", f"{'c' * 252}.pt")
    assert len(here()) == 3


def test_names_that_no_file_can_have_are_refused_before_any_work() -> None:
    said = "is a name of 256 bytes, and file systems take 255; choose a shorter one"
    tuned = find_checkpoints("~/tuned/*.safetensors")
    for name in ("b" * 256, "é" * 128, f"folder/{'b' * 256}/b"):
        with pytest.raises(FusionKitError, match=said):
            compress("~/base.safetensors", tuned, EMR(), name)
        with pytest.raises(FusionKitError, match=said):
            Checkpoint.of(name)
    assert here() == []


# --- Unicode ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("there", "asked"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_a_name_in_the_other_form_is_found(there: str, asked: str) -> None:
    folder = Path(there) / "models"
    folder.mkdir(parents=True)
    state = {"w": torch.randn(2)}
    save_file(state, folder / f"{there}.safetensors")
    assert torch.equal(Checkpoint.of(f"{asked}/models/{asked}.safetensors")["w"], state["w"])
    assert find_checkpoints(f"{asked}/models/*.safetensors").keys() == {COMPOSED}
    assert open_path(f"{asked}/new/{asked}") == Path(there) / "new" / asked
    save_file(state, folder / f"{asked}.safetensors")  # both: each is itself
    assert open_path(folder / f"{asked}.safetensors").name == f"{asked}.safetensors"
    with pytest.raises(CheckpointError, match="name one task in two Unicode forms"):
        find_checkpoints(f"{there}/models/*.safetensors")


def test_tasks_that_look_the_same_are_refused() -> None:
    tuned = "~/tuned/ant.safetensors"
    said = re.escape("tasks 'mod\\xe8le-\\xe9' and 'mode\\u0300le-e\\u0301' have one name")
    with pytest.raises(BundleError, match=said):
        compress("~/base.safetensors", {COMPOSED: tuned, DECOMPOSED: tuned}, EMR(), "b")
    assert here() == []
    bundle = compress("~/base.safetensors", {COMPOSED: tuned}, EMR(), "b")
    with pytest.raises(BundleError, match=said):
        add_tasks(bundle, {DECOMPOSED: tuned}, keep_shared=True)


def test_what_is_no_text_is_refused_before_any_work() -> None:
    """A manifest could not be read again."""
    tuned, base = "~/tuned/ant.safetensors", Path("ba\udcffse.safetensors")
    with pytest.raises(BundleError, match=r"task 'a\\udcff': its name is not UTF-8"):
        compress("~/base.safetensors", {"a\udcff": tuned}, EMR(), "b")
    base.write_bytes(Path("~/base.safetensors").expanduser().read_bytes())
    with pytest.raises(BundleError, match=r"ba\\udcffse\.safetensors': is not UTF-8"):
        compress(str(base), {"ant": tuned}, EMR(), "b")
    assert here() == [base.name]
