"""Bundles with a router, over texts that differ."""

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from program import run
from talking import tokenizer

LETTERS = {"moods": "abcd", "topics": "wxyz", "cats": "abcd", "dogs": "wxyz"}
"""Each task's texts are of letters of its own."""


def texts_of(task: str) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 4, (16, 6), generator=generator).tolist()
    return [" ".join(LETTERS[task][place] for place in row) for row in drawn]


def routed(source: Path, folder: Path, tasks: Sequence[str], columns: str, base: Path) -> Path:
    """A copy of a bundle, with a router over texts of each task."""
    shutil.copytree(source, folder / "routed.bundle")
    for task in tasks:
        (folder / "data" / task).mkdir(parents=True)
        for split in ("train", "test"):
            with (folder / "data" / task / f"{split}.csv").open("w", newline="") as file:
                rows = [(text, str(n % 2)) for n, text in enumerate(texts_of(task))]
                csv.writer(file).writerows([columns.split(","), *rows])
    said = run("route", folder / "routed.bundle", "--data", folder / "data", "--base", base)
    assert "100.0%" in said
    return folder / "routed.bundle"


def routed_sorting(source: Path, folder: Path) -> Path:
    """The same of classifiers; their base's tokenizer can fill up rows."""
    shutil.copytree(source.parent / "base", folder / "base")
    padding = tokenizer()
    padding.pad_token = "<eos>"
    padding.save_pretrained(folder / "base")
    return routed(source, folder, ("moods", "topics"), "text,label", folder / "base")
