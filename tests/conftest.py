"""Fixtures: a tiny base and its fine-tuned models, with everything in them that real ones have."""

import os
import tempfile
from pathlib import Path

import profiles  # noqa: F401  # before Hypothesis looks for the profile that is asked for
import pytest
import torch
from safetensors.torch import save_file
from tiny_net import TASKS, Files, TinyNet, perturbed
from torch import Tensor

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several, which together fill the machine
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

pytest_plugins = ["pytester"]


DEAR = {
    **dict.fromkeys(("lora", "linearized", "ia3", "full"), "fits"),
    **{name: name for name in ("by_several", "finished", "ranks", "spread_out", "trained")},
}
"""Fixture that takes seconds to make → the group of those that are made in one worker."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups, in one worker each, then the slow ones, so that what is short evens out the rest."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    for item in items:
        if group := _group(item):
            item.add_marker(pytest.mark.xdist_group(group))


def _group(item: pytest.Item) -> str | None:
    """The group of the dear fixture that a test asks for, by itself or by a parameter."""
    names = list(getattr(item, "fixturenames", ()))
    settings = item.callspec.params if hasattr(item, "callspec") else {}
    if "request" in names:
        names += [each for each in settings.values() if isinstance(each, str)]
    own = next((name for name in names if name in DEAR), None)
    return own and f"{DEAR[own]}{settings.get(own, '')}"  # of two processes, or of three


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of Hugging Face's cache, empty; the Hub is not asked. `hub_cache.py` fills it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.fixture
def base() -> TinyNet:
    return TinyNet().eval()


@pytest.fixture
def finetuned(base: TinyNet) -> dict[str, dict[str, Tensor]]:
    """Task name → state dict; weights, BatchNorm statistics and heads differ from the base's."""
    return {
        task: perturbed(base, seed=place, classes=place + 2) for place, task in enumerate(TASKS)
    }


@pytest.fixture
def files(tmp_path: Path, base: TinyNet, finetuned: dict[str, dict[str, Tensor]]) -> "Files":
    """The same family as safetensors files, tied tensors saved once."""

    def save(name: str, state: dict[str, Tensor]) -> Path:
        path = tmp_path / f"{name}.safetensors"
        save_file({k: v.contiguous() for k, v in state.items() if k != "decoder.weight"}, path)
        return path

    return Files(
        save("base", base.state_dict()),
        {task: save(task, state) for task, state in finetuned.items()},
    )


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that temporary files go to; empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder
