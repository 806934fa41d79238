"""What picks a row's task: features of the base, and neighbours among stored rows."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from program import run
from safetensors.torch import save_file
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
)

import fusionkit
from fusionkit import Bundle
from fusionkit.errors import BundleError, DataError, FusionKitError
from fusionkit.reuse.routing import ROUTER, Router, features_of
from fusionkit.tasks.data_of import data_of

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(40))]
OF = {"mood": (5, 9), "topic": (41, 45)}
"""Each task's texts are of words of its own."""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier, two fine-tunes of it, their bundle, and their data."""
    root = tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=24,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    model.save_pretrained(root / "base")
    (root / "base" / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(root / "base" / "vocab.txt")).save_pretrained(root / "base")
    for task, (low, high) in OF.items():
        with torch.no_grad():
            model.classifier.bias.add_(1.0)
            model.bert.encoder.layer[0].output.dense.weight.add_(0.1)
        model.save_pretrained(root / task)
        (root / "data" / task).mkdir(parents=True)
        drawn = torch.randint(low, high, (40, 6), generator=torch.Generator().manual_seed(low))
        rows = [
            (" ".join(WORDS[place] for place in row), str(n % 2)) for n, row in enumerate(drawn)
        ]
        for split, part in (("train", rows[:20]), ("test", rows[20:])):
            with (root / "data" / task / f"{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows([("text", "label"), *part])
    tasks = {task: str(root / task) for task in OF}
    fusionkit.compress(str(root / "base"), tasks, fusionkit.SVD(2), root / "family.bundle")
    return root


def made(family: Path, rows: int = 16) -> tuple[Router, str]:
    """The router that `fusionkit route` makes, and what it says."""
    path = family / "family.bundle"
    said = run("route", path, "--data", family / "data", "--rows", rows)
    return Router.load(Bundle.load(path)), said


def base_of(family: Path) -> Any:
    return BertForSequenceClassification.from_pretrained(family / "base").eval()


def rows_of(family: Path) -> dict[str, Any]:
    paths = {task: str(family / "data" / task) for task in OF}
    data = data_of(paths, model=str(family / "base"))
    return {t: next(iter(loader)) for t, loader in zip(OF, data.test_dataloader(), strict=True)}


def test_rows_are_taken_for_their_tasks(family: Path) -> None:
    router, said = made(family)
    assert "found again" in said
    assert f"written: {family / 'family.bundle' / ROUTER}" in said
    assert [router.of.count(task) for task in OF] == [16, 16]
    assert router.found_again() == {"mood": 1.0, "topic": 1.0}
    model = base_of(family)
    for task, batch in rows_of(family).items():
        picked = router.pick(features_of(model, batch))
        assert {each.task for each in picked} == {task}
        assert all(each.probability > 0.9 for each in picked)


def test_neighbours_by_scikit_learn(family: Path) -> None:
    torch.manual_seed(0)
    rows, asked = torch.randn(60, 8), torch.randn(20, 8)
    of = [f"task{place % 3}" for place in range(60)]
    router = Router(rows, of, "base")
    centre = rows.mean(0)
    known, new = (
        ((x - centre) / (x - centre).norm(dim=1, keepdim=True)).numpy() for x in (rows, asked)
    )
    other = KNeighborsClassifier(10, weights=lambda d: np.exp(-5 * d), metric="cosine").fit(
        known, of
    )
    assert [each.task for each in router.pick(asked)] == list(other.predict(new))
    found = [each.probability for each in router.pick(asked)]
    assert found == pytest.approx(other.predict_proba(new).max(1), abs=1e-6)
    right: dict[str, list[bool]] = {task: [] for task in router.tasks}
    for place, task in enumerate(of):  # each row by all others
        left = [n for n in range(60) if n != place]
        other.fit(known[left], [of[n] for n in left])
        right[task].append(other.predict(known[[place]])[0] == task)
    expected = {task: float(np.mean(each)) for task, each in right.items()}
    assert router.found_again() == pytest.approx(expected)


def test_features_are_means_of_a_middle_layer(family: Path) -> None:
    model, batch = base_of(family), next(iter(rows_of(family).values()))
    batch["input_ids"][0, 4:] = 0
    batch["attention_mask"][0, 4:] = 0  # a shorter row, padded
    found = features_of(model, batch)
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        layers = model(**inputs, output_hidden_states=True).hidden_states
    assert len(layers) == 4
    torch.testing.assert_close(found[0], unit(layers[2][0, :4].mean(0)))
    torch.testing.assert_close(found[1], unit(layers[2][1].mean(0)))
    alone = {name: value[:1, :4] for name, value in inputs.items()}
    torch.testing.assert_close(features_of(model, alone)[0], found[0], rtol=1e-4, atol=1e-5)


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


def test_of_prompts_the_answers_do_not_count() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    tokens = torch.tensor([[3, 4, 5, 6]])
    whole = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    answered = {**whole, "labels": torch.tensor([[-100, -100, 5, 6]]), "bytes": torch.ones(1)}
    prompt = {name: value[:, :2] for name, value in whole.items()}
    torch.testing.assert_close(features_of(model, answered), features_of(model, prompt))
    text = {**whole, "labels": tokens}  # a text without a prompt
    torch.testing.assert_close(features_of(model, text), features_of(model, whole))
    with pytest.raises(DataError, match="expected rows with 'input_ids' for LlamaForCausalLM, got"):
        features_of(model, {"choices": tokens})
    with pytest.raises(FusionKitError, match="transformers or timm, not of Linear"):
        features_of(torch.nn.Linear(2, 2), {"x": tokens})


def test_what_a_bundle_has(family: Path, tmp_path: Path) -> None:
    made(family)
    tasks = {"mood": str(family / "mood")}
    bundle = fusionkit.compress(str(family / "base"), tasks, fusionkit.SVD(2), tmp_path / "b")
    with pytest.raises(BundleError, match=r"has no router .*fusionkit route .* --data DATA"):
        Router.load(bundle)
    file = tmp_path / "b" / ROUTER
    file.write_bytes((family / "family.bundle" / ROUTER).read_bytes())
    assert Router.load(bundle).tasks == ("mood",)  # topic is not in it
    assert {p.task for p in Router.load(bundle).pick(torch.randn(3, 16))} == {"mood"}
    whole = Router.load(Bundle.load(family / "family.bundle"))
    Router(whole.features, ["other"] * len(whole.of), whole.base).save(file)
    with pytest.raises(BundleError, match="knows none of the bundle's tasks"):
        Router.load(bundle)
    Router(whole.features, whole.of, "another").save(file)
    with pytest.raises(BundleError, match="was made with another base"):
        Router.load(bundle)
    for damaged in (b"", b"no", file.read_bytes()[:-9]):
        file.write_bytes(damaged)
        with pytest.raises(BundleError, match="is no router"):
            Router.load(bundle)
    save_file({"features": torch.zeros(2, 2)}, file, metadata={"format": "fusionkit-router-1"})
    with pytest.raises(BundleError, match="is no router"):
        Router.load(bundle)
