"""What is there already is found before anything is computed, wherever it is."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from program import run
from tiny_net import TASKS, TinyNet
from tiny_tasks import PRIVATE, Rows, States, module, settings, trainer

import fusionkit
from fusionkit import DBMS, SVD, Bundle, MagnitudePrune
from fusionkit.bundles.export_model import export_task
from fusionkit.checkpoints.checkpoint import Checkpoint
from fusionkit.checkpoints.paths import is_there
from fusionkit.errors import BundleError, FusionKitError
from fusionkit.reuse.module import ReuseModule

URL = "memory://there/bundle"
DATA = "memory://there/thesis"


@pytest.fixture
def store() -> Iterator[Any]:
    """A file system with a bundle, and a folder that is none."""
    system = fsspec.filesystem("memory")
    system.pipe("/there/bundle/manifest.json", b"{}")
    system.pipe("/there/thesis/thesis.txt", b"")
    yield system
    system.rm("/", recursive=True)


@pytest.fixture
def _nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_anyway(*_: object, **__: object) -> None:
        pytest.fail("computed, before it was refused")

    monkeypatch.setattr(Trainer, "fit", run_anyway)
    monkeypatch.setattr(ReuseModule, "compress", run_anyway)


@pytest.fixture
def dbms(recipe: Path) -> Path:
    content = yaml.safe_load(recipe.read_text())
    prune = {"class_path": "MagnitudePrune", "init_args": {"density": 0.1}}
    content["model"]["codec"] = {"class_path": "DBMS", "init_args": {"codec": prune}}
    content["data"] = {"class_path": "tiny_tasks.Rows"}
    content["calibration"] = {"rows": 16}
    content["trainer"]["max_epochs"] = 2
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    return recipe


def contents(store: Any) -> dict[str, bytes]:
    return {path: store.cat(path) for path in store.find("/there")}


def test_is_there(store: Any, tmp_path: Path) -> None:
    for path in (URL, f"{URL}/manifest.json", tmp_path, str(tmp_path), "package:fusionkit/cli"):
        assert is_there(path)
    for path in ("memory://there/no", tmp_path / "no", "package:fusionkit/no"):
        assert not is_there(path)


@pytest.mark.usefixtures("_nothing_runs")
class TestBeforeAnythingRuns:
    @pytest.mark.parametrize("verb", ["calibrate", "compress"])
    def test_the_verbs(self, store: Any, dbms: Path, verb: str) -> None:
        before = contents(store)
        shown = run(verb, "--config", dbms, "--model.bundle", URL, code=1)
        assert f"{URL}: exists; replace it with --overwrite" in shown
        own = ["--model.bundle", DATA, "--overwrite", "true"]
        shown = run(verb, "--config", dbms, *own, code=1)
        assert "exists and is not a folder with manifest.json" in shown
        assert contents(store) == before

    def test_the_function(self, store: Any, base: TinyNet, finetuned: States) -> None:
        before = contents(store)
        reuse = module(base, finetuned)
        with pytest.raises(BundleError, match="exists; choose another folder, or set overwrite"):
            fusionkit.calibrate(reuse, Rows(), URL)
        with pytest.raises(BundleError, match=r"not a folder with manifest\.json"):
            fusionkit.calibrate(reuse, Rows(), DATA, overwrite=True)
        assert contents(store) == before

    def test_on_the_local_disk(self, dbms: Path, tmp_path: Path) -> None:
        (tmp_path / "bundle").mkdir()
        shown = run("calibrate", "--config", dbms, code=1)
        assert "exists; replace it with --overwrite" in shown


def test_a_url_that_is_free_or_may_be_replaced(store: Any, dbms: Path) -> None:
    for url, own in (("memory://free/bundle", []), (URL, ["--overwrite", "true"])):
        run("calibrate", "--config", dbms, "--model.bundle", url, *own)
        assert list(Bundle.load(url).tasks) == list(TASKS)


def test_calibrated_to_a_url(store: Any, base: TinyNet, finetuned: States) -> None:
    made = fusionkit.calibrate(
        module(base, finetuned),
        Rows(),
        URL,
        settings=settings(),
        codec=DBMS(MagnitudePrune(0.2)),
        trainer=trainer(2),
        overwrite=True,
    )
    assert Bundle.load(URL).codec == made.codec == DBMS(MagnitudePrune(0.2))


def test_exports(store: Any, base: TinyNet, finetuned: States) -> None:
    bundle = fusionkit.compress(base, finetuned, SVD(rank=2), private=PRIVATE)
    for name in ("bee.safetensors", "bee.pt"):
        url = f"memory://there/models/{name}"
        export_task(bundle, "bee", url)
        found, wanted = Checkpoint.of(url), bundle.state_dict("bee")
        assert all(torch.equal(found[each], wanted[each]) for each in found)
        assert [p for p in store.find("/there/models") if p.endswith(".tmp")] == []
        with pytest.raises(BundleError, match="exists; choose another name"):
            export_task(bundle, "bee", url)
        export_task(bundle, "bee", url, overwrite=True)
    with pytest.raises(BundleError, match="exists; choose another folder"):
        fusionkit.export_adapter(bundle, "bee", URL)


@pytest.mark.parametrize("verb", ["test", "compress", "calibrate", "compare"])
def test_results_are_local(store: Any, dbms: Path, tmp_path: Path, verb: str) -> None:
    before = contents(store)
    codecs = ["--codecs", "{emr: {class_path: EMR}}"] if verb == "compare" else []
    shown = run(verb, "--config", dbms, "--out", "memory://there/out", *codecs, code=1)
    assert "memory://there/out: results and trained models are written to the local disk" in shown
    assert contents(store) == before
    assert not Path("memory:").exists()


def test_a_demo_on_the_local_disk(tmp_path: Path) -> None:
    for own in (["--out", "s3://a/b"], ["--cache", "s3://a/b", "--out", tmp_path]):
        assert "written to the local disk" in run("demo", *own, code=1)


def test_what_a_url_needs_is_named() -> None:
    with pytest.raises(FusionKitError, match="nosuch"):
        is_there("nosuch://x")
