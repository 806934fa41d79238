"""Families: roles, task vectors, and every way in which checkpoints don't fit together."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_net import TASKS, Files, TinyNet
from torch import Tensor, nn

from fusionkit import Checkpoint, Family
from fusionkit.errors import FamilyError
from fusionkit.task_vectors.task_source import write_weights

PRIVATE = ["head.*"]
DELTAS = [
    *("embed.weight", "conv.weight", "conv.bias", "norm.weight", "norm.bias"),
    *("hidden.weight", "hidden.bias"),
]
EXACT = ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]

State = dict[str, Tensor]
States = dict[str, State]


@pytest.fixture
def family(base: TinyNet, finetuned: States) -> Family:
    return Family(base, finetuned, private=PRIVATE)


def refused(*said: str, **options: object) -> None:
    """Check that a family is refused, with all of this in the message, in this order."""
    with pytest.raises(FamilyError, match="(?s)" + ".*".join(map(re.escape, said))):
        Family(**options)  # type: ignore[arg-type]


# --- roles ------------------------------------------------------------------------------------


def test_roles_of_a_module(family: Family) -> None:
    assert family.tasks == TASKS
    assert family.names("delta") == DELTAS
    assert family.names("exact") == EXACT
    assert family.names("frozen") == []
    assert family.private == {task: ["head.bias", "head.weight"] for task in TASKS}
    assert family.tied == {"decoder.weight": "embed.weight"}
    assert len(family) == len(DELTAS)


def test_batch_norm_is_known_by_name_where_the_base_is_a_file(files: Files) -> None:
    family = Family(files.base, files.finetuned, private=PRIVATE)
    assert set(family.names("exact")) == set(EXACT)
    assert set(family.names("delta")) == set(DELTAS)


def test_other_buffers_are_exact_in_a_module_and_deltas_in_a_file() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("scale", torch.ones(2))
    state = {name: tensor + 1 for name, tensor in module.state_dict().items()}
    assert Family(module, {"a": state}).names("exact") == ["scale"]
    assert "scale" in Family(dict(module.state_dict()), {"a": state}).names("delta")


def test_integers_are_exact() -> None:
    base = {"w": torch.ones(2), "ids": torch.arange(3), "on": torch.tensor([True])}
    tuned = {"w": torch.ones(2), "ids": torch.arange(3) + 1, "on": torch.tensor([True])}
    family = Family(base, {"a": tuned})
    assert family.names("exact") == ["ids", "on"]
    assert [(n, t.tolist()) for n, t in family.exact("a")] == [("ids", [1, 2, 3])]


def test_exact_yields_what_differs_in_its_own_dtype(base: TinyNet, finetuned: States) -> None:
    finetuned["ant"]["norm.running_mean"] = base.norm.running_mean.clone()
    finetuned["bee"]["norm.running_var"] = base.norm.running_var.half()
    family = Family(base, finetuned, private=PRIVATE)
    assert [name for name, _ in family.exact("ant")] == EXACT[1:]
    assert dict(family.exact("bee"))["norm.running_var"].dtype == torch.float16
    for name, tensor in family.exact("cat"):
        assert torch.equal(tensor, finetuned["cat"][name])
    assert [name for name, _ in family.exact("cat")] == EXACT


def test_parameters_count_each_compressed_weight_once(family: Family, base: TinyNet) -> None:
    sizes = {name: p.numel() for name, p in base.named_parameters()}  # tied ones once
    assert family.parameters == sum(n for name, n in sizes.items() if not name.startswith("head"))


def test_bits_per_parameter_follow_the_checkpoints_dtypes() -> None:
    base = {"w": torch.ones(30), "v": torch.ones(10), "ids": torch.arange(9)}
    half = {"w": torch.ones(30).half(), "v": torch.ones(10), "ids": torch.arange(9)}
    assert Family(base, {"a": base}).bits_per_parameter == 32
    assert Family(base, {"a": half}).bits_per_parameter == (30 * 16 + 10 * 32) / 40
    assert Family(base, {"a": half, "b": base}).bits_per_parameter == (30 * 24 + 10 * 32) / 40


def test_private_tensors_come_whole_and_may_be_unknown_to_the_base(
    base: TinyNet, finetuned: States
) -> None:
    finetuned["bee"]["head.extra"] = torch.arange(3)
    family = Family(base, finetuned, private=PRIVATE)
    tensors = dict(family.private_tensors("bee"))
    assert sorted(tensors) == ["head.bias", "head.extra", "head.weight"]
    assert all(torch.equal(tensors[name], finetuned["bee"][name]) for name in tensors)
    assert "head.extra" not in dict(family.private_tensors("ant"))


def test_private_tensors_that_the_base_has_are_not_optional(
    base: TinyNet, finetuned: States
) -> None:
    del finetuned["bee"]["head.bias"]
    refused("task 'bee'", "misses the private tensor 'head.bias'", base=base, finetuned=finetuned,
            private=PRIVATE)  # fmt: skip


# --- task vectors -----------------------------------------------------------------------------


def test_task_vectors_are_the_differences(base: TinyNet, finetuned: States, family: Family) -> None:
    for vectors in family:
        assert vectors.tasks == TASKS
        assert len(vectors) == len(TASKS)
        for t, task in enumerate(TASKS):
            wanted = finetuned[task][vectors.name] - base.state_dict()[vectors.name]
            assert vectors.shape == wanted.shape
            assert torch.equal(vectors[t], wanted)
            assert torch.equal(vectors.stack()[t], wanted)


@pytest.mark.parametrize("size", [1, 5, 7, 64, 65, 66, 1000])
def test_blocks_are_the_stack_in_pieces(family: Family, size: int) -> None:
    for vectors in family:
        stack = vectors.stack().reshape(len(TASKS), -1)
        start = 0
        for place, block in vectors.blocks(size):
            assert place.start == start
            assert 0 < block.shape[1] <= size
            assert torch.equal(block, stack[:, place])
            start = place.stop
        assert start == stack.shape[1]


@pytest.mark.parametrize("shape", [(), (0, 3)])
def test_scalars_and_empty_tensors(shape: tuple[int, ...]) -> None:
    vectors = Family({"w": torch.zeros(shape)}, {"a": {"w": torch.ones(shape)}}).vectors("w")
    assert torch.equal(vectors[0], torch.ones(shape))
    assert torch.equal(vectors.stack(), torch.ones(1, *shape))
    assert sum(block.numel() for _, block in vectors.blocks()) == torch.ones(shape).numel()


def test_iterating_twice_gives_the_same(family: Family) -> None:
    first = [(v.name, v.stack()) for v in family]
    second = [(v.name, v.stack()) for v in family]
    assert [name for name, _ in first] == [name for name, _ in second] == DELTAS
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_deltas_are_formed_in_float32(dtype: torch.dtype) -> None:
    base, tuned = torch.full((3,), 100.0, dtype=dtype), torch.full((3,), 1e-3, dtype=dtype)
    wanted = tuned.to(torch.float32) - base.to(torch.float32)
    for other in (dtype, torch.float32):  # dtypes may be mixed
        vectors = Family({"w": base}, {"a": {"w": tuned.to(other)}}).vectors("w")
        assert vectors[0].dtype == torch.float32
        assert torch.equal(vectors[0], wanted)
        assert torch.equal(next(vectors.blocks(2))[1][0], wanted[:2])
    assert not torch.equal((tuned - base).to(torch.float32), wanted) or dtype == torch.float64


def test_task_vectors_don_t_change_the_models(base: TinyNet, finetuned: States) -> None:
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    tuned = {name: tensor.clone() for name, tensor in finetuned["ant"].items()}
    for vectors in Family(base, finetuned, private=PRIVATE):
        vectors[0].zero_()
        vectors.stack().zero_()
        for _, block in vectors.blocks():
            block.zero_()
    assert all(torch.equal(before[n], t) for n, t in base.state_dict().items())
    assert all(torch.equal(tuned[n], t) for n, t in finetuned["ant"].items())


# --- NaN and infinities -----------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 199])
def test_values_that_are_not_finite_are_named(tmp_path: Path, value: float, place: int) -> None:
    base, good, bad = (tmp_path / f"{name}.safetensors" for name in ("base", "good", "bad"))
    weight = torch.randn(200)
    save_file({"w": weight}, base)
    save_file({"w": weight + 1}, good)
    weight[place] = value
    save_file({"w": weight}, bad)
    vectors = Family(base, {"fine": good, "broken": bad}).vectors("w")
    said = rf"{bad}: tensor 'w' holds 1 values that are NaN or infinite \(task 'broken'\), "
    assert torch.isfinite(vectors[0]).all()
    with pytest.raises(FamilyError, match=said):
        vectors[1]
    with pytest.raises(FamilyError, match=said):
        vectors.stack()
    with pytest.raises(FamilyError, match=said):
        list(vectors.blocks(64))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_base_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    base = tmp_path / "base.safetensors"
    save_file({"w": torch.tensor([1.0, value])}, base)
    vectors = Family(base, {"a": {"w": torch.ones(2)}}).vectors("w")
    for read in (lambda: vectors[0], lambda: list(vectors.blocks())):
        with pytest.raises(FamilyError, match=rf"{base} \(the base\): tensor 'w' holds 1"):
            read()


def test_infinities_of_both_signs_are_not_lost_in_a_sum() -> None:
    tuned = {"w": torch.tensor([torch.inf, -torch.inf, 0.0])}
    vectors = Family({"w": torch.zeros(3)}, {"a": tuned}).vectors("w")
    with pytest.raises(FamilyError, match="'w' holds 2 values"):
        list(vectors.blocks())


def test_finite_values_whose_sum_overflows_are_accepted() -> None:
    large = torch.full((10,), 3e38)
    with pytest.raises(FamilyError, match=r"'w' differs .* up to 3e\+38, which is more than"):
        Family({"w": torch.zeros(10)}, {"a": {"w": large}}).vectors("w")[0]
    large = torch.full((10,), 1.2e33)
    vectors = Family({"w": torch.zeros(10)}, {"a": {"w": large}, "b": {"w": large}}).vectors("w")
    assert torch.equal(vectors[0], large)
    assert torch.equal(next(vectors.blocks())[1], torch.stack([large, large]))


# --- tied weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["embed.weight", "decoder.weight"])
def test_tied_weights_are_found_under_either_name(
    base: TinyNet, finetuned: States, kept: str
) -> None:
    dropped = {"embed.weight": "decoder.weight", "decoder.weight": "embed.weight"}[kept]
    wanted = finetuned["ant"].pop(dropped) - base.embed.weight.detach()
    family = Family(base, finetuned, private=PRIVATE)
    assert torch.equal(family.vectors("embed.weight")[0], wanted)
    assert family.names("delta") == DELTAS
    assert family.bits_per_parameter == 32


def test_tied_weights_saved_twice_but_equal_are_accepted(base: TinyNet, finetuned: States) -> None:
    finetuned["ant"]["decoder.weight"] = finetuned["ant"]["decoder.weight"].clone()
    assert Family(base, finetuned, private=PRIVATE).names("delta") == DELTAS


@pytest.mark.parametrize("change", ["values", "dtype"])
def test_weights_tied_in_the_base_alone_are_two(
    base: TinyNet, finetuned: States, change: str
) -> None:
    """One task holds them apart: each then has a vector of its own, in every task."""
    weight = finetuned["bee"]["embed.weight"]
    finetuned["bee"]["decoder.weight"] = weight + 1 if change == "values" else weight.half()
    del finetuned["ant"]["decoder.weight"]  # which has them as one
    family = Family(base, finetuned, private=PRIVATE)
    assert family.tied == {}
    start = base.embed.weight.detach()
    for task, vector in zip(family.tasks, family.vectors("decoder.weight"), strict=True):
        own = finetuned[task].get("decoder.weight", finetuned[task]["embed.weight"])
        assert torch.equal(vector, own.float() - start)


@pytest.mark.parametrize("own", ["embed.*", "decoder.*"])
def test_a_private_tensor_unties_the_weight_that_shares_it(
    base: TinyNet, finetuned: States, own: str
) -> None:
    other = "decoder.weight" if own == "embed.*" else "embed.weight"
    family = Family(base, finetuned, private=[*PRIVATE, own])
    assert family.tied == {}
    assert other in family.names("delta")
    wanted = finetuned["ant"][other] - base.embed.weight.detach()
    assert torch.equal(family.vectors(other)[0], wanted)


# --- frozen -----------------------------------------------------------------------------------


def test_frozen_tensors_may_be_absent_and_cost_nothing(base: TinyNet, finetuned: States) -> None:
    for state in finetuned.values():
        state["conv.bias"] = base.conv.bias.detach().clone()
        del state["conv.weight"]
    family = Family(base, finetuned, private=PRIVATE, frozen=["conv.*"])
    assert family.names("frozen") == ["conv.weight", "conv.bias"]
    assert "conv.weight" not in [vectors.name for vectors in family]
    family.check_frozen()


def test_frozen_tensors_that_differ_are_named(files: Files) -> None:
    family = Family(files.base, files.finetuned, private=PRIVATE, frozen=["conv.bias", "hidden.*"])
    with pytest.raises(FamilyError, match="declared frozen but differ from the base") as caught:
        family.check_frozen()
    for task, path in files.finetuned.items():
        for name in ("conv.bias", "hidden.weight", "hidden.bias"):
            if task != "cat":  # the message stops after eight findings
                assert f"{path}: '{name}' (task '{task}')" in str(caught.value)
    assert "and 1 more" in str(caught.value)
    assert "take them out of `frozen`" in str(caught.value)


def test_frozen_tensors_in_lower_precision_are_compared_in_it() -> None:
    weight = torch.randn(20)
    tuned = {"w": weight.half(), "v": torch.ones(1)}
    Family({"w": weight, "v": torch.ones(1)}, {"a": tuned}, frozen=["w"]).check_frozen()


# --- what does not fit ------------------------------------------------------------------------


def test_every_finding_is_listed_with_its_file_and_tensor(tmp_path: Path, files: Files) -> None:
    state = load_file(files.finetuned["ant"])
    del state["conv.bias"]
    state["surplus"] = torch.ones(1)
    state["hidden.bias"] = torch.ones(7)
    state["conv.weight"] = state["conv.weight"].to(torch.int32)
    save_file(state, files.finetuned["ant"])
    state = load_file(files.finetuned["cat"])
    state["embed.weight"] = torch.ones(12, 6)
    save_file(state, files.finetuned["cat"])
    with pytest.raises(FamilyError, match=f"don't fit the base {files.base}") as caught:
        Family(files.base, files.finetuned, private=PRIVATE)
    ant, cat = (f"{files.finetuned[task]} (task '{task}')" for task in ("ant", "cat"))
    for finding in (
        f"{ant}: misses tensor 'conv.bias' (other tasks have it",
        f"{ant}: has tensor 'surplus', which the base lacks (declare it private if",
        f"{ant}: tensor 'hidden.bias' has shape [7], the base's has [6] (declare it private",
        f"{ant}: tensor 'conv.weight' is torch.int32, the base's is torch.float32",
        f"{cat}: tensor 'embed.weight' has shape [12, 6], the base's has [11, 6]",
    ):
        assert finding in str(caught.value)
    assert str(caught.value).count("\n  - ") == 5
    assert "task 'bee'" not in str(caught.value)


def test_heads_of_other_shapes_are_named_where_they_are_not_private(
    base: TinyNet, finetuned: States
) -> None:
    refused("task 'ant'", "'head.weight' has shape [2, 11], the base's has [3, 11]",
            "declare it private", base=base, finetuned=finetuned)  # fmt: skip


def test_an_idle_pattern_is_refused(files: Files) -> None:
    options = {"base": files.base, "finetuned": files.finetuned}
    refused(
        "match no tensor", str(files.base), "private pattern 'haed.*'", "frozen pattern 'conf.*'",
        "the names begin like 'conv.bias'",
        **options, private=["haed.*", *PRIVATE], frozen=["conf.*"],
    )  # fmt: skip


def test_patterns_care_for_case(base: TinyNet, finetuned: States) -> None:
    refused("private pattern 'HEAD.*'", base=base, finetuned=finetuned, private=["HEAD.*"])


def test_a_tensor_cannot_be_both_private_and_frozen(base: TinyNet, finetuned: States) -> None:
    refused("both private and frozen", "head.weight", base=base, finetuned=finetuned,
            private=PRIVATE, frozen=["*.weight"])  # fmt: skip


def test_a_base_alone_is_no_family(base: TinyNet) -> None:
    refused("expected at least one fine-tuned checkpoint", base=base, finetuned={})


def test_files_and_models_give_the_same_vectors(
    files: Files, base: TinyNet, finetuned: States
) -> None:
    from_files = Family(files.base, files.finetuned, private=PRIVATE)
    from_models = Family(base, finetuned, private=PRIVATE)
    for vectors in from_models:
        assert torch.equal(from_files.vectors(vectors.name).stack(), vectors.stack())


def test_a_task_is_written_into_a_model_to_the_bit(base: TinyNet, finetuned: States) -> None:
    family = Family(base, finetuned, private=PRIVATE)
    model = TinyNet()
    out = dict(model.state_dict())
    head = model.head.weight.detach().clone()
    write_weights(family, "bee", Checkpoint.of(base), out)
    for name in (*DELTAS, *EXACT):
        assert torch.equal(model.state_dict()[name], finetuned["bee"][name])
    assert torch.equal(model.head.weight, head)


def test_changes_come_one_after_another_however_the_vectors_are_read() -> None:
    def double(values: Tensor, place: slice) -> None:
        values.mul_(2)

    def count(values: Tensor, place: slice) -> None:
        values.add_(torch.arange(place.start, place.stop))

    base, tuned = {"w": torch.zeros(4, 300)}, {"w": torch.randn(4, 300)}
    family = Family(base, {"a": tuned, "b": tuned})
    vectors = family.changed(lambda _: [double, None]).changed(lambda _: [count, None]).vectors("w")
    wanted = torch.stack([2 * tuned["w"] + torch.arange(1200.0).view(4, 300), tuned["w"]])
    assert torch.equal(vectors.stack(), wanted)
    blocks = torch.cat([block.clone() for _, block in vectors.blocks(7)], 1)
    assert torch.equal(blocks.view_as(wanted), wanted)
    assert torch.equal(vectors.sample(1200), wanted.view(2, -1))
    [(_, block)] = vectors.blocks(tasks=[1])
    assert torch.equal(block.view(4, 300), wanted[1])
    assert torch.equal(vectors.tuned(0), tuned["w"])  # what was trained, which no change touches
