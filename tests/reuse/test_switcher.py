"""The weights kept of the tasks used last: to the bit those decoded anew, within their bytes."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checks import check_same
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_net import TASKS, TinyNet, perturbed
from torch import Tensor

import fusionkit
from fusionkit import EMR, Bundle, Checkpoint, Dense, MagnitudePrune
from fusionkit.reuse.module import ReuseModule
from fusionkit.task_vectors.task_source import written

PRIVATE = ["head.*"]
States = dict[str, dict[str, Tensor]]


@pytest.fixture
def bundle(base: TinyNet, finetuned: States, tmp_path: Path) -> Bundle:
    return fusionkit.compress(
        dict(base.state_dict()), finetuned, EMR(), tmp_path / "b", private=PRIVATE
    )


def one_task(bundle: Bundle) -> int:
    """Bytes of one task's decoded weights."""
    state = bundle.state_dict("ant")
    return sum(state[name].nbytes for name in written(bundle))


def weight(module: ReuseModule) -> Tensor:
    return module.model.state_dict()["hidden.weight"]


def state_of(module: ReuseModule) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.model.state_dict().items()}


@given(order=st.lists(st.sampled_from([*TASKS, None]), max_size=12), room=st.integers(0, 4))
@settings(max_examples=25, deadline=None)
def test_switching_is_the_same_with_a_cache(
    order: list[str | None], room: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    torch.manual_seed(0)
    base = TinyNet().eval()
    finetuned = {task: perturbed(base, seed=p, classes=p + 2) for p, task in enumerate(TASKS)}
    bundle = fusionkit.compress(
        dict(base.state_dict()), finetuned, MagnitudePrune(0.3), private=PRIVATE
    )
    budget = room * one_task(bundle)
    plain = ReuseModule(TinyNet().eval(), base=dict(base.state_dict()), bundle=bundle)
    kept = ReuseModule(
        TinyNet().eval(), base=dict(base.state_dict()), bundle=bundle, cache_bytes=budget
    )
    used: list[str] = []
    for task in order:
        plain.switch(task)
        kept.switch(task)
        check_same(state_of(kept), state_of(plain))
        if task is not None:
            used = [*(u for u in used if u != task), task]
        assert list(kept._switcher.cached) == used[max(len(used) - room, 0) :]
        held = kept._switcher.cached.values()
        assert sum(t.nbytes for tensors in held for t in tensors.values()) <= budget


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("codec", [None, EMR()])
def test_a_switched_module_can_be_copied_and_pickled(
    codec: EMR | None,
    copied: Callable[[ReuseModule], ReuseModule],
    base: TinyNet,
    finetuned: States,
) -> None:
    tuned: dict[str, str | Checkpoint] = dict(finetuned)  # type: ignore[arg-type]
    module = ReuseModule(base, codec=codec, finetuned=tuned, private=PRIVATE)
    module.switch("bee")
    other = copied(module)
    check_same(state_of(other), state_of(module))
    for task in ("ant", None):
        module.switch(task)
        other.switch(task)
        check_same(state_of(other), state_of(module))


def test_what_is_kept_is_not_decoded_again(base: TinyNet, bundle: Bundle) -> None:
    module = ReuseModule(base, bundle=bundle.path, cache_bytes=10 * one_task(bundle))
    module.switch("bee")
    wanted = state_of(module)
    module.switch("ant")
    source = module.source
    assert isinstance(source, Bundle)
    source.tensor = None  # type: ignore[method-assign, assignment]
    module.switch("bee")
    check_same(state_of(module), wanted)
    with pytest.raises(TypeError):
        module.switch("cat")


def test_another_source_forgets(base: TinyNet, finetuned: States, bundle: Bundle) -> None:
    module = ReuseModule(base, bundle=bundle, cache_bytes=10 * one_task(bundle))
    module.switch("bee")
    other = fusionkit.compress(bundle.base, finetuned, Dense(), private=PRIVATE)
    module.reuse(other)
    assert not module._switcher.cached
    module.switch("bee")
    assert torch.equal(
        module.model.state_dict()["hidden.weight"], other.state_dict("bee")["hidden.weight"]
    )
    module.reuse(bundle)
    module.switch("bee")
    bundle.remove("bee")
    fusionkit.add_tasks(bundle, {"bee": finetuned["cat"]}, keep_shared=True)
    module.switch("bee")
    assert module.model.state_dict()["head.bias"].shape == finetuned["cat"]["head.bias"].shape
    wanted = bundle.state_dict("bee")
    check_same(state_of(module), {n: wanted[n] for n in module.model.state_dict()})


def test_another_dtype_forgets(base: TinyNet, bundle: Bundle) -> None:
    module = ReuseModule(base, bundle=bundle, cache_bytes=10 * one_task(bundle))
    module.switch("bee")
    module.half()
    module.switch("bee")
    wanted = bundle.state_dict("bee")["hidden.weight"].half()
    assert torch.equal(weight(module), wanted)


def test_a_calibrations_own_weights_are_not_mixed_up(
    base: TinyNet, finetuned: States, bundle: Bundle
) -> None:
    """`place` puts fine-tuned weights where the bundle's were kept under the same name."""
    module = ReuseModule(
        base,
        bundle=bundle,
        finetuned=dict(finetuned),
        private=PRIVATE,
        cache_bytes=10**9,  # type: ignore[arg-type]
    )
    module.switch("bee")
    module.place("bee", module.family(), deltas=True)
    assert torch.equal(
        module.model.state_dict()["hidden.weight"], finetuned["bee"]["hidden.weight"]
    )
    module.switch("bee")
    wanted = bundle.state_dict("bee")["hidden.weight"]
    assert torch.equal(weight(module), wanted)
