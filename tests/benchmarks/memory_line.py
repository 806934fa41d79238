"""Peak memory of the command line against the same call in Python, on a large base.

A synthetic Llama in bf16 of the size asked for and its fine-tunes, in shards. Each way runs in a
process of its own; what is printed is the peak of its resident memory, imports included, and how
much of it is beyond an `import torch`. The line may take 1.1 times what the call does; `export`
a shard beyond the call.

    python tests/benchmarks/memory_line.py [MB of the base] [tasks] [folder]
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

HIDDEN, INNER, WORDS = 1024, 2816, 32000
SHARD = "200MB"
PROGRAM = str(Path(sys.executable).with_name("fusionkit"))
CODEC = ["--codec", "dense"]


def make(folder: Path, megabytes: int, tasks: int) -> None:
    """A base and its fine-tuned models, as folders that transformers loads."""
    per_layer = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER + 2 * HIDDEN)
    layers = max((megabytes * 10**6 - 4 * WORDS * HIDDEN) // per_layer, 1)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": 16,
        "num_hidden_layers": layers,
        "num_key_value_heads": 16,
        "vocab_size": WORDS,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (WORDS, HIDDEN),
        "lm_head.weight": (WORDS, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (HIDDEN, HIDDEN) for n in "qkvo"}
        shapes |= {f"{at}.mlp.{n}_proj.weight": (INNER, HIDDEN) for n in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        shapes |= {f"{at}.{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
    names = list(shapes)
    for place in range(tasks + 1):
        path = folder / ("base" if not place else f"task{place}")
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        places = {}
        count = -(-len(names) // 40)
        for number in range(count):
            own = names[40 * number : 40 * (number + 1)]
            file = f"model-{number + 1:05}-of-{count:05}.safetensors"
            state = {n: _values(shapes[n], hash_of(n), place) for n in own}
            save_file(state, path / file, metadata={"format": "pt"})
            places.update(dict.fromkeys(own, file))
        index = {"metadata": {}, "weight_map": places}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))


def hash_of(name: str) -> int:
    return sum(ord(c) * (i + 1) for i, c in enumerate(name))


def _values(shape: tuple[int, ...], seed: int, task: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    base = 0.02 * torch.randn(shape, generator=generator)
    if task and len(shape) == 2 and shape[0] != WORDS:
        left, right = (torch.randn(s, 4, generator=generator) for s in shape)
        base += 1e-3 * task * left @ right.T
    return base.to(torch.bfloat16)


def peak(command: list[str], folder: Path) -> tuple[float, float]:
    """Peak resident MB of a process, and its seconds."""
    code = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:], capture_output=True, text=True)\n"
        "assert done.returncode == 0, done.stderr[-2000:]\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *command],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return int(done.stdout) / unit, time.perf_counter() - started


def python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import fusionkit\n{code}"]


def ways(tasks: int) -> dict[str, list[str]]:
    names = [f"task{i + 1}" for i in range(tasks)]
    call = f"{dict(zip(names, names, strict=True))}, fusionkit.Dense(), 'called'"
    load = "bundle = fusionkit.Bundle.load('called')\n"
    folder = f"fusionkit.export_task(bundle, 'task1', 'd', max_shard_size='{SHARD}')"
    export = [PROGRAM, "export", "called", "--task", "task1", "--out"]
    return {
        "import torch": [sys.executable, "-c", "import torch"],
        "compress: call": python(f"fusionkit.compress('base', {call}, overwrite=True)"),
        "compress: line": [PROGRAM, "compress", "base", *names, *CODEC, "--out", "line"],
        "compress: recipe": [PROGRAM, "compress", "--config", "recipe.yaml"],
        "export a file: call": python(
            f"{load}fusionkit.export_task(bundle, 'task1', 'a.safetensors')"
        ),
        "export a file: line": [*export, "b.safetensors"],
        "export a folder: call": python(f"{load}{folder}"),
        "export a folder: line": [*export, "c", "--max_shard_size", SHARD],
    }


def main(megabytes: int = 860, tasks: int = 2, at: str | None = None) -> None:
    with tempfile.TemporaryDirectory(dir=at) as name:
        folder = Path(name)
        make(folder, megabytes, tasks)
        finetuned = {f"task{i + 1}": f"task{i + 1}" for i in range(tasks)}
        codec = {"class_path": "Dense"}
        model: dict[str, Any] = {"base": "base", "finetuned": finetuned, "codec": codec}
        recipe = {"model": {**model, "bundle": "recipe"}, "trainer": {"accelerator": "cpu"}}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        size = sum(f.stat().st_size for f in (folder / "base").iterdir()) / 1e6
        print(f"base of {size:.0f} MB, {tasks} fine-tunes, shards of {SHARD}; peak resident memory")
        first: dict[str, float] = {}
        for way, command in ways(tasks).items():
            megabyte, seconds = peak(command, folder)
            call = first.setdefault(way.partition(":")[0], megabyte)
            times = megabyte / call
            print(
                f"{way:<44} {megabyte:7.0f} MB  {times:5.2f} × call  {seconds:5.0f} s", flush=True
            )


if __name__ == "__main__":
    main(*(int(a) if a.isdigit() else a for a in sys.argv[1:]))  # type: ignore[arg-type]
