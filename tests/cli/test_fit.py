"""`fusionkit fit` as a person uses it: Lightning's flags, resuming, and what it refuses."""

import csv
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fits import HEAD, TARGETS, FewDigits, outputs, tiny_vit
from lightning.pytorch import Callback, LightningModule, Trainer
from program import PROGRAM, hear_interrupts, run, write_finetune
from safetensors.torch import load_file
from tiny_net import TESTS
from torch.utils.data import DataLoader

from fusionkit import Checkpoint, Family
from fusionkit.checkpoints.adapters.folder import AdapterFolder
from fusionkit.checkpoints.adapters.start import start_of
from fusionkit.cli.fit import FitCLI
from fusionkit.reuse.module import ReuseModule

pytest_plugins = ["fits"]


class SlowSteps(Callback):
    """Time to interrupt."""

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: object) -> None:
        print(f"step {trainer.global_step}", flush=True)
        time.sleep(0.2)


class CountSteps(Callback):
    """Keeps the steps taken."""

    steps: list[int] = []  # noqa: RUF012

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: object) -> None:
        self.steps.append(trainer.global_step)


@pytest.fixture
def steps() -> list[int]:
    CountSteps.steps = []
    return CountSteps.steps


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    model = {
        "model": {"class_path": "fits.tiny_vit"},
        "task": "rotation",
        "target_modules": TARGETS,
        "alpha": 8,
    }
    return write_finetune(tmp_path / "fit.yaml", model, f"{__name__}.CountSteps")


def fit(recipe: Path, *args: object) -> FitCLI:
    """Run the verb, and keep what it trained."""
    cli = FitCLI([f"--config={recipe}", *map(str, args)])
    cli.fit()
    return cli


def check_family(cli: FitCLI, adapters: str = "modules") -> None:
    """FusionKit reads what was trained, and gives its outputs."""
    path = cli.out / "finetuned"
    reuse = ReuseModule(tiny_vit())
    reuse.reuse(Family(tiny_vit(), {"rotation": path}, HEAD, adapters=adapters))  # type: ignore[arg-type]
    reuse.switch("rotation")
    found, wanted = outputs(reuse, "rotation"), outputs(cli.model.model, "rotation")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


class TestMethods:
    @pytest.mark.parametrize("method", ["lora", "linearized_lora", "ia3", "full"])
    def test_every_method(self, recipe: Path, tmp_path: Path, method: str) -> None:
        feed = ["--model.feedforward_modules=[fc1]"] if method == "ia3" else []
        shown = run("fit", "--config", recipe, "--model.method", method, *feed)
        assert f"written: {tmp_path}/out/finetuned" in shown
        out = tmp_path / "out/finetuned"
        assert (out / "model.safetensors").exists() == (method == "full")
        Family(tiny_vit(), {"rotation": out}, HEAD)
        assert (tmp_path / "out/checkpoints/last.ckpt").is_file()
        resolved = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
        assert resolved["model"]["init_args"]["method"] == method
        assert not list((tmp_path / "out").glob(".*"))

    def test_the_same_again(self, recipe: Path, tmp_path: Path) -> None:
        for place in ("a", "b"):
            torch.manual_seed(len(place) + ord(place))
            run("fit", "--config", recipe, "--out", tmp_path / place)
        first, again = (tmp_path / place / "finetuned" for place in "ab")
        for path in first.iterdir():
            assert (again / path.name).read_bytes() == path.read_bytes(), path.name

    def test_another_lightning_module(self, recipe: Path, tmp_path: Path) -> None:
        content = yaml.safe_load(recipe.read_text())
        content["model"] = {"class_path": "lightning.pytorch.demos.boring_classes.BoringModel"}
        content["data"] = {"class_path": "lightning.pytorch.demos.boring_classes.BoringDataModule"}
        recipe.write_text(yaml.safe_dump(content))
        run("fit", "--config", recipe, "--trainer.max_steps=2")
        assert not (tmp_path / "out/finetuned").exists()
        assert (tmp_path / "out/checkpoints/last.ckpt").is_file()


class TestResuming:
    @pytest.mark.parametrize("method", ["lora", "linearized_lora"])
    def test_goes_on_from_the_last_checkpoint(
        self, recipe: Path, tmp_path: Path, method: str, steps: list[int]
    ) -> None:
        own = ["--model.method", method]
        fit(recipe, *own, "--trainer.max_steps=5")
        first = load_file(tmp_path / "out/finetuned/adapter_model.safetensors")
        assert steps == [1, 2, 3, 4, 5]
        steps.clear()
        cli = fit(recipe, *own, "--trainer.max_steps=10", "--ckpt_path=last", "--overwrite=true")
        assert steps == [6, 7, 8, 9, 10]
        assert cli.trainer.global_step == 10
        resumed = load_file(tmp_path / "out/finetuned/adapter_model.safetensors")
        moved = {name for name in first if not torch.equal(first[name], resumed[name])}
        frozen = {n for n in first if ".lora_A." in n} if method == "linearized_lora" else set()
        assert moved == first.keys() - frozen
        check_family(cli)

    def test_interrupted_and_resumed_is_never_interrupted(
        self, recipe: Path, tmp_path: Path
    ) -> None:
        """At an epoch's end, to the bit: optimizer, rate and weights come back."""
        content = yaml.safe_load(recipe.read_text())
        # Without dropout and shuffling, nothing is drawn while training.
        content["model"]["init_args"]["dropout"] = 0.0
        content["data"] = {"class_path": f"{__name__}.Unshuffled"}
        recipe.write_text(yaml.safe_dump(content))
        stop = f"--trainer.callbacks+={__name__}.StopAfter"
        fit(recipe, "--trainer.max_steps=12", "--out", tmp_path / "whole")
        with pytest.raises(RuntimeError, match="power cut"):
            fit(recipe, "--trainer.max_steps=12", stop, "--trainer.callbacks.step=6")
        assert not (tmp_path / "out/finetuned").exists()
        fit(recipe, "--trainer.max_steps=12", "--ckpt_path=last")
        whole, resumed = (
            load_file(tmp_path / place / "finetuned/adapter_model.safetensors")
            for place in ("whole", "out")
        )
        for name, tensor in whole.items():
            torch.testing.assert_close(resumed[name], tensor, rtol=1e-5, atol=1e-6)

    @pytest.mark.slow
    def test_ctrl_c_then_resumed(self, recipe: Path, tmp_path: Path) -> None:
        command = [
            *(str(PROGRAM), "fit", "--config", str(recipe), "--trainer.max_steps=8"),
            *("--checkpoint.every_n_train_steps=1", "--model.method=linearized_lora"),
        ]
        slow = [f"--trainer.callbacks+={__name__}.SlowSteps"]
        process = subprocess.Popen(
            [*command, *slow],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=hear_interrupts,  # noqa: PLW1509 (no threads are at work)
            env={**os.environ, "PYTHONPATH": str(TESTS)},
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 3"):
                break
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 130, errors
        assert "Traceback" not in errors
        assert "interrupted" in errors
        assert not (tmp_path / "out/finetuned").exists()
        assert not list((tmp_path / "out").glob(".*"))
        CountSteps.steps = []
        cli = fit(recipe, *command[4:], "--ckpt_path=last")
        assert CountSteps.steps[0] in (3, 4, 5)
        assert CountSteps.steps[-1] == cli.trainer.global_step == 8
        folder = AdapterFolder(tmp_path / "out/finetuned")
        start = start_of(folder, folder.layout(Checkpoint.of(tiny_vit())))[1]
        assert all(torch.equal(folder.tensors[n], start[n]) for n in start if ".lora_A." in n)
        check_family(cli)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ("--model.task=digit", "task rotation"),
            ("--model.method=linearized_lora", "method lora"),
            ("--model.seed=3", "start"),
        ],
    )
    def test_a_checkpoint_of_another_fine_tuning(
        self, recipe: Path, tmp_path: Path, change: str, message: str
    ) -> None:
        """Its weights would fit, but mean something else."""
        run("fit", "--config", recipe)
        last = tmp_path / "out/checkpoints/last.ckpt"
        args = ["--out", tmp_path / "other", "--ckpt_path", last, change]
        output = run("fit", "--config", recipe, *args, code=1)
        assert "of another fine-tuning" in output
        assert message in output


class Unshuffled(FewDigits):
    """Rows as they come."""

    def _loader(self, task: str, test: bool, shuffle: bool = False) -> DataLoader[Any]:
        return super()._loader(task, test)


class StopAfter(Callback):
    """A power cut in the middle of an epoch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: object) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("power cut")


class TestLightningsFlags:
    def test_mixed_precision(self, recipe: Path, tmp_path: Path) -> None:
        for method in ("lora", "linearized_lora"):
            own = ["--model.method", method, "--trainer.precision=bf16-mixed"]
            cli = fit(recipe, *own, "--out", tmp_path / method)
            saved = load_file(tmp_path / method / "finetuned/adapter_model.safetensors")
            assert all(tensor.dtype == torch.float32 for tensor in saved.values())
            assert (cli.out / "finetuned/fusionkit.json").read_text().count("seed") == 1
            check_family(cli)

    def test_early_stopping(self, recipe: Path, steps: list[int]) -> None:
        cli = fit(
            recipe,
            *("--trainer.max_steps=-1", "--trainer.max_epochs=6", "--model.learning_rate=0"),
            *("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"),
            *("--trainer.callbacks.patience=2", "--trainer.callbacks.min_delta=0.01"),
        )
        assert cli.trainer.current_epoch == 3  # the first, and two that did not better it
        assert len(steps) == 3 * 4

    def test_logger(self, recipe: Path, tmp_path: Path) -> None:
        fit(
            recipe,
            *("--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}/log"),
            *("--trainer.log_every_n_steps=1",),
        )
        rows = list(csv.DictReader(next((tmp_path / "log").rglob("metrics.csv")).open()))
        assert sum(bool(row["train/loss"]) for row in rows) == 4
        assert sum(bool(row["val/loss"]) and bool(row["val/score"]) for row in rows) == 1

    def test_a_loggers_folder_is_the_results(self, recipe: Path, tmp_path: Path) -> None:
        fit(recipe, "--trainer.logger=true")
        assert (tmp_path / "out/lightning_logs").is_dir()

    def test_checkpointing(self, recipe: Path, tmp_path: Path) -> None:
        fit(
            recipe,
            *("--checkpoint.monitor=val/loss", "--checkpoint.filename=best"),
            *("--trainer.max_steps=8", f"--checkpoint.dirpath={tmp_path}/elsewhere"),
        )
        assert {p.name for p in (tmp_path / "elsewhere").iterdir()} == {"best.ckpt", "last.ckpt"}
        fit(  # with all that callbacks keep in a checkpoint
            recipe,
            *("--checkpoint.monitor=val/loss", "--checkpoint.filename=best"),
            *("--trainer.max_steps=12", f"--checkpoint.dirpath={tmp_path}/elsewhere"),
            *("--overwrite=true", f"--ckpt_path={tmp_path}/elsewhere/best.ckpt"),
        )
        assert {p.name for p in (tmp_path / "elsewhere").iterdir()} == {"best.ckpt", "last.ckpt"}

    def test_without_checkpoints(self, recipe: Path, tmp_path: Path) -> None:
        run("fit", "--config", recipe, "--trainer.enable_checkpointing=false")
        assert (tmp_path / "out/finetuned").is_dir()
        assert not (tmp_path / "out/checkpoints").exists()

    @pytest.mark.parametrize("method", ["lora", "linearized_lora", "full"])
    def test_two_processes(self, recipe: Path, tmp_path: Path, method: str) -> None:
        """Each takes half of the rows; one saves, once: the parent, which gets back what the
        forked ones trained."""
        two = ["--trainer.devices=2", "--trainer.strategy=ddp_fork", "--model.method", method]
        epochs = ["--trainer.max_steps=-1", "--trainer.max_epochs=2"]
        shown = run("fit", "--config", recipe, *two, *epochs)
        assert shown.count("written: ") == 1
        state = torch.load(tmp_path / "out/checkpoints/last.ckpt", weights_only=True)
        assert state["global_step"] == 4  # 64 rows, 16 to a batch, in two halves, twice
        saved = load_file(next((tmp_path / "out/finetuned").glob("*model.safetensors")))
        by_name = {
            name.removeprefix("model.").replace(".default", "").replace(".modules_to_save", ""): t
            for name, t in state["state_dict"].items()
            if ".initial_" not in name
        }
        frozen = {n for n in saved if ".lora_A." in n} if method == "linearized_lora" else set()
        assert saved.keys() - by_name.keys() == frozen
        assert all(torch.equal(saved[name], tensor) for name, tensor in by_name.items())
        Family(tiny_vit(), {"rotation": tmp_path / "out/finetuned"}, HEAD)


class TestRefusals:
    """Each before a step is taken, with nothing under the final name."""

    @pytest.fixture(autouse=True)
    def _nothing_is_trained(self, tmp_path: Path, steps: list[int]) -> Iterator[None]:
        yield
        assert not steps
        assert not (tmp_path / "out/finetuned").exists()

    @pytest.mark.parametrize(
        ("arguments", "message", "code"),
        [
            (["--model.task=dog"], "task 'dog'; there is digit, rotation, parity", 1),
            (["--model.task=null"], "which task?", 1),
            (["--model.method=loar"], "loar", 2),
            (["--model.target_modules=[qkv,query]"], "no module 'query'", 1),
            (["--model.target_modules=null"], "target_modules", 1),
            (["--model.method=ia3"], "feedforward_modules", 1),
            (["--model.private=[hed.*]"], "'hed.*'", 1),
            (["--model.base=no/such.safetensors"], "no/such.safetensors", 1),
            (["--ckpt_path=no/such.ckpt"], "no/such.ckpt: no such checkpoint", 1),
            (["--model.rnak=4"], "rnak", 2),
            (["--trainer.max_steps=-1"], "max_epochs or max_steps", 1),
            (["--model.rank=0"], "`r` should be a positive", 1),
        ],
    )
    def test_bad_settings(
        self, recipe: Path, arguments: list[str], message: str, code: int
    ) -> None:
        output = run("fit", "--config", recipe, *arguments, code=code)
        assert message in output
        assert len(output.splitlines()) < 25

    def test_a_checkpoint_that_is_none(self, recipe: Path, tmp_path: Path) -> None:
        (tmp_path / "x.ckpt").write_text("not a checkpoint")
        output = run("fit", "--config", recipe, f"--ckpt_path={tmp_path}/x.ckpt", code=1)
        assert "x.ckpt" in output

    def test_no_data(self, recipe: Path) -> None:
        content = yaml.safe_load(recipe.read_text())
        del content["data"]
        recipe.write_text(yaml.safe_dump(content))
        assert "needs a `data` section" in run("fit", "--config", recipe, code=1)

    def test_a_recipe_that_trains_no_module(self, recipe: Path) -> None:
        """`fit` guesses nothing; what such a recipe is for is named."""
        content = yaml.safe_load(recipe.read_text())
        content["model"] = {
            "model": {"class_path": "fits.tiny_vit"},
            "codec": {"class_path": "EMR"},
        }
        recipe.write_text(yaml.safe_dump(content))
        output = run("fit", "--config", recipe, code=2)
        assert "`model` has no class_path" in output
        assert "'fusionkit calibrate'" in output
        assert len(output.splitlines()) < 10

    def test_lost_data_are_not_called_a_lost_checkpoint(self, recipe: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"rows\.npz"):
            run("fit", "--config", recipe, f"--data={__name__}.Lost")


class Lost(FewDigits):
    """A datamodule whose files went."""

    def train_dataloader(self) -> list[DataLoader[Any]]:
        raise FileNotFoundError("rows.npz")


class TestOut:
    def test_a_fine_tune_that_is_there(self, recipe: Path, tmp_path: Path) -> None:
        run("fit", "--config", recipe)
        before = (tmp_path / "out/finetuned/adapter_model.safetensors").read_bytes()
        output = run("fit", "--config", recipe, "--model.seed=2", code=1)
        assert "exists; replace it with --overwrite" in output
        adapter = tmp_path / "out/finetuned/adapter_model.safetensors"
        assert adapter.read_bytes() == before
        run("fit", "--config", recipe, "--model.seed=2", "--overwrite=true")
        assert adapter.read_bytes() != before
        run("fit", "--config", recipe, "--model.method=full", "--overwrite=true")
        assert [p.name for p in adapter.parent.iterdir()] == ["model.safetensors"]

    def test_a_folder_that_is_no_fine_tune(
        self, recipe: Path, tmp_path: Path, steps: list[int]
    ) -> None:
        (tmp_path / "out/finetuned").mkdir(parents=True)
        (tmp_path / "out/finetuned/thesis.txt").write_text("")
        output = run("fit", "--config", recipe, "--overwrite=true", code=1)
        assert "is no fine-tune" in output
        assert not steps
        assert (tmp_path / "out/finetuned/thesis.txt").exists()


def test_help_names_what_there_is_to_set() -> None:
    text = run("fit", "--help")
    for option in ("--ckpt_path", "--overwrite", "--model.rank"):
        assert option in text
    for option in ("--checkpoint.save_top_k", "--trainer.precision"):
        assert option in run("fit", "--help-all")
