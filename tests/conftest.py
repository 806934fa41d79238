"""Fixtures: a tiny base and its fine-tuned models, with everything in them that real ones have."""

import os
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_net import TASKS, Files, TinyNet, perturbed
from torch import Tensor

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several, which together fill the machine
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

pytest_plugins = ["pytester"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first: what is short evens out, among several workers, what is long."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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
