"""Adding tasks to a bundle: what it gives, what it leaves alone, what it refuses."""

from pathlib import Path

import pytest
import torch
from checks import check_same, contents
from safetensors.torch import save_file
from tiny_net import TASKS, Files, TinyNet
from torch import Tensor, nn

from fusionkit import EMR, SVD, Bundle, Dense, MagnitudePrune, Mean, Merged, add_tasks
from fusionkit.bundles.compress import compress
from fusionkit.codecs.base import DeltaCodec
from fusionkit.errors import BundleError, FamilyError

PRIVATE = ["head.*"]
States = dict[str, dict[str, Tensor]]


@pytest.mark.parametrize("codec", [Dense(), MagnitudePrune(0.3), SVD(rank=1)], ids=repr)
def test_adding_gives_what_compressing_all_would(
    files: Files, tmp_path: Path, codec: DeltaCodec
) -> None:
    everything = compress(files.base, files.finetuned, codec, tmp_path / "all", private=PRIVATE)
    two = {task: files.finetuned[task] for task in TASKS[:2]}
    bundle = compress(files.base, two, codec, tmp_path / "b", private=PRIVATE)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "b").glob("task-*")}
    add_tasks(bundle, {"cat": files.finetuned["cat"]})
    assert bundle.tasks == TASKS
    assert contents(tmp_path / "b") == contents(tmp_path / "all")
    for path, (data, mtime) in before.items():
        assert path.read_bytes() == data
        assert path.stat().st_mtime_ns == mtime
    for task in TASKS:
        check_same(bundle.state_dict(task), everything.state_dict(task))
        check_same(Bundle(tmp_path / "b").state_dict(task), bundle.state_dict(task))


SHARING = [EMR(dtype="fp32"), Merged(Mean()), MagnitudePrune(1.0, merge=Mean(), dtype="fp32")]


@pytest.mark.parametrize("codec", SHARING, ids=repr)
def test_adding_to_a_shared_vector_must_be_asked_for(
    base: TinyNet, finetuned: States, tmp_path: Path, codec: DeltaCodec
) -> None:
    two = {task: finetuned[task] for task in TASKS[:2]}
    bundle = compress(base, two, codec, tmp_path / "b", private=PRIVATE)
    before = contents(tmp_path / "b")
    decoded = {task: bundle.state_dict(task) for task in two}
    with pytest.raises(BundleError, match=r"b: its tasks share a vector .* or set keep_shared"):
        add_tasks(bundle, {"cat": finetuned["cat"]})
    assert contents(tmp_path / "b") == before
    add_tasks(bundle, {"cat": finetuned["cat"]}, keep_shared=True)
    for name, data in before.items():
        assert name == "manifest.json" or (tmp_path / "b" / name).read_bytes() == data
    for task in two:
        check_same(bundle.state_dict(task), decoded[task])
    found = Bundle(tmp_path / "b", base).state_dict("cat")
    check_same(found, bundle.state_dict("cat"))
    start = base.state_dict()
    for name in ("embed.weight", "hidden.weight", "conv.bias"):
        delta, wanted = found[name] - start[name], finetuned["cat"][name] - start[name]
        shared = bundle.shared_parts(name)
        if isinstance(codec, EMR):  # the mask of its own signs on the stored vector, rescaled
            unified = shared["elected"].view(delta.shape)
            mask = wanted * unified > 0
            ratio = (delta / unified)[mask]
            assert torch.equal(delta != 0, mask)
            torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=0)
        elif isinstance(codec, Merged):
            torch.testing.assert_close(found[name], decoded["ant"][name])
        else:
            torch.testing.assert_close(delta, wanted, rtol=0, atol=1e-6)


def test_a_vector_that_was_zero_is_shared_all_the_same(tmp_path: Path) -> None:
    """Two opposite tasks: nothing is stored for their mean, and a third was not part of it."""
    base, up = {"w": torch.zeros(4)}, torch.ones(4)
    for codec in (Merged(Mean()), MagnitudePrune(0.5, merge=Mean()), EMR()):
        tuned = {"a": {"w": up}, "b": {"w": -up}}
        if isinstance(codec, EMR):
            tuned = {"a": base}
        bundle = compress(base, tuned, codec, tmp_path / codec.id)
        before = contents(tmp_path / codec.id)
        assert "shared.safetensors" not in before
        with pytest.raises(BundleError, match="share a vector"):
            add_tasks(bundle, {"c": {"w": 3 * up}})
        assert contents(tmp_path / codec.id) == before
        add_tasks(bundle, {"c": {"w": 3 * up}}, keep_shared=True)
        found = bundle.state_dict("c")["w"]
        assert found.count_nonzero() == (2 if isinstance(codec, MagnitudePrune) else 0)


def test_adding_checks_names_and_checkpoints(
    base: TinyNet, finetuned: States, tmp_path: Path
) -> None:
    bundle = compress(base, {"ant": finetuned["ant"]}, Dense(), tmp_path / "b", private=PRIVATE)
    before = contents(tmp_path / "b")
    with pytest.raises(BundleError, match=r"b: has task 'ant' already; remove it first"):
        add_tasks(bundle, {"ant": finetuned["ant"]})
    finetuned["bee"].pop("conv.bias")
    with pytest.raises(FamilyError, match=r"\(task 'bee'\): misses tensor 'conv.bias'"):
        add_tasks(bundle, {"bee": finetuned["bee"]})
    finetuned["cat"]["conv.bias"][0] = torch.nan
    with pytest.raises(FamilyError, match=r"'conv.bias' holds 1 values that are NaN"):
        add_tasks(bundle, {"cat": finetuned["cat"]})
    assert contents(tmp_path / "b") == before


class Scaled(nn.Module):
    """A buffer of a name that no pattern knows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("offset", torch.randn(3))


def test_the_bundle_knows_which_tensors_are_buffers(tmp_path: Path) -> None:
    """A module says which are; its file, from which a task is added later, does not."""
    module, tuned = Scaled(), Scaled().state_dict()
    save_file(module.state_dict(), tmp_path / "base.safetensors")
    compress(module, {"a": tuned}, Dense(), tmp_path / "b")
    bundle = Bundle(tmp_path / "b", tmp_path / "base.safetensors")
    add_tasks(bundle, {"b": tuned})
    assert torch.equal(bundle.state_dict("a")["offset"], tuned["offset"])
    check_same(bundle.state_dict("b"), bundle.state_dict("a"))
