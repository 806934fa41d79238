"""Dual encoders: heads made of class names, image towers under them, and what judges both."""

from pathlib import Path
from typing import Any

import pytest
import tiny_clip
import torch
import yaml
from PIL import Image
from program import run
from tiny_tasks import trainer
from torch import Tensor

from fusionkit import SVD, Bundle, Family, ReuseModule
from fusionkit.cli.kept_rows import _identity
from fusionkit.errors import CheckpointError, DataError, FusionKitError
from fusionkit.tasks.dual_encoders import ImageClassifier, dual_encoder
from fusionkit.tasks.image_files import ImageClassification
from fusionkit.tasks.zero_shot import ClassPrompts, ZeroShotModels, zero_shot_head

NAMES = tuple(sorted(tiny_clip.COLOURS))
FROZEN = ["visual_projection.*"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip.clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def work(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two fine-tuned image towers, their classes and images."""
    folder = tmp_path_factory.mktemp("work")
    for seed, task in enumerate(("one", "two")):
        tiny_clip.tower(clip, folder / "towers" / task, seed)
        tiny_clip.images(folder / "data" / task, seed=seed)
        tiny_clip.classes(folder / "classes" / f"{task}.json")
    return folder


def models(clip: Path, work: Path) -> ZeroShotModels:
    return ZeroShotModels(f"{work}/towers/*", str(clip), f"{work}/classes/*.json")


def data(clip: Path, work: Path) -> ImageClassification:
    tasks = {task: str(work / "data" / task) for task in ("one", "two")}
    labels: Any = {task: str(work / "classes" / f"{task}.json") for task in tasks}
    return ImageClassification(tasks, str(clip), labels)


def module(clip: Path, work: Path, **own: Any) -> ReuseModule:
    return ReuseModule(
        ImageClassifier(str(clip)),
        finetuned=models(clip, work),
        private=["head.*"],
        frozen=FROZEN,
        **own,
    )


def by_transformers(clip: Path, tower: Path | None, images: list[Image.Image]) -> Tensor:
    """The probabilities of transformers' own pipeline, of one template: `(B, classes)`."""
    from transformers import CLIPVisionModel, pipeline

    judge = pipeline("zero-shot-image-classification", model=str(clip), device="cpu")
    if tower is not None:
        state = CLIPVisionModel.from_pretrained(tower).state_dict()
        judge.model.vision_model.load_state_dict(state)
    rows = []
    for image in images:
        said = judge(
            image, candidate_labels=list(NAMES), hypothesis_template=tiny_clip.TEMPLATES[0]
        )
        found = {each["label"]: each["score"] for each in said}
        rows.append([found[name] for name in NAMES])
    return torch.tensor(rows)


class TestHead:
    def test_as_the_pipeline_of_transformers_has_it(self, clip: Path, work: Path) -> None:
        """Of one template, its softmax is that of `logits_per_image`."""
        rows = ImageClassification({"t": str(work / "data" / "one")}, str(clip))
        pixels, _ = next(iter(rows.test_dataloader()[0]))
        paths = sorted((work / "data" / "one" / "test").glob("*/*.png"))
        model = ImageClassifier(str(clip), classes=3)
        head = zero_shot_head(dual_encoder(str(clip)), ClassPrompts(NAMES, ("a photo of {}.",)))
        model.head.load_state_dict({name[5:]: value for name, value in head.items()})
        with torch.no_grad():
            said = model(pixels).softmax(-1)
        judged = by_transformers(clip, None, [Image.open(path) for path in paths])
        torch.testing.assert_close(said, judged, atol=1e-5, rtol=0)
        assert judged.std(0).max() > 0.01  # the images are told apart

    def test_templates_are_averaged_and_normalised_again(self, clip: Path) -> None:
        encoder = dual_encoder(str(clip))
        head = zero_shot_head(encoder, ClassPrompts(NAMES, tuple(tiny_clip.TEMPLATES)))
        weight = head["head.weight"]
        assert weight.norm(dim=-1).tolist() == pytest.approx([encoder.scale] * 3, rel=1e-5)
        with torch.no_grad():
            said = encoder.text_features([t.replace("{}", "grey") for t in tiny_clip.TEMPLATES])
        mean = (said / said.norm(dim=-1, keepdim=True)).mean(0)
        torch.testing.assert_close(weight[1] / encoder.scale, mean / mean.norm())
        assert (head["head.bias"] == 0).all()

    def test_siglip_has_a_bias_and_no_projection(self, clip: Path, tmp_path: Path) -> None:
        from transformers import SiglipConfig, SiglipModel

        tokens = tiny_clip.tokenizer(tmp_path)
        shape = {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        text = {**shape, "vocab_size": len(tokens), "max_position_embeddings": tiny_clip.TEXT}
        image = {**shape, "image_size": tiny_clip.SIZE, "patch_size": 8}
        torch.manual_seed(0)
        whole = SiglipModel(SiglipConfig(text_config=text, vision_config=image)).eval()
        with torch.no_grad():
            whole.logit_bias.fill_(-2.0)
            whole.logit_scale.fill_(1.5)
        whole.save_pretrained(tmp_path)
        encoder = dual_encoder(str(tmp_path))
        model = ImageClassifier(str(tmp_path), classes=3)
        head = zero_shot_head(encoder, ClassPrompts(NAMES, ("{}",)))
        model.head.load_state_dict({name[5:]: value for name, value in head.items()})
        pixels = torch.randn(2, 3, tiny_clip.SIZE, tiny_clip.SIZE)
        with torch.no_grad():
            judged = whole(pixel_values=pixels, **encoder.tokens(NAMES)).logits_per_image
            torch.testing.assert_close(model(pixels), judged)


class TestOpenClip:
    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        """A tiny model in open_clip's own layout."""
        pytest.importorskip("open_clip", reason="pip install .[clip]")
        return tiny_clip.open_clip_model(tmp_path)[0]

    def test_as_its_own_classifier_builder_has_it(self, saved: Path, work: Path) -> None:
        import open_clip

        judge, _, transform = open_clip.create_model_and_transforms(f"local-dir:{saved}")
        weights = open_clip.build_zero_shot_classifier(
            judge.eval(), open_clip.get_tokenizer(f"local-dir:{saved}"), NAMES, tiny_clip.TEMPLATES
        )
        path = sorted((work / "data" / "one" / "test").glob("*/*.png"))[0]
        with torch.no_grad():
            pixels = transform(Image.open(path))[None]
            features = judge.encode_image(pixels, normalize=True)
            judged = judge.logit_scale.exp() * features @ weights
        prompts = ClassPrompts(NAMES, (*tiny_clip.TEMPLATES,))
        head = zero_shot_head(dual_encoder(str(saved)), prompts)
        model = ImageClassifier(str(saved), classes=3)
        model.head.load_state_dict({name[5:]: value for name, value in head.items()})
        rows = ImageClassification({"t": str(work / "data" / "one")}, str(saved))
        ours, _ = rows.read("t", "test")[0]
        with torch.no_grad():
            torch.testing.assert_close(model(ours[None]), judged)
        assert {name.partition(".")[0] for name in model.state_dict()} == {"visual", "head"}

    def test_without_weights(self, saved: Path) -> None:
        (saved / "open_clip_model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="open_clip can't make it"):
            dual_encoder(str(saved))


class TestFamily:
    def test_the_image_tower_alone_is_compressed(self, clip: Path, work: Path) -> None:
        own = module(clip, work)
        family = own.family()
        assert all(name.startswith("vision_model.") for name in family.names("delta"))
        assert family.private == {task: ["head.bias", "head.weight"] for task in ("one", "two")}
        kept = own.compress(codec=SVD(rank=4))
        head = dict(kept.private_tensors("two"))["head.weight"]
        judged = zero_shot_head(
            dual_encoder(str(clip)), ClassPrompts.read(work / "classes" / "two.json")
        )
        assert torch.equal(head, judged["head.weight"])

    def test_other_words_are_another_model(self, clip: Path, work: Path) -> None:
        """What a comparison keeps of an earlier run is not taken for one of other prompts."""
        names: Any = {task: list(NAMES) for task in ("one", "two")}
        told = []
        for templates in (["{}"], ["a {}"], ["{}"]):
            found = ZeroShotModels(f"{work}/towers/*", str(clip), names, templates)
            family = Family(ImageClassifier(str(clip)), found, ["head.*"], FROZEN)
            told.append(_identity(family.finetuned["one"]))
        assert told[0] == told[2] != told[1]

    def test_compressed_switched_and_scored(self, clip: Path, work: Path, tmp_path: Path) -> None:
        """A bundle holds heads, and needs no text tower."""
        rows = data(clip, work)
        own = module(clip, work)
        trainer().test(own, rows, verbose=False)
        whole = own.scores
        own.compress(tmp_path / "bundle", codec=SVD(rank=16, dtype="fp32"))
        reused = ReuseModule(ImageClassifier(str(clip)), bundle=tmp_path / "bundle")
        trainer().test(reused, rows, verbose=False)
        assert reused.scores.values == whole.values
        path = sorted((work / "data" / "two" / "test").glob("*/*.png"))[0]
        reused.switch("two")
        pixels, _ = rows.read("two", "test")[0]
        head = zero_shot_head(
            dual_encoder(str(clip)), ClassPrompts(NAMES, (tiny_clip.TEMPLATES[0],))
        )
        reused.model.head.load_state_dict({name[5:]: value for name, value in head.items()})
        with torch.no_grad():
            said = reused.model(pixels[None]).softmax(-1)
        judged = by_transformers(clip, work / "towers" / "two", [Image.open(path)])
        torch.testing.assert_close(said, judged, atol=1e-4, rtol=0)

    def test_over_the_folder_of_the_whole_encoder(
        self, clip: Path, work: Path, tmp_path: Path
    ) -> None:
        """A base that is a folder has its text tower, which no task changes."""
        frozen = [*FROZEN, "text_model.*", "text_projection.*", "logit_scale"]
        family = Family(str(clip), models(clip, work), ["head.*"], frozen)
        assert all(name.startswith("vision_model.") for name in family.names("delta"))
        own = ReuseModule(
            ImageClassifier(str(clip)),
            base=str(clip),
            finetuned=models(clip, work),
            private=["head.*"],
            frozen=frozen,
        )
        own.compress(tmp_path / "bundle", codec=SVD(rank=16, dtype="fp32"))
        trainer().test(own, data(clip, work), verbose=False)
        again = ReuseModule(
            ImageClassifier(str(clip), pretrained=False),
            bundle=tmp_path / "bundle",
            base=str(clip),
            private=["head.*"],
        )
        trainer().test(again, data(clip, work), verbose=False)
        assert again.scores.values == own.scores.values
        assert Bundle(tmp_path / "bundle").tasks == ("one", "two")

    def test_adapters_of_the_tower(self, clip: Path, work: Path, tmp_path: Path) -> None:
        peft = pytest.importorskip("peft")
        from transformers import CLIPVisionModel

        model = CLIPVisionModel.from_pretrained(clip)
        settings = peft.LoraConfig(
            r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False
        )
        adapted = peft.get_peft_model(model, settings)
        adapted.save_pretrained(tmp_path / "lora")
        pixels = torch.randn(2, 3, tiny_clip.SIZE, tiny_clip.SIZE)
        with torch.no_grad():
            judged = adapted(pixels).pooler_output
        found = ZeroShotModels({"t": str(tmp_path / "lora")}, str(clip), {"t": list(NAMES)})
        own = ReuseModule(ImageClassifier(str(clip)), finetuned=found, private=["head.*"])
        own.switch("t")
        with torch.no_grad():
            torch.testing.assert_close(own.model.vision_model(pixels).pooler_output, judged)
            assert own.model(pixels).shape == (2, 3)


def test_a_recipe(clip: Path, work: Path, tmp_path: Path) -> None:
    """Compressed and scored by two commands, as docs/vision.md has it."""
    classes = {task: str(work / "classes" / f"{task}.json") for task in ("one", "two")}
    content = {
        "model": {
            "model": {
                "class_path": "fusionkit.tasks.dual_encoders.ImageClassifier",
                "init_args": {"path": str(clip)},
            },
            "finetuned": {
                "class_path": "fusionkit.tasks.zero_shot.ZeroShotModels",
                "init_args": {
                    "towers": f"{work}/towers/*",
                    "encoder": str(clip),
                    "classes": f"{work}/classes/*.json",
                },
            },
            "private": "head.*",
            "frozen": "visual_projection.*",
            "codec": "emr",
            "bundle": str(tmp_path / "bundle"),
        },
        "data": {
            "class_path": "ImageClassification",
            "init_args": {
                "tasks": {task: str(work / "data" / task) for task in classes},
                "labels": classes,
                "preprocessing": str(clip),
            },
        },
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "logger": False},
        "out": str(tmp_path / "out"),
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content))
    run("compress", "--config", recipe)
    assert "MulticlassAccuracy" in run("test", "--config", recipe)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"scores.json", "scores.csv"}


class TestRefusals:
    def test_an_image_tower_alone(self, clip: Path, work: Path) -> None:
        with pytest.raises(CheckpointError, match="is no dual encoder"):
            dual_encoder(str(work / "towers" / "one"))

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no dual encoder there; expected a folder of"):
            dual_encoder(str(tmp_path))

    def test_a_task_without_classes(self, clip: Path, work: Path) -> None:
        with pytest.raises(DataError, match="nothing is said of two; a head is made of"):
            ZeroShotModels(f"{work}/towers/*", str(clip), {"one": ["a", "b"]})

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ({"templates": ["a photo"]}, "expected {} in it"),
            ({"labels": []}, "one of them is empty"),
            ({"names": ["one"]}, "3 labels and 1 names"),
            ({"templates": "a {}"}, "'templates' is no such list"),
        ],
    )
    def test_files_of_classes(self, tmp_path: Path, content: dict[str, Any], said: str) -> None:
        path = tiny_clip.classes(tmp_path / "t.json", **content)
        with pytest.raises(DataError, match=said):
            ClassPrompts.read(path)

    def test_classes_that_do_not_fit_the_data(self, clip: Path, work: Path) -> None:
        named: Any = {task: ["a"] for task in ("one", "two")}
        found = ZeroShotModels(f"{work}/towers/*", str(clip), named)
        own = ReuseModule(
            ImageClassifier(str(clip)), finetuned=found, private=["head.*"], frozen=FROZEN
        )
        with pytest.raises(FusionKitError, match=r"its head has 1 outputs, .* 3 classes; give"):
            trainer().test(own, data(clip, work), verbose=False)

    def test_a_model_with_a_head_of_its_own(self, clip: Path, work: Path) -> None:
        found = models(clip, work)
        whole = {task: dict(ImageClassifier(str(clip)).state_dict()) for task in found}
        given = ZeroShotModels(whole, str(clip), f"{work}/classes/*.json")  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match="which has a tensor of that name itself"):
            ReuseModule(ImageClassifier(str(clip)), finetuned=given, private=["head.*"]).family()
