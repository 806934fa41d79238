"""What compressing refuses, and that a failed run leaves nothing behind."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checks import check_same, contents
from tiny_net import TASKS, TESTS, TinyNet
from torch import Tensor

from fusionkit import EMR, Dense, Mean, add_tasks
from fusionkit.bundles.compress import compress
from fusionkit.codecs.base import DeltaCodec
from fusionkit.errors import BundleError, CodecError, FamilyError, PluginError

PRIVATE = ["head.*"]
States = dict[str, dict[str, Tensor]]


def test_a_folder_that_is_there(base: TinyNet, finetuned: States, tmp_path: Path) -> None:
    out = tmp_path / "b"
    compress(base, finetuned, EMR(), out, private=PRIVATE)
    before = contents(out)
    with pytest.raises(BundleError, match=r"b: exists; choose another folder, or set overwrite"):
        compress(base, finetuned, Dense(), out, private=PRIVATE)
    assert contents(out) == before
    bundle = compress(base, finetuned, Dense(), out, private=PRIVATE, overwrite=True)
    assert bundle.codec == Dense()
    assert "shared.safetensors" not in contents(out)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_only_bundles_are_overwritten(base: TinyNet, finetuned: States, tmp_path: Path) -> None:
    """A mistyped `out` must not cost a folder of other things."""
    models = tmp_path / "models"
    models.mkdir()
    (models / "precious.bin").write_bytes(b"1")
    (tmp_path / "file").write_bytes(b"2")
    for out in (models, tmp_path / "file"):
        said = rf"{out.name}: exists and is not a folder with manifest\.json, so it is not over"
        with pytest.raises(BundleError, match=said):
            compress(base, finetuned, Dense(), out, private=PRIVATE, overwrite=True)
    assert (models / "precious.bin").read_bytes() == b"1"
    assert {path.name for path in tmp_path.iterdir()} == {"models", "file"}


def test_overwriting_fails_without_harm(base: TinyNet, finetuned: States, tmp_path: Path) -> None:
    compress(base, finetuned, EMR(), tmp_path / "b", private=PRIVATE)
    before = contents(tmp_path / "b")
    finetuned["cat"]["hidden.bias"][0] = torch.inf
    with pytest.raises(FamilyError, match=r"'hidden.bias' holds 1 values"):
        compress(base, finetuned, Dense(), tmp_path / "b", private=PRIVATE, overwrite=True)
    assert contents(tmp_path / "b") == before
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], DeltaCodec]:
    """A codec with a fault, from a plugin."""
    monkeypatch.syspath_prepend(TESTS / "faulty_plugin")
    from faulty_codecs import Faulty

    return Faulty


FAULTS = {
    "name": (CodecError, r"Faulty\(fault='name'\) encoded 'nowhere.weight' where 'embed.weight'"),
    "tasks": (CodecError, r"encoded 1 tasks of 'embed.weight', expected 3"),
    "tensor": (CodecError, "a part can't be called 'tensor': '/' and 'tensor' are reserved"),
    "a/b": (CodecError, "a part can't be called 'a/b': '/' and 'tensor' are reserved"),
    "dtype": (BundleError, "part 'embed.weight/values' is torch.complex128, unknown to"),
    "raise": (ZeroDivisionError, "in the third tensor"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_codec_is_refused_and_leaves_nothing(
    base: TinyNet,
    finetuned: States,
    tmp_path: Path,
    temporary: Path,
    faulty: Callable[[str], DeltaCodec],
    fault: str,
) -> None:
    error, said = FAULTS[fault]
    for out in (None, tmp_path / "b"):
        with pytest.raises(error, match=said):
            compress(base, finetuned, faulty(fault), out, private=PRIVATE)
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("decoded", r"'embed.weight' of task 'ant' decodes to shape \[1, 66\], expected \[11, 6\]"),
        ("decoding", r"'embed.weight' of task 'ant' can't be decoded by Faulty.*KeyError: 'absent"),
    ],
)
def test_faulty_decoding_is_named(
    base: TinyNet, finetuned: States, faulty: Callable[[str], DeltaCodec], fault: str, said: str
) -> None:
    bundle = compress(base, finetuned, faulty(fault), private=PRIVATE)
    with pytest.raises(BundleError, match=said):
        bundle.state_dict("ant")


def test_a_codec_that_shares_anew_on_adding_is_refused(
    base: TinyNet, finetuned: States, tmp_path: Path, faulty: Callable[[str], DeltaCodec]
) -> None:
    two = {task: finetuned[task] for task in TASKS[:2]}
    bundle = compress(base, two, faulty("shared"), tmp_path / "b", private=PRIVATE)
    before = contents(tmp_path / "b")
    with pytest.raises(CodecError, match=r"encoded shared parts of 'embed.weight' anew"):
        add_tasks(bundle, {"cat": finetuned["cat"]}, keep_shared=True)
    assert contents(tmp_path / "b") == before


def test_a_codec_may_lend_the_payloads_memory(
    base: TinyNet, finetuned: States, faulty: Callable[[str], DeltaCodec]
) -> None:
    from faulty_codecs import Lender

    bundle = compress(base.half(), finetuned, Lender(), private=PRIVATE)
    check_same(bundle.state_dict("ant"), bundle.state_dict("ant"))


def test_a_codec_that_is_not_registered_is_refused_before_anything_is_read(
    finetuned: States, tmp_path: Path, faulty: Callable[[str], DeltaCodec]
) -> None:
    class Faulty(faulty):  # type: ignore[misc, valid-type]
        pass

    with pytest.raises(PluginError, match=r"Faulty is not what 'faulty' is registered as"):
        compress(tmp_path / "absent.pt", finetuned, Faulty(), tmp_path / "b")
    with pytest.raises(CodecError, match=r"expected a DeltaCodec, got Mean\(\)"):
        compress(tmp_path / "absent.pt", finetuned, Mean(), tmp_path / "b")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
