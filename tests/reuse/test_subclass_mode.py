"""ReuseModule in a LightningCLI of one's own, where the recipe names the module's class."""

from pathlib import Path

import pytest
from lightning.pytorch.cli import LightningCLI
from tiny_net import Files
from tiny_tasks import PRIVATE, Data

import fusionkit
from fusionkit import SVD, ReuseModule


class Own(ReuseModule):
    """A class derived from it, which subclass mode is for."""


@pytest.mark.parametrize("named", ["fusionkit.ReuseModule", f"{__name__}.Own"])
def test_it_is_evaluated(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = tmp_path / "b.bundle"
    fusionkit.compress(files.base, files.finetuned, SVD(2), bundle, private=PRIVATE)
    cli = LightningCLI(
        ReuseModule,
        Data,
        subclass_mode_model=True,
        args=[
            "test",
            f"--model={named}",
            "--model.model=tiny_net.TinyNet",
            f"--model.base={files.base}",
            f"--model.bundle={bundle}",
            "--trainer.accelerator=cpu",
            "--trainer.devices=1",
            "--trainer.logger=false",
            "--trainer.enable_progress_bar=false",
        ],
    )
    assert type(cli.model).__name__ == named.rpartition(".")[2]
    assert cli.model.scores
    assert 0 <= cli.model.scores.mean <= 1
