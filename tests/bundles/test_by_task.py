"""Bundles in Python: a mapping of tasks, made by a codec's name, from a glob, with a bar."""

from pathlib import Path

import pytest
import torch
from checks import check_same
from tiny_net import Files, TinyNet
from torch import Tensor

import fusionkit
from fusionkit import SVD, Bundle, Checkpoint, Family
from fusionkit.errors import BundleError, CodecError

PRIVATE = ["head.*"]
States = dict[str, dict[str, Tensor]]


@pytest.fixture
def bundle(base: TinyNet, finetuned: States) -> Bundle:
    return fusionkit.compress(base, finetuned, SVD(2), private=PRIVATE)


class TestMapping:
    def test_its_tasks(self, bundle: Bundle) -> None:
        assert len(bundle) == 3
        assert list(bundle) == ["ant", "bee", "cat"] == list(bundle.keys())
        assert "bee" in bundle
        assert "dog" not in bundle

    def test_a_task_is_its_model(self, bundle: Bundle) -> None:
        whole = bundle.state_dict("bee")
        wanted = {name: tensor for name, tensor in whole.items() if name not in bundle.tied}
        check_same(dict(bundle["bee"]), wanted)
        assert dict(bundle).keys() == {"ant", "bee", "cat"}

    def test_nothing_is_decoded_before_it_is_asked_for(
        self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[str] = []
        tensor = Bundle.tensor

        def noted(self: Bundle, task: str, name: str, *rest: Tensor | None) -> Tensor | None:
            seen.append(name)
            return tensor(self, task, name, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(Bundle, "tensor", noted)
        model = bundle["bee"]
        assert "hidden.weight" in model
        assert not seen
        assert model["hidden.weight"].shape == (6, 8)
        assert seen == ["hidden.weight"]

    def test_no_such_task(self, bundle: Bundle) -> None:
        with pytest.raises(BundleError, match="has no task 'dog'; it has ant, bee, cat"):
            bundle["dog"]

    def test_it_is_an_object_of_its_own(self, bundle: Bundle) -> None:
        assert bundle != Bundle(bundle.path)
        assert {bundle: 1}[bundle] == 1


class TestCalls:
    def test_a_codec_by_name_and_a_glob(self, files: Files, tmp_path: Path) -> None:
        wanted = fusionkit.compress(files.base, files.finetuned, SVD(2), private=PRIVATE)
        (tmp_path / "tuned").mkdir()
        for path in files.finetuned.values():
            path.rename(tmp_path / "tuned" / path.name)
        pattern = f"{tmp_path}/tuned/*.safetensors"
        made = fusionkit.compress(files.base, pattern, "svd", private=PRIVATE, rank=2)
        assert made.codec == wanted.codec
        check_same(made.state_dict("cat"), wanted.state_dict("cat"))

    def test_a_setting_misspelled(self, files: Files) -> None:
        with pytest.raises(CodecError, match="no setting 'rnak'; did you mean 'rank'"):
            fusionkit.compress(files.base, files.finetuned, "svd", rnak=2)

    def test_an_argument_misspelled(self, files: Files) -> None:
        with pytest.raises(CodecError, match="privat: is no argument"):
            fusionkit.compress(files.base, files.finetuned, SVD(2), privat=PRIVATE)

    def test_a_bar(self, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        base, tuned = files.base, dict(files.finetuned)
        (tmp_path / "more").mkdir()
        tuned.pop("cat").rename(tmp_path / "more" / "cat.safetensors")
        bundle = fusionkit.compress(
            base, tuned, SVD(2), tmp_path / "b", private=PRIVATE, progress=True
        )
        assert "compressing" in capsys.readouterr().out
        fusionkit.add_tasks(bundle, f"{tmp_path}/more/*.safetensors", progress=True)
        assert "adding" in capsys.readouterr().out
        assert list(bundle) == ["ant", "bee", "cat"]

    def test_no_bar(self, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
        for progress in (None, False):
            fusionkit.compress(
                files.base, files.finetuned, SVD(2), private=PRIVATE, progress=progress
            )
        assert capsys.readouterr() == ("", "")


class TestReprs:
    def test_of_a_family(self, files: Files) -> None:
        family = Family(files.base, files.finetuned, private=PRIVATE)
        tasks = "3 tasks (ant, bee, cat)"
        counts = "tensors: 7 delta, 3 exact, 2 private"
        assert repr(family) == f"Family('{files.base}', {tasks}, {counts})"

    def test_of_a_checkpoint(self, files: Files) -> None:
        path = files.base
        size = f"{path.stat().st_size / 1e3:.1f} kB"
        checkpoint = Checkpoint.of(path)
        count = sum(tensor.numel() for tensor in checkpoint.values())
        assert repr(checkpoint).endswith(
            f"({str(path)!r}, 12 tensors, {count:,} values in float32 and int64, {size})"
        )

    def test_of_many_tasks(self) -> None:
        base = {"w": torch.zeros(4)}
        tuned = {f"t{place}": {"w": torch.ones(4)} for place in range(9)}
        made = fusionkit.compress(base, tuned, "dense")
        assert "9 tasks (t0, t1, t2, t3, t4, t5, … and 3 more), " in repr(made)
