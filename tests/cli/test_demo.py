"""The embedded demo's data and checkpoints; the whole way is run elsewhere."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fusionkit import Family
from fusionkit.cli import demo
from fusionkit.tasks import digits
from fusionkit.tasks.digits import DigitTasks, base_model

TASKS = DigitTasks().tasks


def every_orientation(images: Tensor) -> set[bytes]:
    """Pixels of the images turned, mirrored and inverted every way."""
    turned = [torch.rot90(images, turns, (2, 3)) for turns in range(4)]
    seen = torch.cat([*turned, *(image.flip(3) for image in turned)])
    return {pixels(image) for image in torch.cat([seen, -seen])}


def pixels(image: Tensor) -> bytes:
    return (image + 0.0).numpy().tobytes()  # + 0.0: -0.0 is 0.0


@pytest.fixture(scope="module")
def trained_on() -> set[bytes]:
    """All that any training sees, the base's included."""
    data = DigitTasks()
    rows = [digits.pretraining_rows(), *(data.rows(task, test=False) for task in data.tasks)]
    return every_orientation(torch.cat([images for images, _ in rows]))


def test_five_tasks_or_more() -> None:
    data = DigitTasks()
    assert len(data.tasks) >= 5
    assert list(data.num_classes) == data.tasks
    assert len(set(data.num_classes.values())) >= 3


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("test", [False, True])
def test_rows(task: str, test: bool) -> None:
    data = DigitTasks()
    images, labels = data.rows(task, test)
    assert images.dtype == torch.float32
    assert images.shape == (len(labels), 1, 8, 8)
    assert images.abs().max() <= 1
    assert labels.dtype == torch.int64
    assert set(labels.tolist()) == set(range(data.num_classes[task]))


@pytest.mark.parametrize("task", TASKS)
def test_no_test_image_is_trained_on_in_any_orientation(task: str, trained_on: set[bytes]) -> None:
    images, _ = DigitTasks().rows(task, test=True)
    assert not trained_on & {pixels(image) for image in images}


def test_one_dataloader_per_task_in_order() -> None:
    data = DigitTasks(batch_size=50)
    loaders = data.test_dataloader()
    assert len(loaders) == len(data.train_dataloader()) == len(data.tasks)
    for task, loader in zip(data.tasks, loaders, strict=True):
        images, labels = next(iter(loader))
        assert images.shape == (50, 1, 8, 8)
        torch.testing.assert_close(labels, data.rows(task, test=True)[1][:50])


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_the_same_every_time(task: str) -> None:
    first = DigitTasks().rows(task, test=True)
    digits._digits.cache_clear()
    torch.manual_seed(1)
    again = DigitTasks().rows(task, test=True)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_base_model_is_small_and_has_a_head_of_its_own() -> None:
    model = base_model()
    assert 100_000 < sum(p.numel() for p in model.parameters()) < 500_000
    assert model.get_parameter("head.weight").shape[0] == 10


class TestCache:
    """Where `prepare` looks for checkpoints; every model trained for one step, for two tasks."""

    @pytest.fixture(autouse=True)
    def _short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for kind in ("base", "full", "lora"):
            monkeypatch.setitem(demo.SETTINGS, kind, {**demo.SETTINGS[kind], "steps": 1})
        monkeypatch.setattr(digits, "_TASKS", {task: digits._TASKS[task] for task in TASKS[:2]})

    def test_trains_once(self, tmp_path: Path) -> None:
        family = demo.prepare(tmp_path)
        paths = [family.base, *family.full.values()]
        paths += [folder / "adapter_model.safetensors" for folder in family.lora.values()]
        assert list(family.full) == list(family.lora) == TASKS[:2]
        times = [path.stat().st_mtime_ns for path in paths]
        assert demo.prepare(tmp_path) == family
        assert [path.stat().st_mtime_ns for path in paths] == times

    def test_does_not_depend_on_what_was_drawn_before(self, tmp_path: Path) -> None:
        states = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            states.append(load_file(demo.prepare(tmp_path / str(seed)).full[TASKS[1]]))
        for name, tensor in states[0].items():
            torch.testing.assert_close(states[1][name], tensor)

    def test_goes_on_where_it_was_interrupted(self, tmp_path: Path) -> None:
        family = demo.prepare(tmp_path)
        base = family.base.stat().st_mtime_ns
        family.full[TASKS[1]].unlink()
        family.full[TASKS[1]].parent.rmdir()
        demo.prepare(tmp_path)
        assert family.full[TASKS[1]].is_file()
        assert family.base.stat().st_mtime_ns == base

    def test_other_settings_are_another_family(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = demo.prepare(tmp_path)
        monkeypatch.setitem(demo.SETTINGS, "version", -1)
        assert demo.prepare(tmp_path).base != before.base

    def test_adapters_are_of_the_base(self, tmp_path: Path) -> None:
        made = demo.prepare(tmp_path)
        family = Family(made.base, made.lora, private=["head.*"])
        assert len(family.names("delta")) == 17
