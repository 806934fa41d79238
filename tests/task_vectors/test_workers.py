"""A pass in threads: results in order, few tensors at once, sums that never depend on threads."""

import threading
import time
from pathlib import Path

import pytest
import torch
from checks import contents

from fusionkit import DBMS, EMR, SVD, TIES, MagnitudePrune, Merged
from fusionkit.bundles.compress import compress
from fusionkit.task_vectors import workers
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.vectors import TaskVectors
from fusionkit.task_vectors.workers import Workers
from fusionkit.testing import models

SIZES = {f"w{place}": 10 + place for place in range(20)}


@pytest.mark.parametrize("threads", [1, 4])
def test_results_come_in_the_order_of_the_names(threads: int) -> None:
    def slow(name: str) -> str:
        time.sleep(0.002 * (20 - int(name[1:])))  # the first take longest
        return name.upper()

    found = list(Workers(threads=threads).run(slow, SIZES))
    assert found == [(name, name.upper()) for name in SIZES]


def test_few_tensors_are_at_work_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are done and not used yet are counted; one alone may be larger than the bound."""
    monkeypatch.setattr(workers, "IN_FLIGHT", 50)
    sizes = {"a": 20, "b": 20, "c": 20, "huge": 400, "d": 50, "e": 1}
    held: dict[str, int] = {}
    most: list[int] = []
    lock = threading.Lock()

    def start(name: str) -> str:
        with lock:
            held[name] = sizes[name]
            most.append(sum(held.values()) if len(held) > 1 else 0)
        return name

    for name, _ in Workers(threads=4).run(start, sizes):
        time.sleep(0.01)
        with lock:
            held.pop(name)
    assert max(most) <= 50
    assert len(most) == len(sizes)


def test_an_error_ends_the_pass() -> None:
    called: list[str] = []

    def function(name: str) -> str:
        called.append(name)
        if name == "w3":
            raise ZeroDivisionError(name)
        time.sleep(0.01)
        return name

    results = Workers(threads=2).run(function, SIZES)
    done = [next(results)[0] for _ in range(3)]
    with pytest.raises(ZeroDivisionError, match="w3"):
        next(results)
    assert done == ["w0", "w1", "w2"]
    assert len(called) < len(SIZES)


def test_what_pytorch_is_set_to_stays() -> None:
    before = torch.get_num_threads()
    inside = [threads for _, threads in Workers().run(lambda _: torch.get_num_threads(), SIZES)]
    assert set(inside) == {1}
    assert torch.get_num_threads() == before
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [before]


def test_tensors_are_read_ahead_in_their_order() -> None:
    ahead: list[str] = []
    there = {name: threading.Event() for name in SIZES}

    def read(name: str) -> None:
        ahead.append(name)
        there[name].set()

    def use(name: str) -> None:  # else what isn't read yet when all is done never is
        assert there[name].wait(60)

    list(Workers(threads=2).run(use, SIZES, ahead=read))
    assert ahead == list(SIZES)


def test_totals_are_the_same_by_any_number_of_threads() -> None:
    family = Family(**models())

    def sums(vectors: TaskVectors) -> torch.Tensor:
        return (
            vectors.stack().to(torch.float64).reshape(len(vectors), vectors.shape.numel()).sum(1)
            / 3
        )

    def counts(vectors: TaskVectors) -> torch.Tensor:
        return (vectors.stack().reshape(len(vectors), vectors.shape.numel()) > 0).sum(1)

    wanted = torch.zeros(3, dtype=torch.float64)
    for vectors in family:
        wanted += sums(vectors)
    for threads in (1, 2, 5):
        family = Family(**models(), workers=Workers(threads=threads))
        found = family.total(sums)
        assert found is not None
        assert torch.equal(found, wanted)  # added in the base's order, to the bit
        counted = family.total(counts)
        assert counted is not None
        assert counted.tolist() == sum(counts(vectors) for vectors in family).tolist()  # type: ignore[union-attr]
        assert list(family.each(lambda vectors: vectors.name)) == family.names("delta")


@pytest.mark.parametrize(
    "codec",
    [
        EMR(),
        MagnitudePrune(0.2, merge=TIES()),
        SVD(budget=900),
        DBMS(EMR()),
        Merged(),
    ],
    ids=repr,
)
def test_the_bundle_is_the_same_by_any_number_of_threads(codec: EMR, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            compress(codec=codec, out=tmp_path / str(threads), **models())
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "1") == contents(tmp_path / "4")
