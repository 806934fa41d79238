"""What a task takes of a bundle, and how far off its weights are."""

import json
from pathlib import Path

import pytest
import torch
from tiny_net import TASKS, Files

import fusionkit
from fusionkit import Bundle, MagnitudePrune
from fusionkit.bundles.weight_error import weight_error
from fusionkit.cli import inspect
from fusionkit.cli.contents import FILE_NAME, contents, layer_of
from fusionkit.errors import BundleError


@pytest.fixture
def bundle(files: Files, tmp_path: Path) -> Bundle:
    finetuned = {task: files.finetuned[task] for task in TASKS}
    codec = MagnitudePrune(0.3)
    out = tmp_path / "a.bundle"
    return fusionkit.compress(files.base, finetuned, codec, out, private=["head.*"])


@pytest.mark.parametrize("by", ["tensor", "layer", "kind"])
def test_bytes_are_those_of_the_file(bundle: Bundle, by: inspect.By) -> None:
    found = contents(bundle, "bee", by)
    assert sum(each.nbytes for each in found) == bundle.manifest.tasks["bee"].file.bytes
    assert sum(each.tensors for each in found) == sum(e.tensors for e in contents(bundle, "bee"))
    names = [each.name for each in found]
    assert names[-1] == FILE_NAME
    assert len(set(names)) == len(names)


def test_tensors(bundle: Bundle) -> None:
    found = {each.name: each for each in contents(bundle, "bee")}
    head = dict(bundle.private_tensors("bee"))["head.weight"]
    assert (found["head.weight"].kind, found["head.weight"].parameters) == ("private", head.numel())
    assert found["head.weight"].nbytes == head.numel() * head.element_size()
    assert found["conv.weight"].parameters == 8 * 6 * 3
    assert found["conv.weight"].relative_error is None


def test_errors_against_the_checkpoint(bundle: Bundle, files: Files) -> None:
    found = contents(bundle, "bee", "tensor", files.finetuned["bee"])
    family = fusionkit.Family(files.base, {"bee": files.finetuned["bee"]}, ["head.*"])
    whole = weight_error(bundle, family, "bee")
    errors = [each.error for each in found if each.error is not None]
    assert sum(each.error for each in errors) == pytest.approx(whole.error)
    assert sum(each.energy for each in errors) == pytest.approx(whole.energy)
    one = next(each for each in found if each.name == "conv.weight")
    delta = bundle.delta("bee", "conv.weight")
    own = fusionkit.Checkpoint.of(files.finetuned["bee"])["conv.weight"]
    wanted = (own - fusionkit.Checkpoint.of(files.base)["conv.weight"]).to(torch.float64)
    by_hand = (delta - wanted).square().sum() / wanted.square().sum()
    assert one.relative_error == pytest.approx(float(by_hand), rel=1e-5)


def test_said(bundle: Bundle, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(bundle.path)
    inspect.run([path, "--task", "bee", "--by", "kind", "--finetuned", str(files.finetuned["bee"])])
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("private", "together", "error", "against the checkpoint"))
    inspect.run([path, "--task", "bee", "--json", "--by", "layer"])
    said = json.loads(capsys.readouterr().out)
    assert (said["task"], said["by"]) == ("bee", "layer")
    total = sum(part["nbytes"] for part in said["parts"])
    assert total == bundle.manifest.tasks["bee"].file.bytes
    inspect.run([path, "--json"])
    assert json.loads(capsys.readouterr().out)["tasks"].keys() == set(TASKS)


def test_refused(bundle: Bundle, files: Files) -> None:
    with pytest.raises(BundleError, match=r"of which task\? give --task, one of ant, bee, cat"):
        inspect.run([str(bundle.path), "--by", "kind"])
    with pytest.raises(BundleError, match="has no task 'dog'; it has ant, bee, cat"):
        inspect.run([str(bundle.path), "--task", "dog"])


def test_a_shared_part_is_told(files: Files, tmp_path: Path) -> None:
    codec = MagnitudePrune(0.3, merge=fusionkit.Mean())
    out = tmp_path / "b.bundle"
    made = fusionkit.compress(files.base, dict(files.finetuned), codec, out, private=["head.*"])
    found = contents(made, "ant")
    table = inspect.contents_table(made, "ant", "tensor", found)
    assert "All tasks share" in table.note


def test_layers() -> None:
    assert layer_of("bert.encoder.layer.3.output.dense.weight") == "bert.encoder.layer.3"
    assert layer_of("embed.weight") == "embed"
    assert layer_of("scale") == "scale"
