"""Which file a folder means: what transformers loads, what diffusers is known to, and refusals."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fusionkit import EMR, Bundle, Checkpoint, compress
from fusionkit.errors import CheckpointError

NAMES = ("a", "b", "c")


def write(folder: Path, *files: str) -> None:
    """Files whose tensors all have their own value, and of an index its shards, two of them.

    An index behind `!` has no shards.
    """
    for place, file in enumerate(files, start=1):
        state = {name: torch.full((2,), float(place)) for name in NAMES}
        if file.endswith(".json"):
            write_shards(folder, file.removeprefix("!"), state, bare=file.startswith("!"))
        elif file.endswith(".safetensors"):
            save_file(state, folder / file, {"format": "pt"})
        else:
            torch.save(state, folder / file)


def write_shards(
    folder: Path, index: str, state: dict[str, Tensor], bare: bool = False, unnamed: str = ""
) -> None:
    """Shards and their index, which does not name one of the tensors, if it is told so."""
    suffix = "safetensors" if ".safetensors." in index else "bin"
    places = {name: f"{index}-{min(at, 1)}.{suffix}" for at, name in enumerate(state)}
    for shard in set() if bare else set(places.values()):
        part = {name: tensor for name, tensor in state.items() if places[name] == shard}
        if suffix == "safetensors":
            save_file(part, folder / shard, {"format": "pt"})
        else:
            torch.save(part, folder / shard)
    named = {name: shard for name, shard in places.items() if name != unnamed}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": named}))


def refused(folder: Path, *said: str, variant: str | None = None) -> None:
    with pytest.raises(CheckpointError, match="(?s)" + ".*".join(map(re.escape, said))):
        Checkpoint.of(folder, variant=variant)


SAFE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SETS = [
    ([BIN, SAFE], None),
    ([BIN, INDEX], None),
    ([BIN, BIN_INDEX.replace("pytorch", "!pytorch")], None),
    ([SAFE, f"!{INDEX}"], None),
    ([BIN_INDEX], None),
    ([f"!{INDEX}", BIN, SAFE, f"!{BIN_INDEX}"], None),
    ([SAFE, "model.fp16.safetensors"], None),
    ([SAFE, "model.fp16.safetensors"], "fp16"),
    ([SAFE, "model.safetensors.index.fp16.json"], "fp16"),
    ([SAFE, "pytorch_model.fp16.bin"], "fp16"),
    (["pytorch_model.bin.index.fp16.json", BIN], "fp16"),
    ([SAFE, "consolidated.safetensors", "adapter_model.safetensors", "optimizer.pt"], None),
    ([INDEX, "consolidated.safetensors", "training_args.bin"], None),
]


@pytest.mark.parametrize(("files", "variant"), SETS)
def test_what_transformers_loads(tmp_path: Path, files: list[str], variant: str | None) -> None:
    modeling = pytest.importorskip("transformers.modeling_utils", reason="pip install .[test]")
    write(tmp_path, *files)
    wanted, _ = modeling._get_resolved_checkpoint_files(tmp_path, variant, None, None, None, False)
    found = Checkpoint.of(tmp_path, variant=variant)
    read = [path for path in found.files if path.suffix != ".json"]
    assert sorted(map(str, read)) == sorted(wanted)
    assert (found.label, found.variant) == (str(tmp_path), variant)


@pytest.mark.parametrize(
    ("files", "variant"),
    [
        (["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"], None),
        (["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors.index.json"], None),
        (
            ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"],
            "fp16",
        ),
        (
            [
                "diffusion_pytorch_model.safetensors",
                "diffusion_pytorch_model.safetensors.index.fp16.json",
            ],
            "fp16",
        ),
    ],
)
def test_what_diffusers_loads(tmp_path: Path, files: list[str], variant: str | None) -> None:
    write(tmp_path, *files)
    found = Checkpoint.of(tmp_path, variant=variant)
    assert found["a"].tolist() == [2.0, 2.0]


def test_the_file_that_the_config_names(tmp_path: Path) -> None:
    write(tmp_path, SAFE, "own.safetensors")
    (tmp_path / "config.json").write_text('{"transformers_weights": "own.safetensors"}')
    assert Checkpoint.of(tmp_path).files == (tmp_path / "own.safetensors",)
    for name in ("gone.safetensors", "../own.safetensors"):
        (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": name}))
        refused(tmp_path, "config.json says", name, "take the entry out of config.json")


def test_every_tensor_of_each_shard_counts(tmp_path: Path) -> None:
    write_shards(tmp_path, INDEX, {name: torch.randn(2) for name in NAMES}, unnamed="b")
    assert set(Checkpoint.of(tmp_path)) == set(NAMES)


def test_a_tensor_that_two_shards_hold(tmp_path: Path) -> None:
    state = {name: torch.randn(2) for name in NAMES}
    write_shards(tmp_path, INDEX, state)
    again = {"a": state["a"], "b": state["b"], "c": state["c"]}
    save_file(again, tmp_path / f"{INDEX}-1.safetensors")
    assert torch.equal(Checkpoint.of(tmp_path)["a"], state["a"])
    save_file(again | {"a": state["a"] + 1}, tmp_path / f"{INDEX}-1.safetensors")
    refused(tmp_path, str(tmp_path), "'a' has other values in", "-1.safetensors than in", "-0.safe")


# --- a folder that says two things ------------------------------------------------------------


@pytest.mark.parametrize(("single", "index"), [(SAFE, INDEX), (BIN, BIN_INDEX)])
def test_a_file_and_shards_of_other_weights(tmp_path: Path, single: str, index: str) -> None:
    """And what the message says to do, done."""
    write(tmp_path, single, index)
    refused(tmp_path, f"{tmp_path}: says two things: {single}", index, "or delete the other")
    assert Checkpoint.of(tmp_path / single)["a"].tolist() == [1.0, 1.0]
    assert Checkpoint.of(tmp_path / index)["a"].tolist() == [2.0, 2.0]
    (tmp_path / single).unlink()
    assert Checkpoint.of(tmp_path)["a"].tolist() == [2.0, 2.0]


def test_a_file_and_shards_of_the_same_weights(tmp_path: Path) -> None:
    state = {name: torch.tensor([float("nan"), 1.0]) for name in NAMES}
    save_file(state, tmp_path / SAFE)
    write_shards(tmp_path, INDEX, state)
    assert set(Checkpoint.of(tmp_path)) == set(NAMES)
    save_file({name: state[name] for name in ("a", "b")}, tmp_path / SAFE)
    refused(tmp_path, "says two things", "'c', for one")


def test_files_of_both_libraries(tmp_path: Path) -> None:
    write(tmp_path, "diffusion_pytorch_model.bin", BIN)
    refused(tmp_path, f"holds {BIN}, which transformers reads", "diffusion_pytorch_model.bin")


def test_a_model_with_an_adapter_in_its_folder(tmp_path: Path) -> None:
    write(tmp_path, SAFE, "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, f"holds {SAFE} and an adapter", f"give {tmp_path / SAFE}")


# --- folders that mean no file ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            ["model.fp16.safetensors"],
            "are of a variant (fp16); say which: Checkpoint.of(…, variant=",
        ),
        (["pytorch_model.ema.bin"], "variant (ema)"),
        (["model.safetensors.index.bf16.json"], "variant (bf16)"),
        (["model.fp16-00001-of-00002.safetensors"], "variant (fp16)"),
        (["model-00001-of-00002.safetensors"], "shards (model-00001-of-00002.safetensors, …) and"),
        (
            ["x.safetensors", "y.safetensors"],
            "(x.safetensors, y.safetensors); give the file itself",
        ),
        (["optimizer.pt"], "no checkpoint file; expected model.safetensors"),
    ],
)
def test_folders_of_other_files(tmp_path: Path, files: list[str], said: str) -> None:
    write(tmp_path, *files)
    refused(tmp_path, str(tmp_path), said)


def test_a_folder_of_folders(tmp_path: Path) -> None:
    for name in ("unet", "vae", "scheduler"):
        (tmp_path / name).mkdir()
    write(tmp_path / "unet", "diffusion_pytorch_model.safetensors")
    write(tmp_path / "vae", "diffusion_pytorch_model.safetensors")
    refused(tmp_path, "folders that hold some; give one: unet, vae")
    (tmp_path / "model_index.json").write_text("{}")
    write(tmp_path, "sd_xl_base.safetensors")
    refused(tmp_path, "a diffusers pipeline; give the folder of one component: unet, vae")


def test_a_variant_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, SAFE)
    refused(tmp_path, "no weights of the variant 'fp16'", "leave `variant` out", variant="fp16")
    write(tmp_path, "model.bf16.safetensors")
    refused(tmp_path, "it has the variants bf16", variant="fp16")


def test_a_variant_of_what_is_no_folder(tmp_path: Path) -> None:
    write(tmp_path, SAFE)
    refused(tmp_path / SAFE, "'fp16' chooses among a folder's files", variant="fp16")
    with pytest.raises(CheckpointError, match="the source is no folder"):
        Checkpoint.of({"a": torch.ones(2)}, variant="fp16")


# --- bundles ----------------------------------------------------------------------------------


def test_a_bundle_finds_its_base_by_its_variant(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    write(base, SAFE, "model.fp16.safetensors")
    tuned = {"t": {name: torch.full((2,), 3.0) for name in NAMES}}
    sources = {name: Checkpoint.of(base, variant=name) for name in ("fp16", None)}
    compress(
        Checkpoint.of(sources["fp16"], add_prefix=""), tuned, EMR("none"), tmp_path / "of fp16"
    )
    compress(base, tuned, EMR("none"), tmp_path / "plain")
    assert '"variant": "fp16"' in (tmp_path / "of fp16/manifest.json").read_text()
    assert "variant" not in (tmp_path / "plain/manifest.json").read_text()
    for folder, wanted in (("of fp16", 2.0), ("plain", 1.0)):
        assert Bundle.load(tmp_path / folder).base["a"].tolist() == [wanted, wanted]
