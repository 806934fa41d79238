"""Who takes names on the Hub says so; a lock file is read or refused."""

import inspect
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest

import fusionkit.tasks
from fusionkit.checkpoints.hub_lock import LOCK, Lock, Locked, LockedFile, lock_in_force, read_lock
from fusionkit.checkpoints.hub_names import (
    Repository,
    Use,
    names_read_by,
    of_library,
    of_url,
    reads_hub,
)
from fusionkit.errors import HubError
from fusionkit.tasks import models
from fusionkit.tasks.data import TaskData

READERS = ("tokenizer", "processor", "encoder", "preprocessing")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_all_that_take_names_say_so() -> None:
    """Or `fetch` would leave out what they read."""
    for name, each in inspect.getmembers(models, inspect.isfunction):
        if each.__module__ == models.__name__ and name[0] != "_" and name != "config_of":
            assert "path" not in inspect.signature(each).parameters or names_read_by(each), name
    for module in iter_modules(fusionkit.tasks.__path__, "fusionkit.tasks."):
        for name, each in inspect.getmembers(import_module(module.name), inspect.isclass):
            if issubclass(each, TaskData) and not inspect.isabstract(each) and name[0] != "_":
                own = inspect.signature(each).parameters.keys() & {*READERS}
                assert own <= names_read_by(each).keys(), name


def test_a_subclass_says_more() -> None:
    @reads_hub(path=Use.MODEL)
    class Base:
        pass

    @reads_hub(tokenizer=Use.BESIDE)
    class Derived(Base):
        pass

    assert names_read_by(Base) == {"path": Use.MODEL}
    assert names_read_by(Derived) == {"path": Use.MODEL, "tokenizer": Use.BESIDE}


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("hf://a/b", (Repository("a/b"), "")),
        ("hf://models/a/b@v1/c/d.bin", (Repository("a/b", "model", "v1"), "c/d.bin")),
        ("hf://a/b@refs/pr/1", (Repository("a/b", "model", "refs/pr/1"), "")),
        ("hf://datasets/a/b/", (Repository("a/b", "dataset"), "")),
        ("hf://spaces/a/b", None),
        ("s3://a/b", None),
        ("a/b", None),
    ],
)
def test_urls(url: str, found: tuple[Repository, str] | None) -> None:
    assert of_url(url) == found


def test_names_of_libraries() -> None:
    assert of_library("hf-hub:timm/x@v1") == (Repository("timm/x", "model", "v1"), Use.MODEL)
    assert of_library("open_clip:hf-hub:a/b") == (Repository("a/b"), Use.OPEN_CLIP)
    assert of_library("open_clip:ViT-B-32/openai") is None


def test_a_lock_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comes back as it was written, digits that are no numbers too."""
    file = LockedFile(3, blob="1" * 40)
    locked = {
        Repository("a/b", "model", "v1"): Locked("2" * 40, ["model"], {"config.json": file}),
        Repository("a/b", "dataset"): Locked(COMMIT, ["rows"], {"x": file}, {"": {"test": ["x"]}}),
    }
    path = tmp_path / "R.lock.yaml"
    path.write_text(Lock.of(locked).text())
    assert read_lock(path).repositories() == locked
    monkeypatch.setenv(LOCK, str(tmp_path / "gone.lock.yaml"))
    with pytest.raises(HubError, match=r"gone.lock.yaml: the environment variable FUSIONKIT_LOCK"):
        lock_in_force()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "can't be read as a lock file"),
        ("version: 2", "is a lock file of version 2, and this is read: 1; upgrade"),
        ("a list", "is a lock file of version None"),
        ("{version: 1, models: {a/b: {commit: main}}}", "can't be read as a lock file"),
        (
            f"{{version: 1, models: {{a/b: {{commit: '{COMMIT}', reads: [], "
            "files: {../../x: {size: 1}}}}}",
            "can't be read as a lock file",
        ),
    ],
)
def test_what_is_no_lock_file(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "R.lock.yaml").write_text(text)
    with pytest.raises(HubError, match=said):
        read_lock(tmp_path / "R.lock.yaml")
