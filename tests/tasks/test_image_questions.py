"""Questions about images, the whole way; judged by transformers called by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_clip
import tiny_vision_language
import torch
import yaml
from PIL import Image
from program import run
from tiny_tasks import trainer

import fusionkit
from fusionkit import SVD, ReuseModule
from fusionkit.errors import CheckpointError, DataError
from fusionkit.tasks.image_questions import ImageQuestions
from fusionkit.tasks.models import image_text_lm, processor_of

QUESTIONS = ["the cat", "a dog", "who sat on the mat", "what", "hat or cat", "the"]
PROMPT = "{image} {question}?"
NEW = {"max_new_tokens": 4}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vision_language.llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tiny_clip.images(tmp_path_factory.mktemp("images"), rows=2)
    return sorted((folder / "test").glob("*/*.png"))


def rows_of(path: Path, images: list[Path], answers: list[Any]) -> Path:
    found = [
        {"image": str(image), "question": question, "answer": answer}
        for image, question, answer in zip(images, QUESTIONS, answers, strict=True)
    ]
    path.write_text("\n".join(map(json.dumps, found)))
    return path


def said_by_hand(model: Any, processor: Any, image: Path, text: str) -> str:
    inputs = processor(text=text, images=Image.open(image).convert("RGB"), return_tensors="pt")
    made = model.generate(**inputs, do_sample=False, **NEW)[:, inputs["input_ids"].shape[1] :]
    decoded: str = processor.tokenizer.decode(made[0], skip_special_tokens=True)
    return decoded.strip()


def tuned_of(folder: Path, out: Path) -> Any:
    model = tiny_clip.changed(image_text_lm(str(folder)), 1)
    model.save_pretrained(out)
    return model.eval()


class TestWholeWay:
    def test_compressed_switched_scored_and_predicted(
        self, llava: Path, images: list[Path], tmp_path: Path
    ) -> None:
        model = tuned_of(llava, tmp_path / "tuned")
        processor = processor_of(str(llava))
        texts = [f"<image> {question}?" for question in QUESTIONS]
        said = [
            said_by_hand(model, processor, image, text)
            for image, text in zip(images, texts, strict=True)
        ]
        answers = [[text, "x"] if place % 3 else ["no"] for place, text in enumerate(said)]
        data = ImageQuestions(
            {"vqa": str(rows_of(tmp_path / "vqa.jsonl", images, answers))},
            str(llava),
            prompt=PROMPT,
            generation=NEW,
            batch_size=4,
        )
        reuse = ReuseModule(image_text_lm(str(llava)), finetuned={"vqa": str(tmp_path / "tuned")})
        reuse.compress(tmp_path / "bundle", codec=SVD(rank=32, dtype="fp32"))
        reused = ReuseModule(image_text_lm(str(llava)), bundle=tmp_path / "bundle")
        trainer().test(reused, data, verbose=False)
        assert reused.scores is not None
        assert reused.scores.values["vqa"] == pytest.approx(4 / 6)
        assert reused.scores.interval("vqa") is not None
        predicted = {row["row"]: row["prediction"] for row in fusionkit.predict(reused, data)}
        assert [predicted[row] for row in range(len(said))] == said
        assert len(set(said)) > 1

    def test_loss_is_that_of_the_answers(
        self, llava: Path, images: list[Path], tmp_path: Path
    ) -> None:
        """Row by row, without padding, as transformers computes it of labels."""
        model: Any = image_text_lm(str(llava))
        processor = processor_of(str(llava))
        answers = ["cat", "a dog ate", "the log", "on", "hat", "the cat sat"]
        path = rows_of(tmp_path / "t.jsonl", images, answers)
        data = ImageQuestions({"t": str(path)}, str(llava), prompt=PROMPT)
        (batch,) = data.test_dataloader()[0]
        total, count = 0.0, 0
        for image, question, answer in zip(images, QUESTIONS, answers, strict=True):
            picture = Image.open(image).convert("RGB")
            asked = processor(text=f"<image> {question}?", images=picture, return_tensors="pt")
            own = data.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"] + [2]
            ids = torch.cat([asked["input_ids"], torch.tensor([own])], 1)
            labels = ids.clone()
            labels[:, : -len(own)] = -100
            with torch.no_grad():
                loss = model(input_ids=ids, pixel_values=asked["pixel_values"], labels=labels).loss
            total, count = total + float(loss) * len(own), count + len(own)
        kind: Any = data.kinds["t"]
        with torch.no_grad():
            assert float(kind.loss_of(model, batch)) == pytest.approx(total / count, rel=1e-4)
            first = kind.first(batch, 2)
            assert kind.count(first) == len(first["references"]) == 2
            said, whole = kind.answers(model, first), kind.answers(model, batch)
        assert kind.texts(said) == kind.texts(whole)[:2]

    def test_by_the_chat_template(self, llava: Path, images: list[Path], tmp_path: Path) -> None:
        path = rows_of(tmp_path / "t.jsonl", images, ["x"] * 6)
        data = ImageQuestions({"t": str(path)}, str(llava))
        assert data.prompt == "user: <image>{question}assistant:"

    def test_images_in_parts(self, images: list[Path], tmp_path: Path) -> None:
        """Idefics 3, and so SmolVLM, cuts a large image into more parts than a small one."""
        folder = tiny_vision_language.idefics3(tmp_path / "idefics3")
        wide = tmp_path / "wide.png"
        Image.open(images[0]).resize((60, 20)).save(wide)
        model, processor = image_text_lm(str(folder)), processor_of(str(folder))
        shown = [wide, *images[1:]]
        texts = [f"<image> {question}?" for question in QUESTIONS]
        said = [
            said_by_hand(model, processor, image, text)
            for image, text in zip(shown, texts, strict=True)
        ]
        path = rows_of(tmp_path / "t.jsonl", shown, ["x"] * 6)
        data = ImageQuestions({"t": str(path)}, str(folder), prompt=PROMPT, generation=NEW)
        (batch,) = data.test_dataloader()[0]
        kind: Any = data.kinds["t"]
        with torch.no_grad():
            assert kind.texts(kind.answers(model, batch)) == said
            assert torch.isfinite(kind.loss_of(model, batch))


def test_a_recipe(llava: Path, images: list[Path], tmp_path: Path) -> None:
    tuned_of(llava, tmp_path / "tuned")
    content = {
        "model": {
            "model": {
                "class_path": "fusionkit.tasks.models.image_text_lm",
                "init_args": {"path": str(llava)},
            },
            "finetuned": {"vqa": str(tmp_path / "tuned")},
            "codec": "emr",
            "metric": "WordF1",
        },
        "data": {
            "class_path": "image_questions",
            "init_args": {
                "tasks": {"vqa": str(rows_of(tmp_path / "vqa.jsonl", images, ["x"] * 6))},
                "processor": str(llava),
                "prompt": PROMPT,
                "generation": NEW,
            },
        },
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "logger": False},
        "out": str(tmp_path / "out"),
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content))
    assert "WordF1" in run("test", "--config", recipe)


class TestRefusals:
    def test_no_processor(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no processor there"):
            ImageQuestions({"t": str(tmp_path)}, str(tmp_path))

    def test_a_prompt_without_an_image(self, llava: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"expected {image} and {question} in it"):
            ImageQuestions({"t": str(tmp_path)}, str(llava), prompt="{question}")

    def test_no_model(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no Hugging Face model there"):
            image_text_lm(str(tmp_path))

    def test_a_row_without_an_answer(self, llava: Path, images: list[Path], tmp_path: Path) -> None:
        path = rows_of(tmp_path / "t.jsonl", images, [*["x"] * 5, []])
        with pytest.raises(DataError, match="line 6: expected an answer, or a list of such"):
            ImageQuestions({"t": str(path)}, str(llava), prompt=PROMPT).read("t", "test")
