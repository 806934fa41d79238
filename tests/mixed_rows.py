"""Batches of many tasks, held against each task by itself."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fusionkit
from fusionkit import Bundle
from fusionkit.reuse.mixed_batch import MixedBatch
from fusionkit.reuse.module import ReuseModule

Call = Callable[[nn.Module, Any], Tensor]


def tuned(
    base: nn.Module,
    tasks: Sequence[str] = ("ant", "bee", "cat"),
    scale: float = 0.1,
    still: Callable[[str], bool] = lambda name: False,
) -> dict[str, dict[str, Tensor]]:
    """Fine-tuned copies of a model: all floating-point tensors moved, but for those that are not.

    Args:
        base: the model.
        tasks: their names.
        scale: how far.
        still: which tensors stay, by name.
    """
    states = {}
    for seed, task in enumerate(tasks):
        generator = torch.Generator().manual_seed(seed)
        model = copy.deepcopy(base)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if tensor.is_floating_point() and not still(name):
                    noise = torch.randn(tensor.shape, generator=generator)
                    tensor.add_(scale * (noise.abs() if "var" in name else noise).to(tensor))
        states[task] = dict(model.state_dict())
    return states


def call(model: nn.Module, inputs: Any) -> Tensor:
    """A model's output: logits, of transformers'."""
    given = {"attention_mask": torch.ones_like(inputs)} if hasattr(model, "config") else {}
    found = model(inputs, **given)
    return found if isinstance(found, Tensor) else found.logits


def check(
    base: nn.Module,
    bundle: Bundle,
    tasks: Sequence[str | None],
    inputs: Tensor,
    run: Call = call,
    tolerance: float = 1e-5,
    batch: MixedBatch | None = None,
) -> Tensor:
    """Check that a batch answers each row as a switched model does, and leaves the model alone.

    Args:
        base: the base model.
        bundle: of its tasks.
        tasks: of each row.
        inputs: whose first axis is the rows.
        run: calls a model.
        tolerance: of the largest difference, over the largest entry of a row.
        batch: what runs it; by default one over a copy of the base.
    """
    batch = batch or MixedBatch(copy.deepcopy(base), bundle)
    before = snapshot(batch.model)
    with batch.rows(tasks):
        found = run(batch.model, inputs)
    check_snapshot(batch.model, before)
    wanted = one_by_one(base, bundle, tasks, inputs, run)
    for row, (task, own) in enumerate(zip(tasks, wanted, strict=True)):
        columns = own.shape[-1]
        assert same(found[row][..., :columns], own, tolerance), (row, task)
        left = found[row][..., columns:]
        assert (left == torch.finfo(found.dtype).min).all()
        assert batch.classes(task) in (None, columns)
    return found


def one_by_one(
    base: nn.Module, bundle: Bundle, tasks: Sequence[str | None], inputs: Tensor, run: Call = call
) -> list[Tensor]:
    """What each row's task gives of it, by switching."""
    module = ReuseModule(copy.deepcopy(base), bundle)
    found = {}
    with torch.no_grad():
        for task in dict.fromkeys(tasks):
            module.switch(task)
            for row in (row for row, each in enumerate(tasks) if each == task):
                found[row] = run(module.model, inputs[row : row + 1])[0]
    return [found[row] for row in range(len(tasks))]


def same(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> bool:
    """Equal but for rounding."""
    difference = (found.double() - wanted.double()).abs().max()
    return bool(difference <= tolerance * wanted.double().abs().max().clamp(min=1e-6))


def snapshot(model: nn.Module) -> Mapping[str, Any]:
    """All that a batch might leave changed in a model."""
    tensors = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    modules = {name: dict(module.__dict__) for name, module in model.named_modules()}
    own = {name: {k: _what(v) for k, v in each.items()} for name, each in modules.items()}
    return {"tensors": tensors, "modules": own}


def _what(value: Any) -> Any:
    """An object, or of a list of weights, as recurrent layers have them, what is in it."""
    listed = isinstance(value, list) and value and isinstance(value[0], Tensor)
    return [id(each) for each in value] if listed else id(value)


def check_snapshot(model: nn.Module, before: Mapping[str, Any]) -> None:
    """Check that a model is what it was: the same objects, with the same values."""
    now = snapshot(model)
    for name, own in now["modules"].items():
        for key in (own.keys() | before["modules"][name].keys()) - {"_flat_weight_refs"}:
            assert own[key] == before["modules"][name][key], (name, key)
    assert now["tensors"].keys() == before["tensors"].keys()
    for name, (place, value) in now["tensors"].items():
        assert place == before["tensors"][name][0], name
        assert torch.equal(value, before["tensors"][name][1]), name


def bundled(base: nn.Module, states: Mapping[str, Any], codec: Any, **settings: Any) -> Bundle:
    """A family in memory, compressed."""
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    return fusionkit.compress(state, states, codec, **settings)
