"""What a stranger's files may ask for: configurations, JSON, headers of GGUF files."""

import json
import re
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fusionkit import Checkpoint
from fusionkit.checkpoints.from_config import UnknownClassWarning, architecture_of
from fusionkit.checkpoints.json_text import read_json
from fusionkit.errors import CheckpointError

HUGE = {
    "layers": ({"model_type": "llama", "num_hidden_layers": 10**9}, "'num_hidden_layers' is 1000"),
    "labels": ({"model_type": "llama", "num_labels": 10**9}, "'num_labels' is 1000000000, and may"),
    "blocks": (
        {"architecture": "resnet18", "model_args": {"layers": [10**9, 2, 2, 2]}},
        "'layers' is 1000000000, and may be up to 1,024",
    ),
    "modules": (
        {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 1024, "embed_dim": 3}},
        "it has more than 10 modules",
    ),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_class_without_end_is_not_built(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, said = HUGE[name]
    if name == "modules":
        monkeypatch.setattr("fusionkit.checkpoints.config_limits._MOST_MODULES", 10)
    (tmp_path / "config.json").write_text(json.dumps(config))
    start = time.process_time()
    with pytest.warns(UnknownClassWarning, match=f"{re.escape(str(tmp_path))}.*{said}"):
        assert architecture_of(tmp_path) is None
    assert time.process_time() - start < 20  # imports are in it


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested without end|nested deeper"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested deeper than 64 levels"),
        ('{"a": "\\ud800"}', "half a character"),
        ("1" * 5000, "4300 digits"),
        ("", "Expecting value"),
    ],
    ids=["without end", "deep", "half a character", "digits", "empty"],
)
def test_json_has_limits(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_json(path)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}: not readable as JSON"):
        architecture_of(tmp_path)


def test_a_large_file_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    tracemalloc.start()
    with pytest.raises(ValueError, match="it has more than 1 MiB"):
        read_json(path, 1 << 20)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ([], "Expected `object`"),
        ({"weight_map": {"w": 1}}, r"Expected `str`, got `int` - at `\$.weight_map"),
        ({"weight_map": {"w": "a" * 5000}}, "names a shard outside its own folder"),
        ({"weight_map": {"w": "../model.safetensors"}}, "names a shard outside its own folder"),
    ],
    ids=["a list", "a number", "a long name", "elsewhere"],
)
def test_an_index_is_checked(index: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}: .*{said}"):
        Checkpoint.of(tmp_path)


def test_settings_of_quantised_weights_are_made_sense_of_or_refused(tmp_path: Path) -> None:
    tensors = {"w.weight": torch.ones(4, 4, dtype=torch.int8), "w.weight_scale": torch.ones(4, 1)}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": [1]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json: how it is quantised can't be made"):
        Checkpoint.of(tmp_path, dequantize=True)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("r", "8", r"Expected `int`, got `str` - at `\$.r`"),
        ("lora_alpha", float("nan"), "malformed"),
        ("rank_pattern", {"1": 0}, r"`int` >= 1 - at `\$.rank_pattern"),
        ("peft_type", ["LORA"], "of type"),
    ],
)
def test_an_adapters_settings_have_types(key: str, value: Any, said: str, tmp_path: Path) -> None:
    from peft import LoraConfig
    from peft_adapters import net, saved

    from fusionkit import Family

    saved(tmp_path, LoraConfig(r=2, target_modules=["1"]))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    base = Checkpoint.of(dict(net().state_dict()))
    with pytest.raises(CheckpointError, match=f"{re.escape(str(tmp_path))}: .*{said}"):
        Family(base, {"x": tmp_path})
