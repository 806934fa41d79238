"""Private and frozen tensors are found by looking at headers and values."""

import pytest
import torch
from torch import Tensor

from fusionkit.errors import FamilyError
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.found_roles import FoundRoles, find_roles


def base() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"body.a": (6, 4), "body.b": (4,), "body.deep.c": (5, 3), "head.w": (3, 4)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def tuned(changes: dict[str, Tensor | None]) -> dict[str, Tensor]:
    state = {name: tensor + 1 for name, tensor in base().items()} | changes
    return {name: tensor for name, tensor in state.items() if tensor is not None}


def test_one_task_is_enough_for_a_tensor_to_be_private() -> None:
    other = torch.zeros(7, 4)
    found = find_roles(base(), {"x": tuned({}), "y": tuned({"head.w": other, "more.z": other + 1})})
    assert found.reshaped == ("head.*",)
    assert found.lacked == ("more.*",)
    family = Family(base(), {"x": tuned({}), "y": tuned({"head.w": other})}, ["head.*"])
    assert family.private == {"x": ["head.w"], "y": ["head.w"]}


def test_all_tasks_are_needed_for_a_tensor_to_be_frozen() -> None:
    same = {"body.b": base()["body.b"], "body.deep.c": base()["body.deep.c"]}
    one = tuned({**same})
    assert find_roles(base(), {"x": one, "y": one}).equal == ("body.b", "body.deep.*")
    assert find_roles(base(), {"x": one, "y": tuned({})}).equal == ()


def test_a_single_entry_counts() -> None:
    nearly = base()["body.a"].clone()
    nearly[-1, -1] += 1e-6
    assert find_roles(base(), {"x": tuned({"body.a": nearly})}).frozen == []


def test_rounded_to_the_dtype_that_it_has() -> None:
    half = tuned({"body.a": base()["body.a"].half()})
    assert find_roles(base(), {"x": half}).equal == ("body.a",)
    assert find_roles(base(), {"x": half}, rounded=False).equal == ()


def test_what_some_lack_and_none_changed_is_frozen() -> None:
    same = tuned({"body.a": base()["body.a"]})
    assert find_roles(base(), {"x": tuned({"body.a": None}), "y": same}).frozen == ["body.a"]
    lacking = {"x": tuned({"body.a": None}), "y": tuned({})}
    assert find_roles(base(), lacking).frozen == []
    with pytest.raises(FamilyError, match=r"misses tensor 'body\.a'"):
        Family(base(), lacking)


def test_what_is_declared_is_left_to_who_declared_it() -> None:
    family = {"x": tuned({"head.w": torch.zeros(9, 4)})}
    assert find_roles(base(), family, private=["head.w"]) == FoundRoles()
    with pytest.raises(FamilyError, match="match no tensor"):
        find_roles(base(), family, private=["hed.w"])


def test_names_with_the_marks_of_patterns() -> None:
    """As those of experts in a list have."""
    odd = {"w[0]": torch.ones(3), "w0": torch.zeros(3)}
    changed = {"w[0]": odd["w[0]"], "w0": odd["w0"] + 1}
    found = find_roles(odd, {"x": changed})
    assert found.frozen == ["w[[]0]"]
    assert Family(odd, {"x": changed}, frozen=found.frozen).names("frozen") == ["w[0]"]


def test_of_another_model_nothing_is_found() -> None:
    other = {f"layer.{i}": torch.ones(2) for i in range(9)}
    assert find_roles(base(), {"x": other}) == FoundRoles()
    reshaped = {name: torch.zeros(2, 2, 2) for name in base()}
    assert find_roles(base(), {"x": reshaped}) == FoundRoles()
