"""Compressing: round trips through disk, exactness, dtypes, sizes, names, determinism."""

from pathlib import Path

import pytest
import torch
from checks import check_same, contents
from tiny_net import TASKS, Files, TinyNet
from torch import Tensor

from fusionkit import (
    EMR,
    SVD,
    TIES,
    Bundle,
    Checkpoint,
    Dense,
    Elect,
    MagnitudePrune,
    Merged,
    TaskArithmetic,
)
from fusionkit.bundles.compress import compress
from fusionkit.codecs.base import DeltaCodec

PRIVATE = ["head.*"]
BUFFERS = ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")
CODECS: list[DeltaCodec] = [
    Dense(),
    Dense("fp32"),
    Dense("int4"),
    EMR(),
    EMR("l2", "tensor", "fp32"),
    Merged(),
    Merged(TIES(0.3), "bf16"),
    MagnitudePrune(0.1),
    MagnitudePrune(0.2, "tensor", TaskArithmetic(), "int8"),
    MagnitudePrune(0.2, merge=Elect(), dtype="fp32"),
    SVD(rank=1),
    SVD(energy=0.8, vectors="drop", dtype="int4"),
]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=repr)
States = dict[str, dict[str, Tensor]]


# --- what comes back --------------------------------------------------------------------------


@every_codec
def test_the_opened_bundle_decodes_to_the_same_bits(
    base: TinyNet, finetuned: States, tmp_path: Path, codec: DeltaCodec
) -> None:
    made = compress(base, finetuned, codec, private=PRIVATE)
    made.save(tmp_path / "b")
    opened = Bundle.load(tmp_path / "b", base)
    assert opened.codec == codec
    assert opened.tasks == TASKS
    for task in TASKS:
        found = opened.state_dict(task)
        check_same(found, made.state_dict(task))
        check_same(found, opened.state_dict(task))  # twice: nothing wrote to the payload


@every_codec
def test_what_is_not_compressed_comes_back_exactly(
    base: TinyNet, finetuned: States, codec: DeltaCodec
) -> None:
    for state in finetuned.values():
        state["conv.weight"] = base.state_dict()["conv.weight"]
    bundle = compress(base, finetuned, codec, private=PRIVATE, frozen=["conv.weight"])
    for task, state in finetuned.items():
        found = bundle.state_dict(task)
        assert found.keys() == state.keys()
        for name in ("head.weight", "head.bias", "conv.weight", *BUFFERS):
            assert found[name].dtype == state[name].dtype
            assert torch.equal(found[name], state[name]), name
        assert found["embed.weight"] is found["decoder.weight"]
        TinyNet(len(found["head.bias"])).load_state_dict(found)


def test_integer_tensors_come_back_exactly() -> None:
    base = {"w": torch.zeros(3), "ids": torch.arange(4), "on": torch.tensor([True, False])}
    tuned = {"w": torch.ones(3), "ids": torch.tensor([2**60, -1, 0, 7]), "on": ~base["on"]}
    same = {**base, "w": torch.ones(3)}
    bundle = compress(base, {"own": tuned, "same": same}, Dense("fp32"))
    check_same(bundle.state_dict("own"), tuned)
    check_same(bundle.state_dict("same"), same)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tuned_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mixed_dtypes(base_dtype: torch.dtype, tuned_dtype: torch.dtype) -> None:
    """Deltas are formed in float32; weights come back in the base's dtype, rounded once."""
    base = {"w": torch.randn(40, 30).to(base_dtype)}
    tuned = {"w": (base["w"].float() + 0.01 * torch.randn(40, 30)).to(tuned_dtype)}
    bundle = compress(base, {"t": tuned}, Dense("fp32"))
    exact = tuned["w"].float() - base["w"].float()
    delta = bundle.delta("t", "w")
    assert delta is not None
    assert torch.equal(delta, exact)
    wanted = base["w"].float() + exact
    assert torch.equal(bundle.state_dict("t")["w"], wanted.to(base_dtype))
    assert bundle.state_dict("t")["w"].dtype == base_dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = bundle.state_dict("t", dtype)["w"]
        assert found.dtype == dtype
        assert torch.equal(found, wanted.to(dtype))


def test_dtype_is_of_floating_point_tensors_only(base: TinyNet, finetuned: States) -> None:
    bundle = compress(base, finetuned, Dense(), private=PRIVATE, frozen=[])
    found = bundle.state_dict("ant", torch.bfloat16)
    assert found["norm.num_batches_tracked"].dtype == torch.int64
    floats = {t.dtype for name, t in found.items() if "num_batches" not in name}
    assert floats == {torch.bfloat16}


def test_base_and_tasks_from_paths_modules_and_mappings(
    base: TinyNet, finetuned: States, files: Files, tmp_path: Path
) -> None:
    torch.save(base.state_dict(), tmp_path / "base.pt")
    sources = [
        (base, finetuned),
        (base.state_dict(), finetuned),
        (tmp_path / "base.pt", finetuned),
        (str(files.base), files.finetuned),
        (Checkpoint.of(files.base), {task: str(path) for task, path in files.finetuned.items()}),
    ]
    wanted = compress(*sources[0], EMR(), private=PRIVATE)
    for source, tuned in sources[1:]:
        found = compress(source, tuned, EMR(), private=PRIVATE)
        for task in TASKS:
            ours, theirs = wanted.state_dict(task), found.state_dict(task)
            assert ours.keys() - theirs.keys() <= {"decoder.weight"}  # a file holds it once
            check_same(theirs, {name: ours[name] for name in theirs})


def test_the_caller_owns_the_state_dict(base: TinyNet, finetuned: States) -> None:
    """Training on it changes neither the bundle nor the base."""
    for state in finetuned.values():
        state["hidden.bias"] = base.state_dict()["hidden.bias"]
    bundle = compress(base, finetuned, Dense("fp32"), private=PRIVATE, frozen=["hidden.bias"])
    first = bundle.state_dict("ant")
    wanted = {name: tensor.clone() for name, tensor in first.items()}
    for tensor in first.values():
        tensor.zero_()
    check_same(bundle.state_dict("ant"), wanted)


def test_no_parameter_to_compress(base: TinyNet, finetuned: States) -> None:
    for codec in (EMR(), MagnitudePrune(merge=TIES()), SVD(rank=1)):
        bundle = compress(base, finetuned, codec, private=["*"])
        check_same(bundle.state_dict("bee"), finetuned["bee"])


# --- sizes, names and bytes -------------------------------------------------------------------


@every_codec
def test_nbytes_are_the_bytes_on_disk(
    base: TinyNet, finetuned: States, tmp_path: Path, codec: DeltaCodec
) -> None:
    bundle = compress(base, finetuned, codec, tmp_path / "b", private=PRIVATE)
    files = contents(tmp_path / "b")
    assert bundle.nbytes == sum(map(len, files.values()))
    whole = sum(finetuned[t][n].nbytes for t in TASKS for n in ("head.weight", "head.bias"))
    whole += sum(finetuned[t][n].nbytes for t in TASKS for n in BUFFERS)
    parameters = sum(p.numel() for n, p in base.named_parameters() if not n.startswith("head"))
    wanted = 8 * (bundle.nbytes - whole) / (3 * parameters)
    assert bundle.bits_per_parameter == pytest.approx(wanted)


@every_codec
def test_the_same_input_gives_the_same_bytes(
    files: Files, tmp_path: Path, codec: DeltaCodec
) -> None:
    for name in "ab":
        torch.manual_seed(ord(name))
        compress(files.base, files.finetuned, codec, tmp_path / name, private=PRIVATE)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


NAMES = ["a/b", "../../up", "..", ".", ".hidden", " a b ", "naïve ∆ 猫", "a%2Fb", "CON", "", "\0\n"]


def test_task_names_are_never_paths(tmp_path: Path) -> None:
    base = {"w": torch.zeros(4)}
    finetuned = {name: {"w": torch.full((4,), i + 1.0)} for i, name in enumerate(NAMES)}
    compress(base, finetuned, Dense(), tmp_path / "deep" / "b")
    bundle = Bundle.load(tmp_path / "deep" / "b", base)
    assert bundle.tasks == tuple(NAMES)
    assert {path.name for path in tmp_path.iterdir()} == {"deep"}
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"b"}
    assert len(list((tmp_path / "deep" / "b").iterdir())) == len(NAMES) + 1
    for name in NAMES:
        assert torch.equal(bundle.state_dict(name)["w"], finetuned[name]["w"])
        if len(bundle.tasks) > 1:
            bundle.remove(name)
    assert len(contents(tmp_path / "deep" / "b")) == 2
