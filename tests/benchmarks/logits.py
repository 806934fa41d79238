"""Peak memory and time of one calibration step of a language model with a long vocabulary.

Student and teacher are a Llama of small hidden size; the loss is KL(teacher ‖ student) over all
tokens, with gradients of every weight. Before: all logits at once. After: those of some tokens at
a time. Each runs in a process of its own; what is printed is how far its peak of resident memory
is above what it was when the models were there.

    python tests/benchmarks/logits.py [words] [rows] [tokens of a row] [hidden size]
"""

import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch

WAYS = {"all at once": "whole", "some tokens at a time": "split"}


def step(words: int, rows: int, tokens: int, hidden: int, way: str) -> dict[str, float]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from fusionkit.tasks.language_modeling import LanguageModeling
    from fusionkit.tasks.split_model import SplitModel

    if way == "whole":
        SplitModel.of = lambda _: None  # type: ignore[assignment, method-assign]
    sizes = {"vocab_size": words, "hidden_size": hidden, "intermediate_size": 4 * hidden}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = LlamaConfig(**sizes, **layers)
    models: list[Any] = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(LlamaForCausalLM(config).eval())
    for parameter in models[0].parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids = torch.randint(0, words, (rows, tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    kind, before, started = LanguageModeling(), peak(), time.process_time()
    with torch.no_grad():
        kept = kind.kept(models[1], batch)
    loss = kind.distance(models[0], batch, kept, models[1])
    loss.backward()  # type: ignore[no-untyped-call]
    return {
        "MB": peak() - before,
        "kept MB": kept.numel() * kept.element_size() / 1e6,
        "seconds": time.process_time() - started,
        "loss": float(loss.detach()),
        "gradient": float(sum(p.grad.double().square().sum() for p in models[0].parameters())),
    }


def peak() -> float:
    """MB."""
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main(words: int = 128_000, rows: int = 4, tokens: int = 128, hidden: int = 64) -> None:
    of_logits = 4 * words * rows * tokens / 1e6
    print(f"{rows} × {tokens} tokens, {words} words: logits of {of_logits:.0f} MB in float32")
    for name, way in WAYS.items():
        command = [sys.executable, __file__, *map(str, (words, rows, tokens, hidden)), way]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{name:<22} peak {found['MB']:6.0f} MB, of the teacher {found['kept MB']:6.1f} MB are"
        )
        print(
            f"{'':22} kept; {found['seconds']:.1f} s of CPU; loss {found['loss']:.6f}, "
            f"squared gradient {found['gradient']:.6g}"
        )


if __name__ == "__main__":
    numbers = sys.argv[1:]
    if numbers and numbers[-1] in WAYS.values():
        print(json.dumps(step(*map(int, numbers[:-1]), numbers[-1])))
    else:
        main(*map(int, numbers))
