"""Tasks with vocabularies of their own: a live model is resized for them, and back."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import check_same
from torch import Tensor
from vocabularies import MODELS, ROWS, extended, logits, made

import fusionkit
from fusionkit import EMR, Checkpoint, Dense
from fusionkit.errors import FamilyError
from fusionkit.reuse.module import ReuseModule

WAYS = ("folder", "live", "file", "mapping")


def given(model: Any, way: str, folder: Path) -> Any:
    """A model as a source."""
    if way == "live":
        return model
    if way == "mapping":
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder)
    if way == "folder":
        return str(folder)
    bare = folder / "bare.safetensors"  # beside which no configuration speaks for it
    (folder / "model.safetensors").rename(bare)
    return str(bare)


def state_of(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MODELS)
def test_each_task_has_its_own_vocabulary(kind: str, way: str, tmp_path: Path) -> None:
    base = made(kind)
    tuned = {
        "five": extended(base, 5),
        "none": extended(base, 0, seed=2),
        "eight": extended(base, 8, seed=3),
    }
    before, alone = state_of(base), logits(base, ROWS)
    sources = {task: given(model, way, tmp_path / task) for task, model in tuned.items()}
    model = copy.deepcopy(base)
    bundle = fusionkit.compress(given(base, way, tmp_path / "base"), sources, Dense("fp32"))
    module = ReuseModule(model, bundle=bundle)
    for task in ("five", "eight", "none", "five", None, "eight", None):
        module.switch(task)
        rows = ROWS if task is None else tuned[task].config.vocab_size
        wanted = alone if task is None else logits(tuned[task], rows)
        torch.testing.assert_close(logits(model, rows), wanted, rtol=1e-5, atol=1e-5)
        assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == rows
        head = model.get_output_embeddings()
        assert head.out_features == len(head.weight) == rows
        tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
        assert (head.weight is model.get_input_embeddings().weight) == tied
    check_same(state_of(model), before)
    for task in tuned:
        wanted_state = tuned[task].state_dict()
        state = bundle.state_dict(task)
        assert state.keys() <= wanted_state.keys()
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, wanted_state[name], rtol=1e-6, atol=1e-6)
            if name in bundle.added(task):
                assert torch.equal(tensor[ROWS:], wanted_state[name][ROWS:])
