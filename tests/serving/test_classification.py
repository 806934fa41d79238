"""Classifiers of many tasks, in batches of what waits."""

import io
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import talking
import torch
import transformers
from PIL import Image
from serving.asking import ask
from torch import Tensor

import fusionkit
from fusionkit import SVD, Bundle
from fusionkit.errors import RequestError, UnknownTaskError
from fusionkit.serving.engine import Engine
from fusionkit.serving.requests import Generate, Predict, Prediction

LETTERS = talking.LETTERS
SIZES = {"colour": 3, "mood": 5, "size": 1, "tags": 4}


def bert(labels: int, **settings: Any) -> Any:
    config = transformers.BertConfig(
        vocab_size=28,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=labels,
        pad_token_id=1,
        **settings,
    )
    return transformers.BertForSequenceClassification(config).eval()


def compressed(folder: Path, base: Any, tuned: dict[str, Any], **settings: Any) -> Bundle:
    """Models as folders, and their bundle; of a fine-tune all but the head is near the base."""
    base.save_pretrained(folder / "base")
    state = base.state_dict()
    for seed, (task, model) in enumerate(tuned.items()):
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=draw)
                same = name in state and state[name].shape == parameter.shape
                parameter.copy_(state[name] + 0.2 * noise if same else noise)
        model.save_pretrained(folder / task)
    paths = {task: str(folder / task) for task in tuned}
    return fusionkit.compress(str(folder / "base"), paths, SVD(24), folder / "c.bundle", **settings)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Heads of several sizes: one class of several, several of several, a number."""
    folder = tmp_path_factory.mktemp("texts")
    torch.manual_seed(0)
    tuned = {task: bert(count) for task, count in SIZES.items()}
    tuned["colour"].config.id2label = {0: "red", 1: "green", 2: "blue"}
    tuned["tags"].config.problem_type = "multi_label_classification"
    words = talking.tokenizer()
    words.pad_token = "<eos>"
    (folder / "base").mkdir()
    words.save_pretrained(folder / "base")
    return compressed(folder, bert(2), tuned, private=["classifier.*"])


@pytest.fixture(scope="module")
def engine(texts: Bundle) -> Iterator[Engine]:
    made = Engine(texts, max_batch=8)
    yield made
    made.drain(0)


def own(bundle: Bundle, task: str | None, text: Any) -> Tensor:
    """The logits of the task's own model."""
    words = fusionkit.tokenizer(bundle, task)
    texts = (text,) if isinstance(text, str) else text
    with torch.no_grad():
        found: Tensor = fusionkit.load(bundle, task)(**words(*texts, return_tensors="pt")).logits[0]
    return found


def test_every_row_is_its_own_tasks(engine: Engine, texts: Bundle) -> None:
    """Texts and pairs, of any length, waiting together."""
    draw = random.Random(0)
    asked = []
    for _ in range(50):
        parts = tuple(
            " ".join(draw.choice(LETTERS) for _ in range(draw.randrange(1, 12))) for _ in range(2)
        )
        inputs = draw.choice([parts[0], parts])
        asked.append(ask(engine, Predict(draw.choice([*SIZES, None]), inputs)))
    for each in asked:
        request, found = each.request, each.prediction
        logits = own(texts, request.task, request.inputs)  # type: ignore[union-attr]
        if request.task == "size":
            assert found.value == pytest.approx(float(logits), abs=1e-5)
            assert found.label is None
            assert not found.labels
            continue
        expected = logits.sigmoid() if request.task == "tags" else logits.softmax(-1)
        assert found.probabilities == pytest.approx(expected.tolist(), abs=1e-5)
        assert found.label == found.labels[int(expected.argmax())]
        assert len(found.labels) == SIZES.get(request.task or "", 2)
    figures = engine.figures()
    assert max(figures["rows_per_step"]) > 2
    assert max(figures["tasks_per_step"]) > 2
    assert figures["predictions_total"] == 50


def test_classes_have_their_names(engine: Engine) -> None:
    assert ask(engine, Predict("colour", "a b")).prediction.labels == ("red", "green", "blue")
    assert ask(engine, Predict("mood", "a b")).prediction.labels == ("0", "1", "2", "3", "4")
    assert ask(engine, Predict("mood", ["a b", "c"])).prediction.tokens == 3


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ("a " * 40, r"task 'mood' takes texts of 1 to 32 tokens, got 40; shorten the text"),
        ("", r"takes texts of 1 to 32 tokens, got 0"),
        (3, r"takes a text, or a pair of texts, got int"),
        (("a", 3), r"takes a text, or a pair of texts, got tuple"),
        (b"a", r"takes a text, or a pair of texts, got bytes"),
    ],
)
def test_what_can_not_be_classified(engine: Engine, inputs: Any, said: str) -> None:
    asked, good = ask(engine, Predict("mood", inputs)), ask(engine, Predict("mood", "a"))
    with pytest.raises(RequestError, match=said):
        _ = asked.prediction
    assert good.prediction.labels


def test_what_is_refused_at_once(engine: Engine) -> None:
    with pytest.raises(RequestError, match="classify rows, and do nothing else"):
        engine.submit(Generate("mood", (2,), 1), print)
    with pytest.raises(UnknownTaskError, match=r"has no task 'mod'; .*did you mean 'mood'"):
        engine.submit(Predict("mod", "a"), print)


def test_a_prediction_taken_back_is_not_told_of(texts: Bundle) -> None:
    engine, gate = Engine(texts, max_batch=1), threading.Event()
    engine.submit(Predict("mood", "a"), lambda _: gate.wait(10) and None)
    asked = [ask(engine, Predict("mood", "a b c")) for _ in range(2)]
    engine.cancel(asked[0].ticket)
    gate.set()
    assert asked[1].prediction
    engine.drain(5)
    assert not asked[0].answers


def test_a_row_over_which_the_model_fails_ends_alone(
    engine: Engine, texts: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = engine._mixed.model
    forward = model.forward

    def failing(**kwargs: Any) -> Any:
        if (kwargs["input_ids"] == 27).any():
            raise ValueError("no z")
        return forward(**kwargs)

    monkeypatch.setattr(model, "forward", failing)
    asked = [ask(engine, Predict(task, text)) for task in SIZES for text in ("a b", "c d", "y z")]
    for each in asked:
        request: Any = each.request
        if "z" in request.inputs:
            assert str(each.last) == "no z"
        else:
            assert each.prediction


def test_a_base_without_a_head_answers_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tuned = {"colour": bert(3), "mood": bert(5)}
    base = tuned["mood"].bert
    talking.tokenizer().save_pretrained(tmp_path / "base")
    base.config.architectures = None
    headless = transformers.BertModel(base.config)
    bundle = compressed(tmp_path, headless, tuned, private=["classifier.*"])
    engine = Engine(bundle)
    with pytest.raises(UnknownTaskError, match=r"has no head of its own, .*: colour, mood$"):
        engine.submit(Predict(None, "a"), print)
    for task in tuned:
        found = ask(engine, Predict(task, "a b")).prediction.probabilities
        assert found == pytest.approx(own(bundle, task, "a b").softmax(-1).tolist(), abs=1e-5)
    engine.drain(1)


def png(seed: int, size: tuple[int, int] = (20, 14)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def vit(labels: int) -> Any:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=16,
            patch_size=8,
            num_labels=labels,
        )
    )


def test_images_by_a_transformers_processor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(
        tmp_path / "base"
    )
    bundle = compressed(
        tmp_path, vit(2), {"cats": vit(3), "dogs": vit(6)}, private=["classifier.*"]
    )
    engine, processor = Engine(bundle), fusionkit.processor(bundle)
    asked = [ask(engine, Predict(task, png(n))) for n, task in enumerate(["cats", "dogs"] * 4)]
    for seed, each in enumerate(asked):
        image = Image.open(io.BytesIO(png(seed)))
        pixels = processor(images=image, return_tensors="pt")
        model = fusionkit.load(bundle, each.request.task)
        with torch.no_grad():
            expected = model(**pixels).logits[0].softmax(-1)
        assert each.prediction.probabilities == pytest.approx(expected.tolist(), abs=1e-5)
    numbers = pixels["pixel_values"][0]
    same = [ask(engine, Predict("dogs", given)) for given in (numbers.tolist(), numbers.numpy())]
    expected = pytest.approx(asked[-1].prediction.probabilities, abs=1e-5)
    for found in same:
        assert found.prediction.probabilities == expected
    for wrong, said in (
        (b"no image", "takes images, PNG or JPEG, say: cannot identify"),
        ("text", "takes an array of numbers, got str"),
        ([[1, 2], [3]], "takes an array of numbers, got list"),
    ):
        with pytest.raises(RequestError, match=said):
            _ = ask(engine, Predict("cats", wrong)).prediction
    mixed = [ask(engine, Predict("cats", np.zeros((3, side, side)))) for side in (16, 9, 16)]
    assert mixed[0].prediction.labels == mixed[2].prediction.labels
    with pytest.raises(Exception, match="size"):
        _ = mixed[1].prediction
    engine.drain(1)


def test_images_as_timm_has_them(tmp_path: Path) -> None:
    timm: Any = pytest.importorskip("timm", reason="pip install .[vision]")
    settings = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}

    def saved(name: str, classes: int) -> Any:
        torch.manual_seed(classes)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=classes, **settings).eval()
        model.pretrained_cfg["mean"] = (0.1 * classes,) * 3
        timm.models.save_for_hf(
            model,
            tmp_path / name,
            {"label_names": [f"{name} {n}" for n in range(classes)]},
            model_args=settings,
            safe_serialization=True,
        )
        return model

    tuned = {"cats": saved("cats", 3), "dogs": saved("dogs", 5)}
    saved("base", 2)
    paths = {task: str(tmp_path / task) for task in tuned}
    bundle = fusionkit.compress(
        str(tmp_path / "base"), paths, SVD(16), tmp_path / "b", private=["head.*"]
    )
    engine = Engine(bundle)
    asked = [ask(engine, Predict(task, png(n))) for n, task in enumerate(["cats", "dogs"] * 3)]
    for seed, each in enumerate(asked):
        model = tuned[str(each.request.task)]
        config = timm.data.resolve_model_data_config(model) | {"input_size": (3, 16, 16)}
        transform = timm.data.create_transform(**config, is_training=False)
        pixels = transform(Image.open(io.BytesIO(png(seed))))
        with torch.no_grad():
            expected = fusionkit.load(bundle, each.request.task)(pixels[None])[0].softmax(-1)
        found: Prediction = each.prediction
        assert found.probabilities == pytest.approx(expected.tolist(), abs=1e-5)
        assert found.labels[0] == f"{each.request.task} 0"
    engine.drain(1)
