"""Bundles: what is read when, the base's identity, damage, removing, saving, exporting."""

import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from checks import check_same, contents
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_net import TASKS, Files, TinyNet
from torch import Tensor

from fusionkit import EMR, Bundle, Checkpoint, Dense, MagnitudePrune, Mean
from fusionkit.bundles.compress import compress
from fusionkit.bundles.export_model import export_task
from fusionkit.errors import BundleError, FusionKitError, WrongBaseError

PRIVATE = ["head.*"]
States = dict[str, dict[str, Tensor]]


@pytest.fixture
def folder(base: TinyNet, finetuned: States, tmp_path: Path) -> Path:
    """An EMR bundle."""
    compress(base, finetuned, EMR(), tmp_path / "b", private=PRIVATE)
    return tmp_path / "b"


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


# --- what is read when ------------------------------------------------------------------------


def test_a_task_needs_no_other_tasks_file(folder: Path, base: TinyNet) -> None:
    bundle = Bundle.load(folder, base)
    wanted = bundle.state_dict("ant")
    bundle = Bundle.load(folder, base)
    (folder / "task-bee.safetensors").unlink()
    damaged = folder / "task-cat.safetensors"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    check_same(bundle.state_dict("ant"), wanted)
    with pytest.raises(BundleError, match=r"task-cat\.safetensors: its header is not what"):
        bundle.state_dict("cat")


def test_opening_reads_the_manifest_and_nothing_else(folder: Path, base: TinyNet) -> None:
    for name in ("task-cat.safetensors", "shared.safetensors"):
        flip(folder / name, 20)  # in the header
    bundle = Bundle.load(folder, base)
    assert bundle.tasks == TASKS
    assert bundle.nbytes == sum(map(len, contents(folder).values()))
    with pytest.raises(BundleError, match=r"task-cat\.safetensors: its header is not .*SHA-256"):
        bundle.state_dict("cat")
    with pytest.raises(BundleError, match=r"shared\.safetensors: its header .*copy or compress"):
        bundle.state_dict("ant")


def test_one_tensor_can_be_decoded_alone(folder: Path, base: TinyNet) -> None:
    bundle = Bundle.load(folder, base)
    task = folder / "task-ant.safetensors"
    with safe_open(task, framework="pt") as handle:
        keys = list(handle.keys())
    assert "embed.weight/mask" in keys
    mask = load_file(task)["embed.weight/mask"].numpy().tobytes()
    flip(task, task.read_bytes().index(mask))
    wanted = bundle.state_dict("bee")["hidden.weight"] - base.state_dict()["hidden.weight"]
    found = bundle.delta("bee", "hidden.weight")
    assert found is not None
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert bundle.delta("ant", "hidden.weight") is not None
    with pytest.raises(BundleError, match=r"task-ant\.safetensors: part 'embed\.weight/mask' is"):
        bundle.delta("ant", "embed.weight")


def test_what_it_does_not_hold(folder: Path, base: TinyNet) -> None:
    bundle = Bundle.load(folder, base)
    for ask in (bundle.state_dict, bundle.remove, lambda t: bundle.delta(t, "conv.bias")):
        with pytest.raises(BundleError, match=r"b: has no task 'dog'; it has ant, bee, cat"):
            ask("dog")
    for name in ("nowhere", "head.weight", "norm.running_mean"):
        with pytest.raises(BundleError, match=rf"b: holds no deltas of a tensor '{name}'"):
            bundle.delta("ant", name)


def test_no_bundle(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(BundleError, match=r"not a bundle \(it has no manifest\.json\); make"):
            Bundle.load(path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BundleError, match=r"file/manifest\.json: not readable"):
        Bundle.load(tmp_path / "file")


# --- the base ---------------------------------------------------------------------------------


def test_the_base_is_found_again(files: Files, tmp_path: Path) -> None:
    bundle = compress(files.base, files.finetuned, EMR(), tmp_path / "b", private=PRIVATE)
    check_same(Bundle.load(tmp_path / "b").state_dict("ant"), bundle.state_dict("ant"))
    wanted = bundle.state_dict("ant")
    files.base.rename(tmp_path / "moved.safetensors")
    with pytest.raises(BundleError, match=r"base \(.*base\.safetensors\) can't be opened .*`base`"):
        Bundle.load(tmp_path / "b").state_dict("ant")
    moved = Bundle.load(tmp_path / "b", tmp_path / "moved.safetensors")
    check_same(moved.state_dict("ant"), wanted)


def test_a_base_in_memory_must_be_given(folder: Path) -> None:
    with pytest.raises(BundleError, match=r"\(TinyNet \(module in memory\)\) can't be opened"):
        Bundle.load(folder).state_dict("ant")


def test_a_base_under_another_prefix(files: Files, base: TinyNet, tmp_path: Path) -> None:
    prefixed = tmp_path / "prefixed.safetensors"
    save_file({f"net.{k}": v for k, v in load_file(files.base).items()}, prefixed)
    source = Checkpoint.of(prefixed, strip_prefix="net.")
    bundle = compress(source, files.finetuned, EMR(), tmp_path / "b", private=PRIVATE)
    check_same(Bundle.load(tmp_path / "b").state_dict("bee"), bundle.state_dict("bee"))


WRONG = {
    "value": "'hidden.bias' has other values",
    "dtype": r"'hidden.bias' is float16, not float32 \(load the base as it was",
    "shape": r"'hidden.bias' has shape \[1, 6\], not \[6\]",
    "missing": "'hidden.bias' is missing",
    "buffer": "'norm.running_var' has other values",
}


@pytest.mark.parametrize("fault", WRONG)
def test_another_base_is_refused_by_tensor(folder: Path, base: TinyNet, fault: str) -> None:
    state = dict(base.state_dict())
    bias = state["hidden.bias"]
    if fault == "value":
        state["hidden.bias"] = torch.cat([bias[:-1], torch.nextafter(bias[-1:], bias[:1])])
    elif fault == "dtype":
        state["hidden.bias"] = bias.half()
    elif fault == "shape":
        state["hidden.bias"] = bias[None]
    elif fault == "missing":
        del state["hidden.bias"]
    else:
        state["norm.running_var"] = state["norm.running_var"] + 1
    said = rf"is not the base that this bundle was made from \(TinyNet.*\):\n  - {WRONG[fault]}"
    bundle = Bundle.load(folder, state)
    with pytest.raises(WrongBaseError, match=said):
        bundle.state_dict("ant")
    with pytest.raises(WrongBaseError, match=said):
        Bundle.load(folder).attach_base(Checkpoint.of(state))


def test_a_base_without_a_buffer_can_give_no_whole_model(folder: Path, base: TinyNet) -> None:
    state = dict(base.state_dict())
    del state["norm.running_mean"]
    with pytest.raises(WrongBaseError, match=r"lacks tensors .*:\n  - norm\.running_mean"):
        Bundle.load(folder, state).state_dict("ant")


def test_a_live_base_is_looked_at_each_time(folder: Path, base: TinyNet) -> None:
    bundle = Bundle.load(folder, base)
    bundle.state_dict("ant")
    with torch.no_grad():
        base.hidden.bias[0] += 1
    with pytest.raises(WrongBaseError, match=r"'hidden\.bias' has other values"):
        bundle.state_dict("ant")


def test_a_private_head_is_no_part_of_the_base(folder: Path, base: TinyNet) -> None:
    with torch.no_grad():
        base.head.weight += 1
    assert Bundle.load(folder, base).state_dict("ant")["head.bias"].shape == (2,)


# --- damage -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A bundle that shares a vector and keeps positions, and its base."""
    torch.manual_seed(0)
    base = {"a.weight": torch.randn(20, 7), "a.bias": torch.randn(9), "n": torch.arange(3)}
    tuned = {
        task: {
            **{name: base[name] + torch.randn(base[name].shape) for name in ("a.weight", "a.bias")},
            "n": base["n"] + 1,
            "head": torch.randn(4),
        }
        for task in ("x", "y")
    }
    folder = tmp_path_factory.mktemp("sound") / "b"
    compress(base, tuned, MagnitudePrune(0.2, merge=Mean()), folder, private=["head"])
    return folder, base


@settings(max_examples=250, deadline=None)
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_of_the_manifest(
    sound: tuple[Path, dict[str, Tensor]], place: int, bit: int
) -> None:
    folder, base = sound
    text = (folder / "manifest.json").read_bytes()
    try:
        flip(folder / "manifest.json", place % len(text), bit)
        with pytest.raises(FusionKitError, match=r"manifest\.json: "):
            Bundle.load(folder, base)
    finally:
        (folder / "manifest.json").write_bytes(text)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(0, 10**6))
def test_a_truncated_manifest(sound: tuple[Path, dict[str, Tensor]], length: int) -> None:
    folder, base = sound
    text = (folder / "manifest.json").read_bytes()
    try:
        (folder / "manifest.json").write_bytes(text[: length % (len(text) - 2)])
        with pytest.raises(BundleError, match=r"manifest\.json: not readable as JSON"):
            Bundle.load(folder, base)
    finally:
        (folder / "manifest.json").write_bytes(text)


@pytest.mark.parametrize("name", ["shared.safetensors", "task-x.safetensors"])
def test_truncated_and_missing_payloads(
    sound: tuple[Path, dict[str, Tensor]], tmp_path: Path, name: str
) -> None:
    folder, base = sound
    shutil.copytree(folder, tmp_path / "b")
    path = tmp_path / "b" / name
    data = path.read_bytes()
    for length in (0, 7, 100, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(BundleError, match=rf"{name}: has {length} bytes, the manifest says"):
            Bundle.load(tmp_path / "b", base).check(["x"])
    path.write_bytes(data + b"\0")
    with pytest.raises(BundleError, match=rf"{name}: has {len(data) + 1} bytes, the manifest"):
        Bundle.load(tmp_path / "b", base).check(["x"])
    path.unlink()
    with pytest.raises(BundleError, match=rf"{name}: missing from the bundle"):
        Bundle.load(tmp_path / "b", base).check(["x"])


@pytest.mark.parametrize("name", ["shared.safetensors", "task-x.safetensors"])
def test_flipped_bits_of_payloads(
    sound: tuple[Path, dict[str, Tensor]], tmp_path: Path, name: str
) -> None:
    """Every byte counts: a flip anywhere is found when the task is decoded, and named."""
    folder, base = sound
    shutil.copytree(folder, tmp_path / "b")
    path = tmp_path / "b" / name
    data = path.read_bytes()
    sampler = random.Random(0)
    for place in sampler.sample(range(len(data)), 150):
        flip(path, place, sampler.randrange(8))
        with pytest.raises(BundleError, match=rf"{re.escape(str(path))}: .*copy or compress"):
            Bundle.load(tmp_path / "b", base).state_dict("x")
        path.write_bytes(data)
    Bundle.load(tmp_path / "b", base).state_dict("x")


# --- removing and saving ----------------------------------------------------------------------


def test_removing_touches_no_other_task(folder: Path, base: TinyNet) -> None:
    bundle = Bundle.load(folder, base)
    wanted = bundle.state_dict("cat")
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}
    bundle.remove("bee")
    assert bundle.tasks == Bundle.load(folder).tasks == ("ant", "cat")
    assert {path.name for path in folder.iterdir()} == set(before) - {"task-bee.safetensors"}
    for path in folder.glob("*.safetensors"):
        assert (path.read_bytes(), path.stat().st_mtime_ns) == before[path.name]
    check_same(bundle.state_dict("cat"), wanted)
    check_same(Bundle.load(folder, base).state_dict("cat"), wanted)
    assert bundle.nbytes == sum(map(len, contents(folder).values()))
    with pytest.raises(BundleError, match="has no task 'bee'; it has ant, cat"):
        bundle.state_dict("bee")
    bundle.remove("ant")
    with pytest.raises(BundleError, match="'cat' is the last task; delete the folder instead"):
        bundle.remove("cat")


def test_save_copies_every_byte(folder: Path, base: TinyNet, tmp_path: Path) -> None:
    (folder / "stray").write_bytes(b"")
    bundle = Bundle.load(folder, base)
    bundle.save(tmp_path / "new" / "copy")
    copied = contents(tmp_path / "new" / "copy")
    assert copied == {k: v for k, v in contents(folder).items() if k != "stray"}
    with pytest.raises(BundleError, match="copy: exists; choose another folder, or set overwrite"):
        bundle.save(tmp_path / "new" / "copy")
    bundle.remove("ant")
    bundle.save(tmp_path / "new" / "copy", overwrite=True)
    assert Bundle.load(tmp_path / "new" / "copy").tasks == ("bee", "cat")
    bundle.save(folder, overwrite=True)  # onto itself
    check_same(Bundle.load(folder, base).state_dict("bee"), bundle.state_dict("bee"))


def test_a_temporary_bundle_can_be_kept(
    base: TinyNet, finetuned: States, tmp_path: Path, temporary: Path
) -> None:
    bundle = compress(base, finetuned, EMR(), private=PRIVATE)
    wanted = bundle.state_dict("ant")
    bundle.save(tmp_path / "kept")
    del bundle
    assert not list(temporary.iterdir())
    check_same(Bundle.load(tmp_path / "kept", base).state_dict("ant"), wanted)


# --- exporting --------------------------------------------------------------------------------


def test_export_to_safetensors(folder: Path, base: TinyNet, tmp_path: Path) -> None:
    bundle = Bundle.load(folder, base)
    out = export_task(bundle, "bee", tmp_path / "new" / "bee.safetensors")
    wanted = bundle.state_dict("bee")
    del wanted["decoder.weight"]  # tied: written once
    check_same(load_file(out), wanted)
    with safe_open(out, framework="pt") as handle:
        assert handle.metadata() == {"format": "pt", "task": "bee"}
    assert [path.name for path in out.parent.iterdir()] == ["bee.safetensors"]


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_export_to_pickles(folder: Path, base: TinyNet, tmp_path: Path, suffix: str) -> None:
    bundle = Bundle.load(folder, base)
    out = export_task(bundle, "bee", tmp_path / f"bee{suffix}")
    state = torch.load(out, weights_only=True)
    check_same(state, bundle.state_dict("bee"))
    assert state["decoder.weight"].data_ptr() == state["embed.weight"].data_ptr()
    TinyNet(3).load_state_dict(state)


@pytest.mark.parametrize(("dtype", "wanted"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_export_in_a_dtype(
    folder: Path, base: TinyNet, tmp_path: Path, dtype: str, wanted: torch.dtype
) -> None:
    bundle = Bundle.load(folder, base)
    found = load_file(export_task(bundle, "bee", tmp_path / "bee.safetensors", dtype))
    assert found["head.weight"].dtype == found["embed.weight"].dtype == wanted
    assert found["norm.num_batches_tracked"].dtype == torch.int64
    full = bundle.state_dict("bee")
    assert all(torch.equal(found[name], full[name].to(found[name].dtype)) for name in found)


def test_what_export_refuses(folder: Path, base: TinyNet, tmp_path: Path) -> None:
    bundle = Bundle.load(folder, base)
    out = tmp_path / "bee.safetensors"
    out.write_bytes(b"precious")
    with pytest.raises(BundleError, match=r"bee\.safetensors: exists; choose another name, or set"):
        export_task(bundle, "bee", out)
    with pytest.raises(BundleError, match=r"bee\.gguf: expected a name that ends in \.safetensors"):
        export_task(bundle, "bee", tmp_path / "bee.gguf")
    with pytest.raises(BundleError, match="unknown dtype 'fp8'; expected fp32, fp16, bf16"):
        export_task(bundle, "bee", tmp_path / "x.pt", "fp8")
    with pytest.raises(BundleError, match="has no task 'dog'; it has ant, bee, cat"):
        export_task(bundle, "dog", tmp_path / "x.pt")
    assert out.read_bytes() == b"precious"
    assert {path.name for path in tmp_path.iterdir()} == {"b", "bee.safetensors"}
    export_task(bundle, "bee", out, overwrite=True)
    assert "head.weight" in load_file(out)


def test_the_repr_says_what_it_is(folder: Path) -> None:
    said = re.escape(f"Bundle({str(folder)!r}, {EMR()!r}, 3 tasks (ant, bee, cat), ")
    assert re.fullmatch(said + r"\d+\.\d kB\)", repr(Bundle.load(folder)))


def test_of_many_tasks_few_files_stay_open(tmp_path: Path) -> None:
    """Those used last; what is read from the others is right all the same."""
    base = {"w": torch.zeros(300)}
    tuned = {f"task{place}": {"w": torch.full((300,), float(place + 1))} for place in range(50)}
    bundle = compress(base, tuned, Dense("fp32"), tmp_path / "b")
    for _ in range(2):
        for task, state in tuned.items():
            delta = bundle.delta(task, "w")
            assert delta is not None
            assert torch.equal(delta, state["w"])
    assert list(bundle._stored._tasks) == list(tuned)[-32:]
