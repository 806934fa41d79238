"""Batches of many tasks by every codec there is: each row as its task by itself."""

import copy
from pathlib import Path
from typing import Any

import peft_adapters
import pytest
import torch
from mixed_rows import bundled, check, tuned
from torch import Tensor, nn

import fusionkit
from fusionkit import (
    DBMS,
    EMR,
    SVD,
    TIES,
    Dense,
    MagnitudePrune,
    Mean,
    Merged,
    Sketch,
    TaskArithmetic,
    registry,
)
from fusionkit.reuse.mixed_batch import MixedBatch

ROWS = ["cat", None, "ant", "ant", "bee", None, "cat"]


def plugin(name: str, *settings: Any, **named: Any) -> Any:
    return registry.load("fusionkit.codecs", name)(*settings, **named)


CODECS = {
    "dense": Dense,
    "svd": lambda: SVD(rank=3),
    "svd int4": lambda: SVD(energy=0.8, dtype="int4"),
    "emr": EMR,
    "emr int4": lambda: EMR(rescale="l2", scope="tensor", dtype="int4"),
    "magnitude_prune": lambda: MagnitudePrune(0.1),
    "magnitude_prune merge": lambda: MagnitudePrune(0.1, merge=TIES(), dtype="int4"),
    "merged": lambda: Merged(Mean()),
    "sketch": lambda: Sketch(bits=4),
    "sketch directions": lambda: Sketch(bits=4, sketch=False),
    "dbms": lambda: DBMS(MagnitudePrune(0.1)),
    "dbms svd": lambda: DBMS(SVD(rank=2), SVD(rank=1)),
    "dbms merged": lambda: DBMS(EMR(), Merged(TaskArithmetic())),
    "bitdelta": lambda: plugin("bitdelta"),
    "bitdelta rows": lambda: plugin("bitdelta", scales="row"),
    "compeft": lambda: plugin("compeft"),
    "dare": lambda: plugin("dare"),
    "dare spread": lambda: plugin("dare", drop=0.5, spread=0.2, shrink=0.5),
    "jd": lambda: plugin("jd", rank=3),
    "jd diagonal": lambda: plugin("jd", rank=3, form="diagonal", clusters=2),
    "lossless": lambda: plugin("lossless"),
    "tall_mask": lambda: plugin("tall_mask"),
    "tsv": lambda: plugin("tsv"),
}
"""Every codec's id, the first word of a name → settings of it."""


class Net(nn.Module):
    """Matrices that are large enough for a codec's own form to be smaller than they are."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 24)
        self.norm = nn.LayerNorm(24)
        self.wide = nn.Linear(24, 48)
        self.conv = nn.Conv1d(48, 24, 3, padding=1)
        self.head = nn.Linear(24, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wide(self.norm(self.embed(tokens))).relu()
        return self.head(self.conv(x.mT).mean(-1))  # type: ignore[no-any-return]


def net_and_tasks() -> tuple[Net, dict[str, dict[str, Tensor]]]:
    torch.manual_seed(0)
    base = Net().eval()
    states = tuned(base)
    for classes, (task, state) in enumerate(states.items(), 2):
        state.update(Net(classes).head.state_dict(prefix="head."))
        assert task in ROWS
    return base, states


def test_every_codec_is_among_them() -> None:
    tested = {name.partition(" ")[0] for name in CODECS} | {"linearized_lora"}
    assert set(registry.names("fusionkit.codecs")) == tested


@pytest.mark.parametrize("name", CODECS)
def test_a_codecs_tasks_in_one_batch(name: str) -> None:
    base, states = net_and_tasks()
    bundle = bundled(base, states, CODECS[name](), private=["head.*"])
    tokens = torch.randint(0, 20, (7, 5))
    roomy = MixedBatch(copy.deepcopy(base), bundle)
    for _ in range(2):
        check(base, bundle, ROWS, tokens, batch=roomy)
    assert roomy.figures.misses == 3
    check(base, bundle, ROWS, tokens, batch=MixedBatch(copy.deepcopy(base), bundle, 1))


@pytest.mark.parametrize("name", ["svd", "emr", "magnitude_prune"])
def test_what_is_formed_goes_before_what_it_is_formed_of(name: str) -> None:
    """Masks, signs, positions and products stay in memory as they are."""
    base, states = net_and_tasks()
    bundle = bundled(base, states, CODECS[name](), private=["head.*"])
    tokens = torch.randint(0, 20, (7, 5))
    batch = MixedBatch(copy.deepcopy(base), bundle)
    for task in states:
        batch.ready(task)
    compact = batch.figures.bytes
    whole = sum(tensor.nbytes for tensor in base.state_dict().values())
    assert compact < 0.7 * 3 * whole
    check(base, bundle, ROWS, tokens, batch=batch)
    formed = batch.figures.bytes
    assert formed > compact  # kept, as there is room
    small = MixedBatch(copy.deepcopy(base), bundle, compact + 1)
    for _ in range(2):
        check(base, bundle, ROWS, tokens, batch=small)
    figures = small.figures
    assert (figures.bytes, figures.tasks, figures.misses) == (compact, 3, 3)


def test_a_vector_that_tasks_share_is_in_memory_once() -> None:
    base, states = net_and_tasks()
    bundle = bundled(base, states, EMR(), private=["head.*"])
    sizes = []
    batch = MixedBatch(copy.deepcopy(base), bundle)
    for task in states:
        batch.ready(task)
        sizes.append(batch.figures.bytes)
    assert sizes[1] - sizes[0] < 0.5 * sizes[0]
    for task in states:
        batch.forget(task)
    assert batch.figures.bytes == 0


@pytest.mark.parametrize("kind", ["all layers", "rslora"])
@pytest.mark.parametrize("adapters", ["merged", "modules"])
def test_adapters(kind: str, adapters: Any, tmp_path: Path) -> None:
    config = peft_adapters.CONFIGS[kind]
    tasks: dict[str, Any] = {}
    for seed, task in enumerate(("ant", "bee", "cat")):
        peft_adapters.saved(tmp_path / task, config, seed + 1)
        tasks[task] = tmp_path / task
    base = peft_adapters.net()
    bundle = fusionkit.compress(base, tasks, Dense("fp32"), adapters=adapters)
    check(base, bundle, ROWS, torch.randint(0, 12, (7, 5)))
