"""`fusionkit calibrate`, and DBMS in `compress`, `test`, `inspect` and `compare`."""

import csv
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from program import PROGRAM, hear_interrupts, run
from tiny_net import TASKS, Files
from tiny_tasks import EPOCHS

from fusionkit import DBMS, Bundle, MagnitudePrune
from fusionkit.calibration.pair_search import PROBES


class SlowEpochs(Callback):
    """Time to interrupt."""

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        print(f"epoch {trainer.current_epoch}", flush=True)
        time.sleep(0.3)


@pytest.fixture
def dbms(recipe: Path) -> Path:
    """The tiny family's recipe, its codec within DBMS."""
    content = yaml.safe_load(recipe.read_text())
    prune = {"class_path": "MagnitudePrune", "init_args": {"density": 0.1}}
    content["model"]["codec"] = {"class_path": "DBMS", "init_args": {"codec": prune}}
    content["calibration"] = {"rows": 16}
    content["data"] = {"class_path": "tiny_tasks.Rows"}
    content["trainer"]["max_epochs"] = EPOCHS
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    return recipe


def test_calibrate_then_test_by_one_recipe(dbms: Path, tmp_path: Path) -> None:
    shown = run("calibrate", "--config", dbms)
    assert f"written: {tmp_path}/bundle" in shown
    for word in (*TASKS, "shift α", "scale β", "before", "after", "outputs"):
        assert word in shown
    bundle = Bundle(tmp_path / "bundle")
    assert repr(bundle.codec).startswith("DBMS(codec=MagnitudePrune(density=0.1")
    manifest = json.loads((tmp_path / "bundle/manifest.json").read_text())
    assert manifest["format_version"] == 3
    learned = manifest["tasks"]["ant"]["calibration"]
    assert set(learned) == {
        "shift", "scale", "objective", "method", "rows", "seed", "epochs", "loss_before",
        "loss_after",
    }  # fmt: skip
    assert learned["loss_after"] < learned["loss_before"]
    assert "task" in run("test", "--config", dbms)
    assert "scale β" in run("inspect", tmp_path / "bundle")
    assert (tmp_path / "out/config.yaml").is_file()
    assert (tmp_path / "out/checkpoints/last.ckpt").is_file()
    before = (tmp_path / "bundle/manifest.json").read_bytes()
    assert "exists; replace it with --overwrite" in run("calibrate", "--config", dbms, code=1)
    run("calibrate", "--config", dbms, "--overwrite", "true")
    assert (tmp_path / "bundle/manifest.json").read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))


def test_compress_alone_is_without_data(dbms: Path, tmp_path: Path) -> None:
    run("compress", "--config", dbms)
    manifest = json.loads((tmp_path / "bundle/manifest.json").read_text())
    assert manifest["format_version"] == 1
    assert "calibration" not in manifest["tasks"]["ant"]
    assert "scale β" not in run("inspect", tmp_path / "bundle")
    run("test", "--config", dbms)


def test_every_setting_on_the_command_line(dbms: Path, tmp_path: Path) -> None:
    run(
        "calibrate", "--config", dbms, "--model.codec.init_args.codec", "SVD",
        "--model.codec.init_args.codec.rank", "1", "--model.codec.init_args.shift", "EMR",
        "--calibration.objective", "features", "--calibration.method", "search",
        "--calibration.rows", "8", "--calibration.seed", "3",
        "--trainer.max_epochs", "4",
    )  # fmt: skip
    bundle = Bundle(tmp_path / "bundle")
    assert repr(bundle.codec).startswith("DBMS(codec=SVD(rank=1")
    assert "shift=EMR(" in repr(bundle.codec)
    prune = ["--model.codec.init_args.shift", "MagnitudePrune", "--model.bundle", tmp_path / "own"]
    run("compress", "--config", dbms, *prune)
    own = Bundle(tmp_path / "own").codec
    assert own == DBMS(MagnitudePrune(0.1), MagnitudePrune())  # with nothing of the default's
    learned = bundle.manifest.tasks["cat"].calibration
    assert learned
    assert (learned.objective, learned.method) == ("features", "search")
    assert (learned.rows, learned.seed, learned.epochs) == (8, 3, 4)


@pytest.mark.nightly
@pytest.mark.slow
def test_interrupted_and_resumed(dbms: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run("calibrate", "--config", dbms, "--model.bundle", whole, "--out", tmp_path / "other")
    slow = f"--trainer.callbacks=[{{class_path: {__name__}.SlowEpochs}}]"
    process = subprocess.Popen(
        [PROGRAM, "calibrate", "--config", dbms, slow],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_interrupts,  # noqa: PLW1509 (no threads are at work)
    )
    assert process.stdout
    for line in process.stdout:
        if line.strip() == f"epoch {len(PROBES) + 1}":
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted; nothing was left half-written" in errors
    assert not (tmp_path / "bundle").exists()
    run("calibrate", "--config", dbms, "--ckpt_path", "last")
    for path in whole.iterdir():
        assert path.read_bytes() == (tmp_path / "bundle" / path.name).read_bytes()


def test_compare_with_and_without(dbms: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(dbms.read_text())
    del content["model"]["codec"], content["model"]["bundle"]
    content["codecs"] = {
        "prune": {"class_path": "MagnitudePrune", "init_args": {"density": 0.1}},
        "own": {
            "class_path": "DBMS",
            "init_args": {"codec": {"class_path": "EMR"}, "shift": {"class_path": "EMR"}},
        },
    }
    content["trainer"]["max_epochs"] = len(PROBES)
    content["dbms"], content["seeds"] = True, [0, 1]
    dbms.write_text(yaml.safe_dump(content, sort_keys=False))
    shown = run("compare", "--config", dbms)
    with (tmp_path / "out/compare.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["fine-tuned", "base", "prune", "DBMS prune", "own"]
    assert rows["prune"]["spread"] == ""
    assert float(rows["DBMS prune"]["spread"]) >= 0
    assert float(rows["DBMS prune"]["bits_per_parameter"]) > float(
        rows["prune"]["bits_per_parameter"]
    )
    assert " ± " in shown
    assert rows["own"]["settings"].startswith("DBMS(codec=EMR(")


def test_compare_with_a_strategy_of_its_own(dbms: Path, tmp_path: Path) -> None:
    """A strategy is one Trainer's: each calibration, and the evaluation, has its own."""
    content = yaml.safe_load(dbms.read_text())
    content["codecs"] = {"own": content["model"].pop("codec")}
    content["trainer"]["max_epochs"] = 2
    content["trainer"]["strategy"] = {
        "class_path": "lightning.pytorch.strategies.SingleDeviceStrategy",
        "init_args": {"device": "cpu"},
    }
    content["trainer"]["callbacks"] = [{"class_path": f"{__name__}.SlowEpochs"}]
    content["seeds"] = [0, 1]
    dbms.write_text(yaml.safe_dump(content, sort_keys=False))
    assert run("compare", "--config", dbms).count("epoch 1") == 2
    rows = json.loads((tmp_path / "out/compare.json").read_text())
    assert [row["name"] for row in rows] == ["fine-tuned", "base", "own"]


def test_a_recipe_of_another_codec(dbms: Path) -> None:
    shown = run("calibrate", "--config", dbms, "--model.codec", "EMR", code=1)
    assert "has nothing to calibrate; wrap it" in shown


def test_where_to(dbms: Path) -> None:
    shown = run("calibrate", "--config", dbms, "--model.bundle", "null", code=1)
    assert "--model.bundle FOLDER" in shown


def test_a_task_without_data_is_named_first(dbms: Path, files: Files, tmp_path: Path) -> None:
    finetuned = f"--model.finetuned.dog={files.finetuned['ant']}"
    shown = run("calibrate", "--config", dbms, finetuned, code=1)
    assert "no calibration data for task 'dog'" in shown
    assert not (tmp_path / "bundle").exists()
