"""Batches of many tasks: each row as its task by itself, the model left alone, memory bounded."""

import copy
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixed_rows import bundled, check, check_snapshot, same, snapshot, tuned
from tiny_net import TASKS, TinyNet, perturbed
from torch import Tensor, nn

import fusionkit
from fusionkit import SVD, Bundle, Dense
from fusionkit.errors import BundleError, FusionKitError, WrongBaseError
from fusionkit.reuse.mixed_batch import MixedBatch
from fusionkit.reuse.module import ReuseModule

PRIVATE = ["head.*"]
ROWS = ["cat", None, "ant", "ant", "bee", None, "cat"]
States = dict[str, dict[str, Tensor]]


@pytest.fixture
def bundle(base: TinyNet, finetuned: States, tmp_path: Path) -> Bundle:
    state = dict(base.state_dict())
    return fusionkit.compress(state, finetuned, SVD(rank=3), tmp_path / "b", private=PRIVATE)


@pytest.fixture
def batch(base: TinyNet, bundle: Bundle) -> MixedBatch:
    return MixedBatch(copy.deepcopy(base).eval(), bundle)


def tokens(rows: int) -> Tensor:
    return torch.randint(0, 11, (rows, 5))


@given(order=st.lists(st.sampled_from([*TASKS, None]), min_size=1, max_size=9))
@settings(max_examples=12, deadline=None)
def test_every_order_of_tasks_is_answered_row_by_row(order: list[str | None]) -> None:
    torch.manual_seed(0)
    base = TinyNet().eval()
    states = {task: perturbed(base, seed=p, classes=p + 2) for p, task in enumerate(TASKS)}
    bundle = bundled(base, states, SVD(rank=2), private=PRIVATE)
    check(base, bundle, order, tokens(len(order)))


def test_one_of_many_batches_is_as_the_first(base: TinyNet, bundle: Bundle) -> None:
    batch = MixedBatch(copy.deepcopy(base).eval(), bundle)
    for tasks in (ROWS, ROWS, ROWS[::-1], [None, None], ["ant"], ["ant"] * 3, ROWS):
        check(base.eval(), bundle, tasks, tokens(len(tasks)), batch=batch)


def test_an_error_within_leaves_the_model_alone(batch: MixedBatch) -> None:
    before = snapshot(batch.model)

    def fails() -> None:
        with batch.rows(ROWS):
            batch.model(tokens(7))
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    check_snapshot(batch.model, before)
    with batch.rows(["ant"]):
        batch.model(tokens(1))


def test_unknown_tasks_are_refused_before_anything_runs(batch: MixedBatch) -> None:
    for asked in (lambda: batch.rows(["ant", "ox"]), lambda: batch.rows(["ox"])):
        with pytest.raises(BundleError, match="no task 'ox'"), asked():
            raise AssertionError
    for ask in (batch.ready, batch.classes):
        with pytest.raises(BundleError, match="no task 'ox'"):
            ask("ox")
    with pytest.raises(FusionKitError, match="has no rows"), batch.rows([]):
        raise AssertionError
    assert batch.figures.misses == 0


def test_one_batch_runs_at_a_time(batch: MixedBatch) -> None:
    with (
        batch.rows(["ant"]),
        pytest.raises(FusionKitError, match="another batch runs"),
        batch.rows(["bee"]),
    ):
        raise AssertionError
    with batch.rows(["ant"]), pytest.raises(FusionKitError, match="is switching this model"):
        fusionkit.switch(batch.model, batch.source, "bee")
    found: list[BaseException] = []

    def elsewhere() -> None:
        try:
            batch.model(tokens(2))
        except FusionKitError as error:
            found.append(error)

    with batch.rows(["ant", "bee"]):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        batch.model(tokens(2))
    assert "by another thread" in str(found[0])


def test_tasks_are_readied_while_others_run(base: TinyNet, bundle: Bundle) -> None:
    batch = MixedBatch(copy.deepcopy(base).eval(), bundle)
    x = tokens(2)
    with batch.rows(["ant", "ant"]):
        before = batch.model(x)
        threads = [threading.Thread(target=batch.ready, args=[task]) for task in TASKS * 4]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.equal(batch.model(x), before)
    assert batch.figures.tasks == 3
    misses = batch.figures.misses
    check(base.eval(), bundle, ROWS, tokens(7), batch=batch)
    assert batch.figures.misses == misses


def test_operands_are_kept_within_their_bytes(base: TinyNet, bundle: Bundle) -> None:
    roomy = MixedBatch(copy.deepcopy(base).eval(), bundle)
    sizes = {}
    for task in TASKS:
        before = roomy.figures.bytes
        roomy.ready(task)
        sizes[task] = roomy.figures.bytes - before
    room = sizes["ant"] + sizes["bee"]
    batch = MixedBatch(copy.deepcopy(base).eval(), bundle, operand_bytes=room)
    check(base.eval(), bundle, ["ant", "bee"], tokens(2), batch=batch)
    assert (batch.figures.bytes, batch.figures.evicted) == (room, 0)
    check(base.eval(), bundle, ["cat", "bee", "ant"], tokens(3), batch=batch)  # beyond it, once
    assert (batch.figures.bytes, batch.figures.tasks, batch.figures.evicted) == (room, 2, 1)
    batch.forget("ant")
    assert (batch.figures.bytes, batch.figures.tasks) == (sizes["bee"], 1)


def test_a_task_larger_than_all_room_is_served_and_let_go(base: TinyNet, bundle: Bundle) -> None:
    batch = MixedBatch(copy.deepcopy(base).eval(), bundle, operand_bytes=1)
    for _ in range(2):
        check(base.eval(), bundle, ROWS, tokens(7), batch=batch)
        assert (batch.figures.bytes, batch.figures.tasks) == (0, 0)
    assert batch.figures.misses == 6


def test_a_task_that_is_forgotten_while_it_runs_is_served(batch: MixedBatch) -> None:
    x = tokens(2)
    with batch.rows(["ant", "bee"]):
        before = batch.model(x)
        batch.forget("ant")
        assert torch.equal(batch.model(x), before)


def test_tasks_that_come_and_go_are_followed(
    base: TinyNet, finetuned: States, bundle: Bundle
) -> None:
    base.eval()
    batch = MixedBatch(copy.deepcopy(base), bundle)
    check(base, bundle, ROWS, tokens(7), batch=batch)
    misses = batch.figures.misses
    bundle.remove("bee")
    with pytest.raises(BundleError, match="no task 'bee'"), batch.rows(["bee"]):
        raise AssertionError
    fusionkit.add_tasks(bundle, {"bee": finetuned["cat"], "dog": perturbed(base, 9, 7)})
    check(base, bundle, ["dog", *ROWS], tokens(8), batch=batch)
    assert batch.figures.misses == misses + 2  # of the two that are new
    assert batch.classes("bee") == 4


def test_a_task_with_tensors_of_its_own_that_none_had(base: TinyNet) -> None:
    base.eval()
    states = tuned(base, still=lambda name: name.startswith("head"))
    more = states.pop("cat")
    bundle = bundled(base, states, Dense(), private=["head.*"])
    for task in ("ant", "bee"):
        assert "head.weight" in bundle.private(task)
    batch = MixedBatch(copy.deepcopy(base), bundle)
    batch.ready("ant")
    fusionkit.add_tasks(bundle, {"cat": more})
    thread = threading.Thread(target=batch.ready, args=["cat"])
    thread.start()
    thread.join()
    check(base, bundle, ROWS, tokens(7), batch=batch)


def test_a_module_is_called_with_a_task_per_row(base: TinyNet, bundle: Bundle) -> None:
    module = ReuseModule(base.eval(), bundle)
    x = tokens(7)
    wanted = module(x, tasks=ROWS)
    module.switch("cat")
    alone = module(x[:1]).detach()
    for batch in (x, (x, torch.zeros(7)), [x]):
        found = module(batch, tasks=ROWS)
        assert torch.equal(found, wanted)
        assert module.task is None
    assert same(found[:1], alone)
    module.switch("cat")
    assert torch.equal(module(x[:1]), alone)
    with pytest.raises(BundleError, match="no task 'ox'"):
        module(x, tasks=["ox"] * 7)


def test_a_copied_module_has_a_batch_of_its_own(base: TinyNet, bundle: Bundle) -> None:
    module = ReuseModule(base.eval(), bundle)
    x = tokens(7)
    wanted = module(x, tasks=ROWS)
    copied = copy.deepcopy(module)
    assert torch.equal(copied(x, tasks=ROWS), wanted)
    assert copied._mixed is not module._mixed
    assert copied._mixed is not None
    assert copied._mixed.model is copied.model


def test_tasks_that_are_not_compressed_are_refused(base: TinyNet, finetuned: States) -> None:
    module = ReuseModule(base.eval(), finetuned=dict(finetuned), private=PRIVATE)  # type: ignore[arg-type]
    with pytest.raises(FusionKitError, match=r"needs a bundle.*give a `codec`"):
        module(tokens(1), tasks=["ant"])


def test_another_dtype_and_another_model_are_followed(base: TinyNet, bundle: Bundle) -> None:
    model = copy.deepcopy(base).eval()
    batch = MixedBatch(model, bundle)
    with batch.rows(ROWS):
        before = model(tokens(7))
    model.double()
    with batch.rows(ROWS):
        found = model(tokens(7))
    assert found.dtype == torch.float64
    assert before.dtype == torch.float32
    fusionkit.switch(model, bundle, "ant")
    with pytest.raises(WrongBaseError, match="make it the base first"), batch.rows(ROWS):
        raise AssertionError
    with pytest.raises(WrongBaseError):
        MixedBatch(model, bundle)
    fusionkit.switch(model, bundle, None)
    with batch.rows(ROWS):
        assert torch.equal(model(tokens(7)).isfinite(), found.isfinite())


def test_models_that_can_not_be_are_refused(base: TinyNet, bundle: Bundle) -> None:
    base.eval()
    compiled = torch.compile(copy.deepcopy(base))
    with pytest.raises(FusionKitError, match="is compiled"):
        MixedBatch(compiled, bundle)  # type: ignore[arg-type]
    with pytest.raises(FusionKitError, match="meta device"):
        MixedBatch(TinyNet().to("meta"), bundle)
    other = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16))
    with pytest.raises(FusionKitError, match="batch_first=False"):
        MixedBatch(other, bundled(other, tuned(other), Dense()))


def test_rows_that_are_not_the_first_axis_are_refused(batch: MixedBatch) -> None:
    with (
        pytest.raises(FusionKitError, match=r"'embed' .* shape \[5, 5\] in a batch of 2 rows"),
        batch.rows(["ant", "bee"]),
    ):
        batch.model(tokens(5))


class Past(nn.Module):
    """Reads its layer's weight past the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.inner.weight)


def test_a_weight_that_is_read_past_its_layer_is_refused() -> None:
    base = Past().eval()
    batch = MixedBatch(base, bundled(base, tuned(base), Dense()))
    with (
        pytest.raises(FusionKitError, match=r"'inner.weight', .* read past its own layer"),
        batch.rows(["ant", "bee"]),
    ):
        base(torch.randn(2, 4))


def test_a_batch_waits_for_a_thread_that_looks_at_the_model(batch: MixedBatch) -> None:
    """As one does that readies a task which came later, with tensors that no other task has."""
    batch._running.acquire()
    looking = threading.Timer(0.1, batch._running.release)
    looking.start()
    with batch.rows([None, "ant"]):
        pass
    looking.join()


def test_what_is_held_is_known(batch: MixedBatch) -> None:
    assert batch.holds(None)
    assert not batch.holds("ant")
    batch.ready("ant")
    assert batch.holds("ant")
    batch.forget("ant")
    assert not batch.holds("ant")
    with pytest.raises(BundleError, match="has no task 'wasp'"):
        batch.holds("wasp")
