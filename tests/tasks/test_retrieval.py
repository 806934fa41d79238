"""Image-text retrieval, judged by torchmetrics' own metrics over all pairs, and by the models."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_clip
import torch
import yaml
from PIL import Image
from program import run
from tiny_tasks import trainer
from torch import Tensor, nn
from torchmetrics.retrieval import RetrievalHitRate, RetrievalRecall

import fusionkit
from fusionkit import EMR, SVD, ReuseModule
from fusionkit.errors import DataError
from fusionkit.tasks.image_text_pairs import ImageTextPairs
from fusionkit.tasks.retrieval import CrossModalRecall, ImageTextRetrieval


def features(images: int = 12, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 4, (images,), generator=generator)
    one = torch.randn(images, 6, generator=generator)
    two = one.repeat_interleave(counts, 0) + 1.2 * torch.randn(int(counts.sum()), 6)
    return (*(nn.functional.normalize(each, dim=-1) for each in (one, two)), counts)


def judged(images: Tensor, texts: Tensor, counts: Tensor, k: int, direction: str) -> float:
    """By torchmetrics, whose rows are pairs of a query and an answer."""
    owners = torch.arange(len(images)).repeat_interleave(counts)
    near, right = images @ texts.T, torch.arange(len(images))[:, None] == owners
    if direction == "text_to_image":
        near, right = near.T, right.T
    queries = torch.arange(len(near))[:, None].expand_as(near)
    metric: Any = RetrievalHitRate if direction == "image_to_text" else RetrievalRecall
    made = metric(top_k=k)
    made.update(near.reshape(-1), right.reshape(-1), indexes=queries.reshape(-1))
    return float(made.compute())


class TestMetric:
    @pytest.mark.parametrize("k", [1, 5, 10])
    @pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
    def test_as_torchmetrics_has_it(self, k: int, direction: Any) -> None:
        images, texts, counts = features()
        metric = CrossModalRecall(k, direction)
        cut = int(counts[:5].sum())
        metric.update(images[:5], texts[:cut], counts[:5])
        metric.update(images[5:], texts[cut:], counts[5:])
        wanted = judged(images, texts, counts, k, direction)
        assert wanted > 0
        assert float(metric.compute()) == pytest.approx(wanted)

    def test_in_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given = features()
        whole, parts = CrossModalRecall(), CrossModalRecall()
        whole.update(*given)
        value = whole.compute()
        monkeypatch.setattr("fusionkit.tasks.retrieval._BLOCK", 40)
        parts.update(*given)
        assert torch.equal(parts.compute(), value)

    def test_a_model_that_says_one_thing_finds_nothing(self) -> None:
        same = nn.functional.normalize(torch.ones(20, 4), dim=-1)
        metric = CrossModalRecall(10)
        metric.update(same, same, torch.ones(20, dtype=torch.int64))
        assert metric.compute() == 0

    @pytest.mark.parametrize("own", [{"k": 0}, {"direction": "up"}])
    def test_refused(self, own: Any) -> None:
        with pytest.raises(ValueError, match=r"`(k|direction)`"):
            CrossModalRecall(**own)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip.clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images, with one to three captions."""
    folder = tmp_path_factory.mktemp("pairs")
    tiny_clip.images(folder)
    rows = []
    for place, path in enumerate(sorted((folder / "test").glob("*/*.png"))):
        captions = [f"{path.parent.name} {place}", f"photo {place}", f"no {place}"][: 1 + place % 3]
        rows.append({"image": str(path.relative_to(folder)), "caption": captions})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "pairs.jsonl"


class TestTask:
    def test_compressed_switched_and_scored(self, clip: Path, pairs: Path, tmp_path: Path) -> None:
        from transformers import AutoProcessor, CLIPModel

        tuned = tiny_clip.changed(CLIPModel.from_pretrained(clip), 1)
        tuned.save_pretrained(tmp_path / "tuned")
        rows = ImageTextPairs({"t": str(pairs)}, str(clip), batch_size=5)
        reuse = ReuseModule(
            CLIPModel.from_pretrained(clip).eval(), finetuned={"t": str(tmp_path / "tuned")}
        )
        reuse.compress(tmp_path / "bundle", codec=SVD(rank=16, dtype="fp32"))
        reused = ReuseModule(CLIPModel.from_pretrained(clip).eval(), bundle=tmp_path / "bundle")
        trainer().test(reused, rows, verbose=False)
        assert reused.scores is not None

        listed = [json.loads(line) for line in pairs.read_text().splitlines()]
        processor = AutoProcessor.from_pretrained(clip)
        inputs = processor(
            images=[Image.open(pairs.parent / row["image"]) for row in listed],
            text=[text for row in listed for text in row["caption"]],
            padding=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            said = tuned.eval()(**inputs)
        counts = torch.tensor([len(row["caption"]) for row in listed])
        wanted = {
            f"{way}@{k}": judged(said.image_embeds, said.text_embeds, counts, k, way)
            for way in ("image_to_text", "text_to_image")
            for k in (1, 5, 10)
        }
        found = reused.scores.of("t").others
        assert found == pytest.approx(wanted)
        assert reused.scores.values["t"] == pytest.approx(sum(wanted.values()) / 6)
        assert reused.scores.of("t").facts.percent
        predicted = fusionkit.predict(reused, rows)
        assert [len(row["similarities"]) for row in predicted] == counts.tolist()

    def test_by_a_model_of_open_clip(self, pairs: Path, tmp_path: Path) -> None:
        pytest.importorskip("open_clip")
        folder, made = tiny_clip.open_clip_model(tmp_path)
        rows = ImageTextPairs({"t": str(pairs)}, str(folder), batch_size=12)
        (batch,) = rows.test_dataloader()[0]
        kind = ImageTextRetrieval()
        with torch.no_grad():
            said = kind.predict(made, batch)
            wanted = made.encode_text(batch["text"], normalize=True)
        counts = batch["captions"]
        assert said.shape == (12, 1 + int(counts.max()), 12)
        found = torch.cat([row[1 : 1 + count] for row, count in zip(said, counts, strict=True)])
        torch.testing.assert_close(found, wanted)
        first = kind.first(batch, 5)
        assert {len(first[name]) for name in ("image", "captions")} == {5}
        with torch.no_grad():
            torch.testing.assert_close(kind.predict(made, first), said[:5, : 1 + counts[:5].max()])

    def test_loss_is_clips_own(self, clip: Path, pairs: Path) -> None:
        """Of one caption an image, what transformers computes."""
        from transformers import CLIPModel

        model = CLIPModel.from_pretrained(clip).eval()
        rows = ImageTextPairs({"t": str(pairs)}, str(clip), batch_size=12)
        images, captions = zip(*(rows.read("t", "test")[row] for row in range(12)), strict=True)
        single = [(image, own[:1]) for image, own in zip(images, captions, strict=True)]
        batch = rows.collate(single)
        kind = ImageTextRetrieval(scale=float(model.logit_scale.exp()))
        with torch.no_grad():
            own = {name: value for name, value in batch.items() if name != "captions"}
            wanted = model(**own, return_loss=True).loss
            torch.testing.assert_close(kind.loss(kind.predict(model, batch), batch), wanted)
            teacher = kind.predict(tiny_clip.changed(model, 1), batch)
            said = kind.predict(model, batch)
        assert kind.divergence(said, said) == 0
        assert kind.divergence(said, -teacher) > 0

    def test_calibrated(self, clip: Path, pairs: Path, tmp_path: Path) -> None:
        """Nothing that calibrates knows of it."""
        from transformers import CLIPModel

        folder = tmp_path / "rows"
        folder.mkdir()
        for name in ("train", "test"):
            rows = [json.loads(line) for line in pairs.read_text().splitlines()]
            rows = [{**row, "image": str(pairs.parent / row["image"])} for row in rows]
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        tuned = dict(tiny_clip.changed(CLIPModel.from_pretrained(clip), 1).state_dict())
        reuse = ReuseModule(
            CLIPModel.from_pretrained(clip).eval(),
            finetuned={"t": tuned},  # type: ignore[dict-item]
            codec=fusionkit.DBMS(EMR()),
        )
        data = ImageTextPairs({"t": str(folder)}, str(clip), batch_size=4)
        bundle = fusionkit.calibrate(
            reuse, data, settings=fusionkit.Calibration(rows=8), trainer=trainer(4)
        )
        learned = bundle.manifest.tasks["t"].calibration
        assert learned is not None
        assert learned.loss_after <= learned.loss_before


def test_a_recipe(clip: Path, pairs: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel

    tiny_clip.changed(CLIPModel.from_pretrained(clip), 1).save_pretrained(tmp_path / "tuned")
    content = {
        "model": {
            "model": {
                "class_path": "fusionkit.tasks.dual_encoders.both_towers",
                "init_args": {"path": str(clip)},
            },
            "finetuned": {"t": str(tmp_path / "tuned")},
            "codec": "emr",
        },
        "data": {
            "class_path": "image_text_pairs",
            "init_args": {"tasks": {"t": str(pairs)}, "encoder": str(clip)},
        },
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "logger": False},
        "out": str(tmp_path / "out"),
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content))
    said = run("test", "--config", recipe)
    assert "CrossModalRecall" in said
    assert "text_to_image@10" in said


class TestData:
    def test_rows_of_one_image(self, clip: Path, pairs: Path, tmp_path: Path) -> None:
        image = next(pairs.parent.glob("test/*/*.png"))
        path = tmp_path / "t.csv"
        path.write_text(f"path,caption\n{image},one\n{image},two\n")
        rows = ImageTextPairs({"t": str(path)}, str(clip))
        (batch,) = rows.test_dataloader()[0]
        assert batch["captions"].tolist() == [2]
        assert len(batch["pixel_values"]) == 1
        assert len(batch["input_ids"]) == 2

    def test_no_caption(self, clip: Path, pairs: Path, tmp_path: Path) -> None:
        path = tmp_path / "t.jsonl"
        path.write_text(json.dumps({"image": "a.png", "caption": []}))
        with pytest.raises(DataError, match="line 1: expected a caption, or a list of such"):
            ImageTextPairs({"t": str(path)}, str(clip)).read("t", "test")
