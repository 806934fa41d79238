"""The lists of classes of CLIP's twenty tasks."""

import json
from typing import Any

import pytest
from tiny_net import TESTS

from fusionkit.tasks.class_names import Classes, class_names
from fusionkit.tasks.zero_shot import ClassPrompts

FOLDER = TESTS.parent / "recipes/papers/classes"
EIGHT = {
    "sun397": 397,
    "stanford-cars": 196,
    "resisc45": 45,
    "eurosat": 10,
    "svhn": 10,
    "gtsrb": 43,
    "mnist": 10,
    "dtd": 47,
}
TWENTY = {
    **EIGHT,
    "oxford_flowers102": 102,
    "pcam": 2,
    "fer2013": 7,
    "oxford-iiit-pet": 37,
    "stl10": 10,
    "cifar100": 100,
    "cifar10": 10,
    "food101": 101,
    "fashion_mnist": 10,
    "emnist_letters": 26,
    "kmnist": 10,
    "rendered-sst2": 2,
}


def content(task: str) -> Any:
    return json.loads((FOLDER / f"{task}.json").read_text(encoding="utf-8"))


def test_there_are_twenty() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == TWENTY.keys()


@pytest.mark.parametrize("task", TWENTY)
def test_a_list(task: str) -> None:
    """Has each class once, however it is spelled, and says where it is from."""
    path = FOLDER / f"{task}.json"
    prompts = ClassPrompts.read(path)
    names = class_names(str(path), task)
    assert len(names) == len(prompts.names) == TWENTY[task]
    classes = Classes(task, names, prompts.names)
    for called in (names, prompts.names):
        spelled = [each.replace(" ", "_").upper() for each in called]
        assert [classes.place(each, "row 1") for each in spelled] == list(range(len(names)))
    assert len(set(prompts.prompts)) == len(names) * len(prompts.templates)
    assert set(content(task)) - {"names"} == {"source", "data", "checked", "labels", "templates"}


def test_orders_that_differ_between_sources() -> None:
    """EuroSAT's and the pets' are those of the sorted folders, and not of CLIP's authors."""
    for task in ("eurosat", "oxford-iiit-pet", "dtd", "food101", "resisc45"):
        labels = content(task)["labels"]
        assert labels == sorted(labels), task
    assert content("eurosat")["names"][:2] == ["annual crop land", "forest"]
    assert content("gtsrb")["labels"][14] == "stop"
    assert content("fer2013")["labels"][4:] == ["neutral", "sad", "surprised"]
    assert content("emnist_letters")["labels"][0] == "A"
