"""Evaluation over several processes: the same scores as in one, to the last count."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from processes import together
from spread_data import Data
from tiny_net import TinyNet, perturbed
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from fusionkit import EMR
from fusionkit.errors import DataError
from fusionkit.reuse.module import ReuseModule
from fusionkit.tasks.spread import TasksSpread, real_rows, share_out

CASES = {
    "uneven": {"ant": 13, "bee": 29, "cat": 8},
    "fewer rows than processes": {"ant": 2, "bee": 1, "cat": 30},
    "more tasks than processes": {"ant": 9, "bee": 10, "cat": 11, "dog": 12, "eel": 25},
    "fewer tasks than processes": {"ant": 17},
}


LISTS = "fewer tasks than processes"


def evaluate(
    case: str, spread: str, processes: int, metric: str = "Accuracy"
) -> tuple[dict[str, float], dict[str, int], dict[str, Any]]:
    """Scores, the rows that were counted, and their own scores in order, over all processes."""
    torch.manual_seed(0)
    base = TinyNet().eval()
    data: Any = Data(CASES[case])
    finetuned: Any = {
        task: perturbed(base, seed=place, classes=place + 2)
        for place, task in enumerate(data.tasks)
    }
    module = ReuseModule(base, codec=EMR(), finetuned=finetuned, private=["head.*"], metric=metric)
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    counted: dict[str, int] = {}
    finish = module._finish

    def look(stage: str) -> None:
        assert module.evaluation is not None
        for task, scorer in zip(data.tasks, module.evaluation.scorers, strict=True):
            metric = scorer.metrics[0]  # type: ignore[union-attr, index]
            metric.sync() if processes > 1 else None  # type: ignore[operator]
            values = [metric.tp, metric.fn]  # type: ignore[union-attr]
            counted[task] = int(sum(value.sum() for value in values))  # type: ignore[union-attr, misc]
            metric.unsync() if processes > 1 else None  # type: ignore[operator]
        finish(stage)

    if metric == "Accuracy":  # others don't count
        module._finish = look  # type: ignore[method-assign]
    trainer.test(module, TasksSpread(data) if spread == "tasks" else data, verbose=False)
    assert module.scores is not None
    rows = {task: module.scores.of(task).row_scores for task in data.tasks}
    own = {task: None if each is None else each.tolist() for task, each in rows.items()}
    return module.scores.values, counted, own


def evaluate_all(rank: int, count: int, out: Path) -> None:
    """What each of several processes does."""
    found = {
        f"{case}, {spread}": evaluate(case, spread, count)
        for case in CASES
        for spread in ("rows", "tasks")
    }
    found["lists"] = evaluate(LISTS, "tasks", count, "AUROC")
    if not rank:
        out.write_text(json.dumps(found))


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def spread_out(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All cases evaluated by several processes, started once."""
    out = tmp_path_factory.mktemp("spread") / "scores.json"
    together(request.param, evaluate_all, out)
    return json.loads(out.read_text())


@pytest.mark.parametrize("spread", ["rows", "tasks"])
@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_one_process(spread_out: Any, case: str, spread: str) -> None:
    """Rows that do not divide by the processes, fewer rows or tasks than there are, and more."""
    scores, counted, own = spread_out[f"{case}, {spread}"]
    assert counted == CASES[case]  # every row, and none twice
    alone = evaluate(case, "rows", 1)
    assert scores == alone[0]
    assert own == alone[2]  # in the rows' order, whoever scored them


def test_metrics_that_keep_lists(spread_out: Any) -> None:
    """Where a process has no row of a task, and so no list to give to the others."""
    assert spread_out["lists"][0] == evaluate(LISTS, "rows", 1, "AUROC")[0]


@given(
    total=st.integers(0, 40), processes=st.integers(1, 7), size=st.integers(1, 6), data=st.data()
)
def test_every_row_counts_once(total: int, processes: int, size: int, data: st.DataObject) -> None:
    """Over all processes, the rows taken for real are each of the dataset's, once."""
    rows = TensorDataset(torch.arange(total))
    real: list[int] = []
    for rank in range(processes if total else 0):
        sampler: DistributedSampler[Any] = DistributedSampler(rows, processes, rank, shuffle=False)
        loader = DataLoader(rows, batch_size=size, sampler=sampler)
        first = 0
        for (batch,) in loader:
            real += batch[: real_rows(loader, first, len(batch))].tolist()
            first += len(batch)
    assert sorted(real) == list(range(total))


def test_rows_of_other_samplers_are_taken_as_they_come() -> None:
    loader = DataLoader(TensorDataset(torch.arange(9)), batch_size=4)
    assert real_rows(loader, 0, 4) == 4
    assert real_rows([1, 2], 0, 3) == 3


@given(sizes=st.lists(st.integers(0, 1000), max_size=30), processes=st.integers(1, 8))
def test_shares_are_fair(sizes: list[int], processes: int) -> None:
    shares = share_out(sizes, processes)
    assert sorted(place for share in shares for place in share) == list(range(len(sizes)))
    sums = [sum(sizes[place] for place in share) for share in shares]
    assert max(sums) - min(sums) <= max(sizes, default=0)
    assert all(share == sorted(share) for share in shares)


def test_streams_can_not_be_spread_by_task() -> None:
    class Stream(torch.utils.data.IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(3))

    data = Data({"ant": 3})
    data.test_dataloader = lambda: [DataLoader(Stream())]  # type: ignore[method-assign, list-item]
    module = ReuseModule(TinyNet(), finetuned={"ant": TinyNet().state_dict()})
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(DataError, match="task 'ant' has no dataset of known length"):
        trainer.test(module, TasksSpread(data))


def test_spread_by_task_in_one_process_is_all_of_it() -> None:
    for case in ("uneven", "more tasks than processes"):
        assert evaluate(case, "tasks", 1) == evaluate(case, "rows", 1)
