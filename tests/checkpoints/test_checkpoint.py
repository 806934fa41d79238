"""Checkpoints: every kind of source, laziness, ties, prefixes, and what is refused."""

import copy
import inspect
import json
import os
import pickle
import re
import resource
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import save_file
from tiny_net import TinyNet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fusionkit import Checkpoint
from fusionkit.checkpoints.checkpoint import Copied, TensorSpec, find_checkpoints
from fusionkit.errors import CheckpointError

States = dict[str, Tensor]


@pytest.fixture
def state() -> States:
    return {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(4), "b.weight": torch.randn(2)}


def check_same(checkpoint: Checkpoint, state: States) -> None:
    assert list(checkpoint) == list(checkpoint.specs)
    assert set(checkpoint) == set(state)
    assert len(checkpoint) == len(state)
    for name, tensor in state.items():
        assert name in checkpoint
        assert checkpoint.specs[name] == TensorSpec(tuple(tensor.shape), tensor.dtype)
        assert checkpoint[name].dtype == tensor.dtype
        assert torch.equal(checkpoint[name], tensor)


def refused(source: object, *said: str) -> None:
    """Check that a source is refused, with all of this in the message, in this order."""
    with pytest.raises(CheckpointError, match="(?s)" + ".*".join(map(re.escape, said))):
        Checkpoint.of(source)  # type: ignore[arg-type]


# --- one file -------------------------------------------------------------------------------


def test_safetensors(tmp_path: Path, state: States) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    for source in (path, str(path)):
        checkpoint = Checkpoint.of(source)
        check_same(checkpoint, state)
        assert checkpoint.label == str(path)
        assert checkpoint.nbytes == path.stat().st_size
        assert not checkpoint.live


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model"])
def test_pickles_plain_and_wrapped(
    tmp_path: Path, state: States, suffix: str, wrapper: str | None
) -> None:
    path = tmp_path / f"model{suffix}"
    torch.save({wrapper: state, "epoch": 3, "name": "x"} if wrapper else state, path)
    checkpoint = Checkpoint.of(path)
    check_same(checkpoint, state)
    assert checkpoint.nbytes == path.stat().st_size
    assert not checkpoint.live


def test_a_pickle_from_before_torch_1_6(tmp_path: Path, state: States) -> None:
    path = tmp_path / "old.pt"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    check_same(Checkpoint.of(path), state)


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_dtypes_come_back_as_they_are(tmp_path: Path, suffix: str) -> None:
    state = {str(dtype): torch.tensor([[0, 1], [1, 3]]).to(dtype) for dtype in DTYPES}
    state["scalar"] = torch.tensor(7)
    state["empty"] = torch.empty(0, 4)
    path = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    checkpoint = Checkpoint.of(path)
    assert checkpoint.specs == {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in state.items()}
    for name, tensor in state.items():
        assert checkpoint[name].dtype == tensor.dtype
        assert torch.equal(checkpoint[name].to(torch.float64), tensor.to(torch.float64))


# --- nothing is read before it is asked for --------------------------------------------------


def test_a_large_tensor_costs_nothing_until_asked_for(tmp_path: Path) -> None:
    huge = 1 << 32  # bytes; a hole in a sparse file
    header = {
        "huge": {"dtype": "F32", "shape": [huge // 4], "data_offsets": [0, huge]},
        "small": {"dtype": "F32", "shape": [2], "data_offsets": [huge, huge + 8]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.seek(huge, os.SEEK_CUR)
        file.write(struct.pack("<2f", 1.5, -2.0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    checkpoint = Checkpoint.of(path)
    assert checkpoint.specs["huge"].shape == (huge // 4,)
    assert checkpoint["small"].tolist() == [1.5, -2.0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (peak - before) * 1024 < huge / 16


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_values_are_read_when_asked_for_and_not_before(
    tmp_path: Path, state: States, suffix: str
) -> None:
    path = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    checkpoint = Checkpoint.of(path)
    other = torch.randn(3, 4)
    place = path.read_bytes().index(state["a.weight"].numpy().tobytes())
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(place)
        file.write(other.numpy().tobytes())
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as if it had been so all along
    check_same(checkpoint, {**state, "a.weight": other})


def test_a_file_that_was_replaced_is_read_as_it_was(tmp_path: Path, state: States) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    checkpoint = Checkpoint.of(path)
    other = tmp_path / "other.safetensors"
    save_file({name: tensor + 1 for name, tensor in state.items()}, other)
    other.replace(path)
    assert torch.equal(checkpoint["a.weight"], state["a.weight"])


def test_a_file_that_was_changed_is_refused(tmp_path: Path, state: States) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    checkpoint = Checkpoint.of(path)
    raw = path.read_bytes()
    path.write_bytes(raw)  # over it, not beside it
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"'a\.weight' can't be read: the file was changed"):
        checkpoint["a.weight"]


@pytest.mark.parametrize("positioned", [True, False])
def test_pieces_are_those_of_the_tensor(
    tmp_path: Path, state: States, positioned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not positioned:
        monkeypatch.delattr(os, "preadv", raising=False)
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    kinds = [Checkpoint.of(path), Checkpoint.of(state), Checkpoint.of(path, add_prefix="net.")]
    for checkpoint in kinds:
        for name, tensor in state.items():
            pieces = checkpoint.pieces(checkpoint.add_prefix + name)
            for start in range(0, tensor.numel(), 2):
                place = slice(start, min(start + 2, tensor.numel()))
                assert torch.equal(pieces(place), tensor.reshape(-1)[place])


def test_a_file_replaced_by_a_shorter_one_is_named_with_the_tensor(
    tmp_path: Path, state: States
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    checkpoint = Checkpoint.of(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=rf"{path}: tensor 'a\.bias' can't be read"):
        checkpoint["a.bias"]


# --- folders and shards -----------------------------------------------------------------------


def write_shards(folder: Path, state: States, suffix: str = "safetensors") -> Path:
    """Two shards and their index, as Hugging Face writes them."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    files = [f"{stem}-{i:05}-of-00002.{suffix}" for i in (1, 2)]
    weight_map = {name: files[place % 2] for place, name in enumerate(state)}
    for file in files:
        shard = {name: state[name] for name in state if weight_map[name] == file}
        if suffix == "safetensors":
            save_file(shard, folder / file, {"format": "pt"})
        else:
            torch.save(shard, folder / file)
    size = sum(tensor.nbytes for tensor in state.values())
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_sharded_folder_or_its_index(tmp_path: Path, state: States, suffix: str) -> None:
    index = write_shards(tmp_path, state, suffix)
    for source in (tmp_path, index):
        checkpoint = Checkpoint.of(source)
        check_same(checkpoint, state)
        assert checkpoint.label == str(source)
        shards = tmp_path.glob(f"*.{suffix}")
        assert checkpoint.nbytes == sum(shard.stat().st_size for shard in shards)


def test_ties_inside_a_shard_are_found_whatever_the_order_of_the_index(tmp_path: Path) -> None:
    weight = torch.randn(3)
    torch.save({"a": weight, "z": weight, "m": torch.randn(2)}, tmp_path / "one.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"z": "one.bin", "m": "one.bin", "a": "one.bin"}}))
    checkpoint = Checkpoint.of(tmp_path)
    assert checkpoint.aliases == {"z": "a"}
    copied = checkpoint.in_memory()
    assert torch.equal(copied["a"], weight)
    assert copied["a"].data_ptr() == copied["z"].data_ptr()


def test_a_missing_shard_is_named(tmp_path: Path, state: States) -> None:
    index = write_shards(tmp_path, state)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, str(index), "a shard that is missing: 'model-00002-of-00002.safetensors'")


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path, state: States) -> None:
    index = write_shards(tmp_path, state)
    content = json.loads(index.read_text())
    content["weight_map"]["c.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    refused(tmp_path, str(index), "lack", "'c.weight' in model-00001-of-00002.safetensors")


@pytest.mark.parametrize("file", ["../secret.safetensors", "/secret.safetensors", "a/b.bin", ".."])
def test_shards_outside_the_folder_are_refused(tmp_path: Path, state: States, file: str) -> None:
    save_file(state, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    file = file.replace("/secret", f"{tmp_path}/secret") if file.startswith("/") else file
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(state, file)}))
    refused(folder, str(index), f"'{file}'")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}', "\xff", "null"]
)
def test_an_index_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(content.encode("latin-1"))
    refused(tmp_path, str(index), "not a shard index")
    index.write_text('{"weight_map": {"a": 3}}')
    refused(tmp_path, str(index), "not a shard index")


def test_a_shard_that_is_truncated_is_named(tmp_path: Path, state: States) -> None:
    write_shards(tmp_path, state)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(tmp_path, str(shard), "not a whole safetensors file", "fetch or save it again")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "other.safetensors"])
def test_a_folder_with_one_file(tmp_path: Path, state: States, file: str) -> None:
    if file.endswith(".bin"):
        torch.save(state, tmp_path / file)
    else:
        save_file(state, tmp_path / file)
    (tmp_path / "config.json").write_text("{}")
    check_same(Checkpoint.of(tmp_path), state)


def test_folders_without_one_checkpoint_say_what_is_expected(tmp_path: Path, state: States) -> None:
    refused(tmp_path, str(tmp_path), "no checkpoint file", "model.safetensors.index.json")
    save_file(state, tmp_path / "a.safetensors")
    save_file(state, tmp_path / "b.safetensors")
    refused(tmp_path, str(tmp_path), "several .safetensors files and no index")


def test_a_peft_adapter_is_told_from_a_model(tmp_path: Path, state: States) -> None:
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, str(tmp_path), "a PEFT adapter", "give the folder as a fine-tuned model")


# --- Lightning --------------------------------------------------------------------------------


class Unknown:
    """An object that is no tensor."""


class Lit(LightningModule):
    """The tiny net, with hyperparameters."""

    def __init__(self, rate: float = 0.1, extra: object = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.rate = rate
        self.net = TinyNet()

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.rate)


def save_lightning(module: Lit, path: Path) -> None:
    rows = TensorDataset(torch.randint(0, 11, (4, 5)), torch.tensor([0, 1, 2, 0]))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu", max_steps=2, enable_checkpointing=False, default_root_dir=path.parent,
        **quiet,
    )  # fmt: skip
    trainer.fit(module, DataLoader(rows, batch_size=2))
    trainer.save_checkpoint(path)


@pytest.mark.filterwarnings("ignore")
def test_a_lightning_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    module = Lit(rate=0.01, extra={"layers": [1, 2]})
    save_lightning(module, path)
    check_same(Checkpoint.of(path), module.state_dict())
    net = Checkpoint.of(path, strip_prefix="net.")
    check_same(net, module.net.state_dict())
    assert net.aliases == {"decoder.weight": "embed.weight"}


@pytest.mark.filterwarnings("ignore")
def test_a_lightning_checkpoint_with_objects_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save_lightning(Lit(extra=Unknown()), path)
    refused(path, str(path), "more than tensors", "Unknown", "save its state dict alone")


# --- in memory --------------------------------------------------------------------------------


def test_a_module(base: TinyNet) -> None:
    checkpoint = Checkpoint.of(base)
    check_same(checkpoint, base.state_dict())
    assert checkpoint.label == "TinyNet (module in memory)"
    assert checkpoint.live
    assert checkpoint.buffers == {
        "norm.running_mean", "norm.running_var", "norm.num_batches_tracked",
    }  # fmt: skip
    assert checkpoint.aliases == {"decoder.weight": "embed.weight"}
    assert not checkpoint["embed.weight"].requires_grad
    tied_once = sum(t.nbytes for n, t in base.state_dict().items() if n != "decoder.weight")
    assert checkpoint.nbytes == tied_once


def test_buffers_that_are_not_saved_are_not_listed() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("seen", torch.zeros(1), persistent=False)
    module.register_buffer("kept", torch.zeros(1))
    assert Checkpoint.of(module).buffers == {"kept"}


def test_a_mapping(state: States) -> None:
    check_same(Checkpoint.of(state), state)
    assert Checkpoint.of(state).label == "dict of tensors in memory"
    assert Checkpoint.of(state).nbytes == sum(tensor.nbytes for tensor in state.values())


def test_a_checkpoint_comes_back_as_it_is(state: States) -> None:
    checkpoint = Checkpoint.of(state)
    assert Checkpoint.of(checkpoint) is checkpoint
    check_same(Checkpoint.of(state), state)


def test_ties_are_found_in_pickles_and_only_where_all_is_shared(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    state = {
        "a": weight, "tied": weight, "view": weight[:2], "turned": weight.T,
        "equal": weight.clone(), "none": torch.empty(0), "none too": torch.empty(0),
    }  # fmt: skip
    path = tmp_path / "model.pt"
    torch.save(state, path)
    for source in (path, state):
        checkpoint = Checkpoint.of(source)
        assert checkpoint.aliases == {"tied": "a"}
        check_same(checkpoint, state)


def test_in_memory_copies_and_keeps_what_is_known(tmp_path: Path, base: TinyNet) -> None:
    checkpoint = Checkpoint.of(base, add_prefix="net.")
    copied = checkpoint.in_memory()
    before = {name: tensor.clone() for name, tensor in copied.items()}
    with torch.no_grad():
        for tensor in base.state_dict().values():
            tensor.fill_(9)
    check_same(copied, before)
    assert not copied.live
    assert copied.label == checkpoint.label
    assert copied.buffers == checkpoint.buffers
    assert copied.aliases == checkpoint.aliases
    assert (copied.strip_prefix, copied.add_prefix) == ("", "net.")
    assert copied["net.embed.weight"].data_ptr() == copied["net.decoder.weight"].data_ptr()


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
@pytest.mark.parametrize("kind", ["mapping", "module", "copy", "copy of a file", "view"])
def test_what_is_in_memory_can_be_copied_and_pickled(
    kind: str, copied: Callable[[Checkpoint], Checkpoint], tmp_path: Path, base: TinyNet
) -> None:
    save_file({"a.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    sources = {
        "mapping": Checkpoint.of(dict(base.state_dict())),
        "module": Checkpoint.of(base),
        "copy": Checkpoint.of(base).in_memory(),
        "copy of a file": Checkpoint.of(tmp_path / "model.safetensors").in_memory(),
        "view": Checkpoint.of(Checkpoint.of(base).in_memory(), add_prefix="model."),
    }
    source = sources[kind]
    other = copied(source)
    check_same(other, dict(source))
    assert dict(other.aliases) == dict(source.aliases)
    assert all(other[name].data_ptr() != source[name].data_ptr() for name in source)


def test_prefixes_are_taken_off_and_put_on(tmp_path: Path, state: States) -> None:
    path = tmp_path / "model.safetensors"
    save_file({f"model.{name}": t for name, t in state.items()} | {"ema.a": torch.ones(1)}, path)
    check_same(Checkpoint.of(path, strip_prefix="model."), state)
    bert = {f"bert.{name}": tensor for name, tensor in state.items()}
    check_same(Checkpoint.of(path, strip_prefix="model.", add_prefix="bert."), bert)
    assert "model.a.bias" not in Checkpoint.of(path, strip_prefix="model.")


def test_prefixes_over_prefixes_are_again_one_of_each(tmp_path: Path, state: States) -> None:
    """What a manifest keeps of them opens the same tensors again."""
    path = tmp_path / "model.safetensors"
    save_file({f"model.net.{name}": tensor for name, tensor in state.items()}, path)
    inner = Checkpoint.of(path, strip_prefix="model.", add_prefix="a.b.")
    for strip, add in (("", "x."), ("a.", ""), ("a.b.", "x."), ("a.b.net.", "x."), ("a.b.ne", "")):
        twice = Checkpoint.of(inner, strip_prefix=strip, add_prefix=add)
        once = Checkpoint.of(path, twice.strip_prefix, twice.add_prefix)
        check_same(twice, dict(once))
        assert (twice.label, twice.files, twice.live) == (str(path), (path,), False)
    with pytest.raises(CheckpointError, match=r"no tensor whose name starts with 'b\.'"):
        Checkpoint.of(inner, strip_prefix="b.")


def test_to_call_the_interface_is_to_open(tmp_path: Path, state: States) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    opened: Checkpoint = Checkpoint(path, "a.", add_prefix="b.")
    check_same(opened, dict(Checkpoint.of(path, "a.", add_prefix="b.")))
    assert type(Checkpoint(state)) is type(Checkpoint.of(state))
    assert Checkpoint(opened) is opened
    assert isinstance(pickle.loads(pickle.dumps(Checkpoint(state).in_memory())), Copied)
    known = list(inspect.signature(Checkpoint.__init__).parameters.values())[1:]
    assert known == list(inspect.signature(Checkpoint.of).parameters.values())
    with pytest.raises(TypeError, match="prefix"):
        Checkpoint(path, prefix="a.")  # type: ignore[call-arg]


def test_a_kind_is_made_as_any_class_is() -> None:
    class Zeros(Checkpoint):
        def __init__(self, name: str) -> None:
            self.label, self.nbytes = "zeros", 8
            self.specs = {name: TensorSpec((2,), torch.float32)}

    class Read(Zeros):
        def __getitem__(self, name: str) -> Tensor:
            return torch.zeros(self.specs[name].shape)

    check_same(Read("a"), {"a": torch.zeros(2)})
    with pytest.raises(NotImplementedError, match="Zeros does not say how"):
        Zeros("a")["a"]


def test_a_prefix_is_no_set_of_characters(state: States) -> None:
    checkpoint = Checkpoint.of({"model.model.ode": torch.ones(1)}, strip_prefix="model.")
    assert list(checkpoint) == ["model.ode"]


def test_a_prefix_that_nothing_has_is_refused(tmp_path: Path, state: States) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    said = rf"{path}: holds no tensor whose name starts with 'bert\.'"
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.of(path, strip_prefix="bert.")


def test_a_name_that_is_not_there_is_a_key_error(tmp_path: Path, state: States) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    with pytest.raises(KeyError, match=rf"{path}: no tensor 'c'"):
        Checkpoint.of(path)["c"]
    assert Checkpoint.of(path).get("c") is None


def test_checkpoints_are_found_by_pattern(tmp_path: Path, state: States) -> None:
    for task in ("bee", "ant[1]"):
        (tmp_path / task).mkdir()
        save_file(state, tmp_path / task / "model.safetensors")
    found = find_checkpoints(f"{tmp_path}/*/model.safetensors")
    assert found == {t: f"{tmp_path}/{t}/model.safetensors" for t in ("ant[1]", "bee")}
    assert set(find_checkpoints(f"{tmp_path}/*")) == {"ant[1]", "bee"}
    with pytest.raises(CheckpointError, match="nothing matches"):
        find_checkpoints(f"{tmp_path}/*/model.bin")
    for pattern in ("a/b", "a/*/*", "a/**"):
        with pytest.raises(CheckpointError, match="expected exactly one"):
            find_checkpoints(pattern)


# --- refused ----------------------------------------------------------------------------------


class Creates:
    """Pickled code that would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin"])
def test_code_in_a_pickle_is_not_run(
    tmp_path: Path, state: States, suffix: str, legacy: bool
) -> None:
    path, created = tmp_path / f"model{suffix}", tmp_path / "created"
    content = {**state, "evil": Creates(created)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    refused(path, str(path), "could run code", "open", "save its state dict alone")
    assert not created.exists()


def test_code_in_a_plain_pickle_is_not_run(tmp_path: Path) -> None:
    path, created = tmp_path / "model.pt", tmp_path / "created"
    path.write_bytes(pickle.dumps({"evil": Creates(created)}, protocol=2))
    refused(path, str(path), "save")
    assert not created.exists()


@pytest.mark.parametrize("value", [3, "text", None, [torch.ones(1)], {"x": torch.ones(1)}])
def test_entries_that_are_no_tensors_are_named(
    tmp_path: Path, state: States, value: object
) -> None:
    path = tmp_path / "model.pt"
    torch.save({**state, "odd": value, "step": 4}, path)
    kind = type(value).__name__
    refused(path, str(path), "expected tensors by name", f"'odd': {kind}", "'step': int")
    refused({**state, "odd": value}, "dict of tensors in memory", f"'odd': {kind}")


def test_a_modules_extra_state_is_named() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> object:
            return {"x": 1}

    refused(Extra(2, 2), "Extra (module in memory)", "'_extra_state': dict")


def test_a_file_of_no_state_dict_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save([torch.ones(1)], path)
    refused(path, str(path), "expected a state dict, got list")
    torch.save({}, path)
    refused(path, str(path), "holds no tensor")


@settings(deadline=None, max_examples=40)
@given(share=st.floats(0, 0.999))
def test_truncated_files_are_refused(
    tmp_path_factory: pytest.TempPathFactory, share: float
) -> None:
    folder = tmp_path_factory.mktemp("truncated")
    state = {"a": torch.randn(300), "b": torch.randn(7)}
    save_file(state, folder / "new.safetensors")
    torch.save(state, folder / "new.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    for path in folder.iterdir():
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        # A bare pickle cut inside a class's name asks for a class that is not allowed.
        refused(path, str(path), "save it" if path.stem == "new" else "save")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
def test_a_pointer_to_a_file_is_no_checkpoint(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    refused(path, str(path), "not a", "fetch or save it again")


def test_what_is_not_there_or_of_no_known_kind(tmp_path: Path) -> None:
    refused(tmp_path / "none.pt", f"{tmp_path}/none.pt: no such file", "check the path")
    for name in ("model.h5", "model"):
        path = tmp_path / name
        path.write_text("x")
        refused(path, f"{path}: unknown kind of checkpoint", "expected .safetensors, .bin, .ckpt")
    refused(3, "expected a path, a module or a mapping of tensors, got int")
