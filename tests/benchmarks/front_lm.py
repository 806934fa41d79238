"""The front on real, small language models: what codecs keep of them against what they take.

`../shared/zoo/lm`: a Llama of 260,032 parameters and five full fine-tunes, scored as the zoo's own
`score.py` does: bits per byte of text, and the share of rows whose right choice is the likeliest.
Each bundle is written to disk, and each task's model read from it into transformers' own class.

    python tests/benchmarks/front_lm.py [--out out/front/lm] [--codecs.NAME CODEC]

Writes `compare.csv` as `fusionkit compare` does. A task's share is the part of its gain over the
base that is kept: (base - score) / (base - fine-tuned). First the fine-tuned models themselves are
scored; rows are batched, and the scores are those of one row at a time to the last digit shown.
"""

import gzip
import json
import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import fusionkit
from fusionkit import registry
from fusionkit.cli import report
from fusionkit.cli.recipe import quieten
from fusionkit.codecs.base import DeltaCodec

SHARED = Path(__file__).parents[3] / "shared"
ZOO = SHARED / "zoo/lm"
CODECS = Path(__file__).parent / "front_codecs.yaml"
TASKS = ("shakespeare", "python", "sst2", "trec", "sms_spam")
LENGTH, START, END = 256, 1, 2
BATCH = 32


class Text:
    """Bits per byte of a text, in pieces of 256 tokens; lower is better."""

    def __init__(self, text: str, tokenizer: Any) -> None:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        starts = range(0, len(ids) - LENGTH, LENGTH - 1)
        pieces = [[START, *ids[start : start + LENGTH - 1]] for start in starts]
        self._batches = torch.tensor(pieces).split(BATCH)
        self._bytes = len(text.encode())

    def score(self, model: Any) -> float:
        nats = 0.0
        for ids in self._batches:
            logits = model(input_ids=ids).logits[:, :-1].float()
            nats += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        return float(nats) / math.log(2) / self._bytes


class Choices:
    """The percentage of rows whose right choice is the likeliest after the prompt."""

    def __init__(self, rows: list[dict[str, Any]], tokenizer: Any) -> None:
        self._answers = [row["answer"] for row in rows]
        sequences = []
        for place, row in enumerate(rows):
            prompt = tokenizer(row["prompt"]).input_ids
            for choice, text in enumerate(row["choices"]):
                answer = [*tokenizer(text.strip()).input_ids[1:], END]
                ids = [*prompt[-(LENGTH - len(answer)) :], *answer]
                sequences.append((ids, len(answer), place, choice))
        sequences.sort(key=lambda sequence: len(sequence[0]))
        self._batches = [sequences[at : at + BATCH] for at in range(0, len(sequences), BATCH)]
        self._choices = max(len(row["choices"]) for row in rows)

    def score(self, model: Any) -> float:
        values = torch.full((len(self._answers), self._choices), -math.inf)
        for batch in self._batches:
            ids = nn.utils.rnn.pad_sequence([torch.tensor(row[0]) for row in batch], True, END)
            hidden = model.model(input_ids=ids).last_hidden_state
            for own, (tokens, answer, place, choice) in zip(hidden, batch, strict=True):
                logits = model.lm_head(own[len(tokens) - 1 - answer : len(tokens) - 1])
                wanted = torch.tensor(tokens[-answer:])
                values[place, choice] = -F.cross_entropy(logits, wanted, reduction="sum")
        right = values.argmax(1) == torch.tensor(self._answers)
        return 100 * right.sum().item() / len(self._answers)


def tests(tokenizer: Any) -> dict[str, Text | Choices]:
    """Each task's test rows."""
    found: dict[str, Text | Choices] = {}
    for task in TASKS:
        folder = SHARED / "data/lm" / task
        if (file := folder / "test.txt.gz").exists():
            found[task] = Text(gzip.decompress(file.read_bytes()).decode(), tokenizer)
        else:
            lines = gzip.decompress((folder / "test.jsonl.gz").read_bytes()).splitlines()
            found[task] = Choices([json.loads(line) for line in lines], tokenizer)
    return found


class Bench:
    """The five tasks' models, scored from any weights."""

    def __init__(self) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(ZOO / "base", dtype=torch.float32).eval()
        self._tests = tests(AutoTokenizer.from_pretrained(ZOO / "base"))
        base = load_file(ZOO / "base/model.safetensors")
        self._base = {task: self.score(task, base) for task in TASKS}
        self._finetuned = {
            task: self.score(task, load_file(ZOO / task / "model.safetensors")) for task in TASKS
        }

    def score(self, task: str, weights: Mapping[str, Tensor]) -> float:
        """One task's score with these weights; its head is tied to the embeddings."""
        found = self._model.load_state_dict(weights, strict=False)
        assert not found.unexpected_keys
        assert set(found.missing_keys) <= {"lm_head.weight"}
        with torch.inference_mode():
            return self._tests[task].score(self._model)

    def rows(self, codecs: Mapping[str, DeltaCodec]) -> Iterator[dict[str, Any]]:
        """The base's row, the fine-tuned models', and one for each codec."""
        full = sum((ZOO / task / "model.safetensors").stat().st_size for task in TASKS)
        yield self._row("base", "", 0, 0.0, self._base)
        yield self._row("fine-tuned", "", full, 16.0, self._finetuned)
        for name, codec in codecs.items():
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                finetuned = {task: ZOO / task for task in TASKS}
                bundle = fusionkit.compress(ZOO / "base", finetuned, codec, f"{folder}/bundle")
                seconds = time.perf_counter() - started
                scores = {task: self.score(task, bundle.state_dict(task)) for task in TASKS}
                nbytes, bits = bundle.nbytes, bundle.bits_per_parameter
            yield self._row(name, repr(codec), nbytes, bits, scores, seconds)

    def _row(
        self,
        name: str,
        settings: str,
        nbytes: int,
        bits: float,
        scores: Mapping[str, float],
        seconds: float | None = None,
    ) -> dict[str, Any]:
        shares = {
            task: (self._base[task] - score) / (self._base[task] - self._finetuned[task])
            for task, score in scores.items()
        }
        return {
            "name": name,
            "settings": settings,
            "nbytes": nbytes,
            "bits_per_parameter": bits,
            "encode_seconds": seconds,
            "share": statistics.fmean(shares.values()),
            **{f"score/{task}": score for task, score in scores.items()},
            **{f"share/{task}": share for task, share in shares.items()},
        }


def main() -> None:
    quieten()
    registry.load_all()
    warnings.filterwarnings("ignore")
    parser = ArgumentParser(default_config_files=[str(CODECS)])
    parser.add_argument("--codecs", type=dict[str, DeltaCodec], required=True)
    parser.add_argument("--out", type=str, default="out/front/lm")
    arguments = parser.parse_args()
    rows = []
    for row in Bench().rows(parser.instantiate(arguments).codecs):
        rows.append(row)
        report.write_rows(rows, Path(arguments.out), "compare")
        scores = " ".join(f"{row[f'score/{task}']:8.4f}" for task in TASKS)
        print(
            f"{row['name']:22} {row['bits_per_parameter']:7.3f} bits  {scores}  "
            f"{100 * row['share']:7.2f}%",
            flush=True,
        )


if __name__ == "__main__":
    main()
