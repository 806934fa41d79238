"""What lies in Hugging Face's cache is read from there, whole or not at all."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub_cache import cached
from safetensors.torch import save_file

from fusionkit import Checkpoint
from fusionkit.checkpoints.hub_cache import dataset_in_hub_cache, in_hub_cache
from fusionkit.errors import CheckpointError


@pytest.fixture
def sharded(hub_cache: Path) -> Path:
    """A model of two shards."""
    folder = cached(hub_cache, "someone/model")
    for name in ("a", "b"):
        save_file({name: torch.ones(2)}, folder / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in ("a", "b")}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_model(sharded: Path) -> None:
    assert sorted(Checkpoint.of("hf://someone/model")) == ["a", "b"]
    assert list(Checkpoint.of("hf://someone/model/a.safetensors")) == ["a"]
    assert in_hub_cache(f"hf://someone/model@{sharded.name}") == sharded
    assert in_hub_cache("hf://someone/model@v2") is None
    assert in_hub_cache("hf://datasets/someone/model") is None
    assert in_hub_cache("s3://someone/model") is None


def test_what_is_not_there(sharded: Path) -> None:
    with pytest.raises(CheckpointError, match=r"hf://no/one: is not in .*hf download no/one"):
        Checkpoint.of("hf://no/one")
    (sharded / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"hf://someone/model: is not in .*, or not whole"):
        Checkpoint.of("hf://someone/model")
    shutil.rmtree(sharded)
    sharded.mkdir()
    (sharded / "config.json").write_text("{}")
    assert in_hub_cache("hf://someone/model") is None


def test_a_data_set(hub_cache: Path) -> None:
    folder = cached(hub_cache, "someone/rows", "dataset")
    (folder / "README.md").write_text("rows")
    assert dataset_in_hub_cache("someone/rows") is None
    (folder / "data").mkdir()
    (folder / "data/test-00000-of-00002.parquet").write_bytes(b"")
    assert dataset_in_hub_cache("someone/rows") is None
    (folder / "data/test-00001-of-00002.parquet").write_bytes(b"")
    assert dataset_in_hub_cache("someone/rows") == folder
    assert dataset_in_hub_cache("someone/other") is None
