"""Bundles of tasks that added rows to the vocabulary: stored whole, beside what codecs made."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import check_same
from safetensors.torch import load_file
from torch import Tensor
from vocabularies import ROWS, extended, made

import fusionkit
from fusionkit import DBMS, EMR, SVD, Bundle, Dense, MagnitudePrune, Merged
from fusionkit.bundles.add_tasks import add_tasks
from fusionkit.bundles.export_model import export_task
from fusionkit.bundles.export_peft import export_adapter
from fusionkit.bundles.manifest import Manifest
from fusionkit.errors import BundleError
from fusionkit.task_vectors.family import Family

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CODECS = {
    "dense": Dense(),
    "svd": SVD(rank=2),
    "emr": EMR(),
    "prune": MagnitudePrune(0.2),
    "dbms": DBMS(MagnitudePrune(0.2)),
    "merged": Merged(),
}


@pytest.fixture
def base() -> Any:
    return made("llama, untied")


@pytest.fixture
def tuned(base: Any) -> dict[str, Any]:
    return {"five": extended(base, 5), "none": extended(base, 0, seed=2)}


def cut(model: Any) -> dict[str, Tensor]:
    """A fine-tuned model without the rows that it added."""
    state = model.state_dict()
    return {n: t[:ROWS] if n in (EMBED, HEAD) else t for n, t in state.items()}


@pytest.mark.parametrize("codec", CODECS)
def test_codecs_never_see_them(
    codec: str, base: Any, tuned: dict[str, Any], tmp_path: Path
) -> None:
    bundle = fusionkit.compress(base, tuned, CODECS[codec], tmp_path / "b")
    common = {task: cut(model) for task, model in tuned.items()}
    before = fusionkit.compress(base, common, CODECS[codec], tmp_path / "before")
    for name in bundle.roles:
        check_same(dict(bundle.shared_parts(name)), dict(before.shared_parts(name)))
        for task in tuned:
            check_same(dict(bundle.task_parts(task, name)), dict(before.task_parts(task, name)))
    rows = dict(bundle.added_rows("five"))
    assert rows.keys() == {EMBED, HEAD}
    assert all(torch.equal(own, tuned["five"].state_dict()[n][ROWS:]) for n, own in rows.items())
    state, without = bundle.state_dict("five"), before.state_dict("five")
    check_same({n: t[:ROWS] if n in rows else t for n, t in state.items()}, without)
    assert all(torch.equal(state[name][ROWS:], own) for name, own in rows.items())
    records = bundle.manifest.tasks
    assert records["five"].private_bytes == sum(own.nbytes for own in rows.values())
    assert records["none"].private_bytes == 0
    assert bundle.bits_per_parameter == pytest.approx(before.bits_per_parameter, abs=0.5)


def test_the_manifest_says_it_and_older_readers_are_told(
    base: Any, tuned: dict[str, Any], tmp_path: Path
) -> None:
    fusionkit.compress(base, tuned, Dense(), tmp_path / "b")
    content = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert content["format_version"] == 5
    assert content["tasks"]["five"]["added"] == {EMBED: 5, HEAD: 5}
    assert "added" not in content["tasks"]["none"]
    bundle = Bundle(tmp_path / "b", base)
    assert bundle.added("five") == {EMBED: 5, HEAD: 5}
    assert bundle.added("none") == {}
    bundle.remove("five")
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["format_version"] == 1


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ({"nothing": 5}, "malformed .*rows added to unknown tensors"),
        ({EMBED: 0}, "malformed .*Expected `int` >= 1"),
        ({EMBED: 4}, r"adds to 'model.embed_tokens.weight' have shape \[5, 16\], expected \[4, 16"),
        ({"model.norm.weight": 4}, "adds to 'model.norm.weight' are missing"),
    ],
)
def test_a_manifest_that_says_otherwise_is_refused(
    added: dict[str, int], said: str, base: Any, tuned: dict[str, Any], tmp_path: Path
) -> None:
    bundle = fusionkit.compress(base, tuned, Dense(), tmp_path / "b")
    bundle.manifest.tasks["five"].added.clear()
    bundle.manifest.tasks["five"].added.update(added)
    bundle.manifest.write(tmp_path / "b")
    with pytest.raises(BundleError, match=said):
        Bundle(tmp_path / "b", base).state_dict("five")


def test_tasks_with_more_rows_are_added(base: Any, tuned: dict[str, Any], tmp_path: Path) -> None:
    bundle = fusionkit.compress(base, {"none": tuned["none"]}, Dense("fp32"), tmp_path / "b")
    add_tasks(bundle, {"five": tuned["five"]})
    whole = fusionkit.compress(base, tuned, Dense("fp32"))
    check_same(Bundle(tmp_path / "b", base).state_dict("five"), whole.state_dict("five"))


def test_a_frozen_vocabulary_comes_back_with_them(base: Any, tuned: dict[str, Any]) -> None:
    state = tuned["five"].state_dict()
    state[EMBED][:ROWS] = base.state_dict()[EMBED]
    bundle = fusionkit.compress(base, {"five": state}, Dense(), frozen=[EMBED])
    assert torch.equal(bundle.state_dict("five")[EMBED], state[EMBED])


def test_the_model_is_exported_in_its_own_size(
    base: Any, tuned: dict[str, Any], tmp_path: Path
) -> None:
    bundle = fusionkit.compress(base, tuned, Dense("fp32"))
    path = export_task(bundle, "five", tmp_path / "five.safetensors", dtype="bf16")
    wanted = tuned["five"].state_dict()
    found = load_file(path)
    assert {name: t.shape for name, t in found.items()} == {n: t.shape for n, t in wanted.items()}
    assert torch.equal(found[HEAD][ROWS:], wanted[HEAD][ROWS:].bfloat16())


def test_an_adapter_has_no_place_for_them(base: Any, tuned: dict[str, Any], tmp_path: Path) -> None:
    bundle = fusionkit.compress(base, tuned, SVD(rank=2))
    with pytest.raises(BundleError, match="task 'five' adds rows to the vocabulary, which an adap"):
        export_adapter(bundle, "five", tmp_path / "adapter")
    left_out = export_adapter(bundle, "five", tmp_path / "adapter", lora_only=True)
    assert {EMBED, HEAD} <= set(left_out)


def test_a_version_is_no_newer_than_it_must_be(base: Any, tuned: dict[str, Any]) -> None:
    family = Family(base, {"none": tuned["none"]})
    assert family.vocabulary == {"none": {}}
    bundle = fusionkit.compress(base, {"none": tuned["none"]}, Dense())
    assert isinstance(bundle.manifest, Manifest)
    assert '"format_version": 1' in bundle.manifest.text()
