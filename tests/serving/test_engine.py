"""The engine while things change: requests taken back, tasks that come and go, faults, an end."""

import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import talking
import torch
from serving.asking import Asked, Judge, ask

import fusionkit
from fusionkit import SVD, Bundle
from fusionkit.bundles.format import task_file
from fusionkit.errors import (
    BundleError,
    QueueFullError,
    StoppedError,
    TaskGoneError,
    UnknownTaskError,
)
from fusionkit.serving.engine import Engine
from fusionkit.serving.requests import Generate, Piece

TASKS = (None, "cats", "dogs")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose answers never end by themselves, and have a long context."""
    folder = tmp_path_factory.mktemp("lasting")
    for name, model in talking.models_of("llama, untied").items():
        model.config.max_position_embeddings = 100_000
        model.config.eos_token_id = model.generation_config.eos_token_id = None
        model.save_pretrained(folder / name)
    talking.tokenizer().save_pretrained(folder / "base")
    paths = {task: str(folder / task) for task in ("cats", "dogs")}
    fusionkit.compress(str(folder / "base"), paths, SVD(6), folder / "b")
    return folder


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Bundle:
    shutil.copytree(made / "b", tmp_path / "b")
    return Bundle(tmp_path / "b", made / "base")


@pytest.fixture
def engine(bundle: Bundle) -> Iterator[Engine]:
    found = Engine(bundle, max_batch=4, max_queue=8)
    yield found
    found.drain(0)


def endless(engine: Engine, task: str | None, temperature: float = 2.0) -> Asked:
    """An answer that has begun, and does not end by itself."""
    asked = ask(engine, Generate(task, (2, 3), 90_000, temperature, seed=0))
    assert asked.begun.wait(10)
    return asked


def goes_on(asked: Asked) -> None:
    """More comes of it."""
    count = len(asked.answers)
    for _ in range(1000):
        if len(asked.answers) > count:
            return
        time.sleep(0.01)
    raise AssertionError("nothing more came")


def brief(engine: Engine, task: str | None = "dogs") -> Asked:
    return ask(engine, Generate(task, (4, 5, 6), 5, 0))


def test_a_request_taken_back_makes_room(engine: Engine) -> None:
    running = [endless(engine, task) for task in ("cats", "dogs", None, "cats")]
    waiting = [brief(engine), brief(engine)]
    engine.cancel(waiting[0].ticket)
    assert waiting[0].last == Piece("", 0, "cancelled", 3, 0)
    assert not waiting[1].answers
    engine.cancel(running[2].ticket)
    last = running[2].last
    assert last.finish == "cancelled"
    assert last.completion_tokens == sum(piece.tokens for piece in running[2].answers)  # type: ignore[union-attr]
    Judge(engine._bundle).check(waiting[1])
    for each in (running[0], running[1], running[3]):
        goes_on(each)
    assert engine.figures()["cancelled_total"] == 2


def test_who_can_not_be_told_is_let_go(engine: Engine) -> None:
    told = []

    def to(answer: Any) -> None:
        told.append(answer)
        raise ConnectionError("gone")

    engine.submit(Generate("cats", (2,), 90_000, 2.0), to)
    other = endless(engine, "cats")
    for _ in range(500):
        if engine.figures()["running"] == 1:
            break
        time.sleep(0.01)
    goes_on(other)
    assert engine.figures()["running"] == 1
    assert told[-1].finish == "cancelled"
    assert len(told) <= 3


def test_a_task_removed_while_it_answers(engine: Engine, bundle: Bundle) -> None:
    """Its rows end, those that wait too; all others go on; it can come again."""
    gone, other = endless(engine, "cats"), endless(engine, "dogs")
    base, more = endless(engine, None), endless(engine, "cats")
    waiting = [brief(engine, "cats"), brief(engine, "dogs")]
    Bundle(bundle.path).remove("cats")  # by another process, say
    engine.remove("cats")
    for each in (gone, more, waiting[0]):
        assert isinstance(each.last, TaskGoneError)
    with pytest.raises(UnknownTaskError, match="has no task 'cats'; it has dogs"):
        brief(engine, "cats")
    assert engine.tasks == ("dogs",)
    Judge(engine._bundle).check(waiting[1])
    for each in (other, base):
        goes_on(each)
    fusionkit.add_tasks(
        Bundle(bundle.path, bundle.base), {"cats": str(bundle.base.files[0].parents[1] / "dogs")}
    )
    engine.add("cats")
    again, same = brief(engine, "cats"), brief(engine, "dogs")
    assert again.text == same.text
    with pytest.raises(UnknownTaskError, match="has no task 'birds'"):
        engine.add("birds")


def test_a_damaged_task_harms_no_other(engine: Engine, bundle: Bundle) -> None:
    other = endless(engine, "dogs")
    file = bundle.path / task_file("cats")
    content = file.read_bytes()
    file.write_bytes(content[:-40])
    assert isinstance(brief(engine, "cats").last, BundleError)
    goes_on(other)
    file.write_bytes(content)
    engine.add("cats")  # which looks at the files anew
    Judge(bundle).check(brief(engine, "cats"))


def test_as_many_wait_as_may(engine: Engine) -> None:
    running = [endless(engine, "cats") for _ in range(4)]
    waiting = [brief(engine) for _ in range(8)]
    with pytest.raises(QueueFullError, match="8 requests wait already, as many as may"):
        brief(engine)
    assert engine.figures()["waiting"] == 8
    engine.cancel(running[0].ticket)
    assert all(each.text for each in waiting)


def test_draining_answers_what_was_taken(engine: Engine) -> None:
    asked = [ask(engine, Generate(task, (3,), 40, 0)) for task in TASKS for _ in range(2)]
    engine.drain(20)
    judge = Judge(engine._bundle)
    for each in asked:
        judge.check(each)
    with pytest.raises(StoppedError, match="takes no requests any more"):
        brief(engine)
    with pytest.raises(StoppedError):
        engine.add("cats")


def test_draining_ends_what_takes_too_long(engine: Engine) -> None:
    asked = [endless(engine, "cats") for _ in range(4)]
    waiting = brief(engine)
    start = time.monotonic()
    engine.drain(0.2)
    assert time.monotonic() - start < 5
    assert all(isinstance(each.last, StoppedError) for each in (*asked, waiting))


@pytest.fixture
def faulty(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has the model fail where a function of its tokens says so."""
    model = engine._mixed.model
    forward = model.forward

    def set_fault(fault: Any) -> None:
        def failing(*args: Any, **kwargs: Any) -> Any:
            if (error := fault(kwargs["input_ids"])) is not None:
                raise error
            return forward(*args, **kwargs)

        monkeypatch.setattr(model, "forward", failing)

    return set_fault


def test_a_row_over_which_the_model_fails_ends_alone(engine: Engine, faulty: Any) -> None:
    """When its prompt is read, and in the middle of its answer."""
    others = [endless(engine, "dogs", 0), endless(engine, "cats", 0)]
    judge = Judge(engine._bundle)
    good = brief(engine, "cats")
    faulty(lambda ids: ValueError("token 27") if (ids == 27).any() else None)
    bad = ask(engine, Generate("cats", (4, 27), 5, 0))
    assert str(bad.last) == "token 27"
    judge.check(good)
    victims = [ask(engine, Generate("cats", (4, 5), 90_000, 2.0, seed=n)) for n in range(2)]
    assert {str(each.last) for each in victims} == {"token 27"}
    judge.check(brief(engine, "dogs"))
    for each in others:
        goes_on(each)


def test_a_fault_that_is_no_rows_passes(engine: Engine, faulty: Any) -> None:
    judge, faults = Judge(engine._bundle), iter([True, True])
    asked = [ask(engine, Generate(task, (7,), 30, 0)) for task in TASKS]
    faulty(lambda ids: RuntimeError("flaky") if len(ids) == 3 and next(faults, False) else None)
    for each in asked:
        judge.check(each)


def test_a_fault_that_stays_ends_the_rows(engine: Engine, faulty: Any) -> None:
    asked = [endless(engine, task) for task in TASKS]
    faulty(lambda ids: RuntimeError("only together") if len(ids) == 3 else None)
    assert {str(each.last) for each in asked} == {"only together"}
    faulty(lambda ids: None)
    Judge(engine._bundle).check(brief(engine))


def test_what_memory_has_no_room_for_waits(engine: Engine, faulty: Any) -> None:
    """Rows leave, and join again with what they have; no answer is another for it."""
    judge = Judge(engine._bundle)
    faulty(lambda ids: torch.OutOfMemoryError("no room") if len(ids) > 2 else None)
    asked = [ask(engine, Generate(task, (3, 4), 20, 0)) for task in TASKS for _ in range(2)]
    for each in asked:
        judge.check(each)
    faulty(lambda ids: torch.OutOfMemoryError("no room"))
    assert isinstance(brief(engine).last, torch.OutOfMemoryError)


def test_many_threads_ask(bundle: Bundle) -> None:
    engine, judge = Engine(bundle, max_batch=5, max_queue=100), Judge(bundle)
    found: list[Asked] = []

    def client(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(6):
            prompt = tuple(draw.randrange(2, 28) for _ in range(draw.randrange(1, 9)))
            asked = ask(engine, Generate(draw.choice(TASKS), prompt, draw.randrange(1, 20), 0))
            if draw.random() < 0.2:
                engine.cancel(asked.ticket)
                assert asked.last.finish in ("cancelled", "length")
            else:
                assert asked.text
                found.append(asked)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(found) > 20
    for each in found:
        judge.check(each)
    engine.drain(1)
