"""Language models of many tasks, in one batch whose rows join and leave."""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import talking
import torch
import transformers
from serving.asking import Asked, Judge, ask
from tiny_net import SHARED

import fusionkit
from fusionkit import SVD, Bundle
from fusionkit.errors import FusionKitError, RequestError, UnknownTaskError
from fusionkit.serving.engine import Engine
from fusionkit.serving.requests import Generate, Predict

KINDS = ["llama, tied", "gpt2"]
TASKS = (None, "cats", "dogs")
LETTERS = range(2, 28)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {kind: tmp_path_factory.mktemp("bundle") for kind in KINDS}
    for kind, folder in found.items():
        talking.bundle(kind, folder, talking.TEMPLATE)
    return found


@pytest.fixture(scope="module")
def engine(folders: dict[str, Path]) -> Iterator[Engine]:
    made = Engine(opened(folders[KINDS[0]]), max_batch=6)
    yield made
    made.drain(0)


def opened(folder: Path) -> Bundle:
    return Bundle(folder / "talk.bundle", folder / "base")


def draw_request(draw: random.Random, **settings: Any) -> Generate:
    prompt = tuple(draw.choice(LETTERS) for _ in range(draw.choice([1, 2, 5, 9, 20])))
    streamed = draw.random() < 0.5
    longest = draw.randrange(1, 11)
    return Generate(draw.choice(TASKS), prompt, longest, 0, streamed=streamed, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_is_its_own_tasks(folders: dict[str, Path], kind: str) -> None:
    """Rows of any length join and leave at any moment; more wait than may run."""
    draw, judge = random.Random(0), Judge(opened(folders[kind]))
    engine = Engine(opened(folders[kind]), max_batch=6)
    asked: list[Asked] = []
    for _ in range(60):
        asked.append(ask(engine, draw_request(draw)))
        if draw.random() < 0.3:
            time.sleep(draw.random() * 0.02)
    for each in asked:
        judge.check(each)
    figures = engine.figures()
    assert figures["generated_tokens_total"] == sum(each.last.completion_tokens for each in asked)
    assert max(figures["rows_per_step"]) == 6
    assert max(figures["tasks_per_step"]) == 3
    assert figures["waiting"] == figures["running"] == figures["failures_total"] == 0
    engine.drain(1)


@pytest.mark.parametrize("window", [3, 8])
def test_windows_of_attention_slide_in_each_row(tmp_path: Path, window: int) -> None:
    config = transformers.MistralConfig(
        vocab_size=28,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        sliding_window=window,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.3,
    )
    for seed, name in enumerate(("base", "cats")):
        torch.manual_seed(seed)
        transformers.MistralForCausalLM(config).save_pretrained(tmp_path / name)
    talking.tokenizer().save_pretrained(tmp_path / "base")
    bundle = fusionkit.compress(
        str(tmp_path / "base"), {"cats": str(tmp_path / "cats")}, SVD(16), tmp_path / "b"
    )
    engine, judge, draw = Engine(bundle), Judge(bundle), random.Random(0)
    asked = [
        ask(
            engine,
            Generate(
                draw.choice(TASKS[:2]),
                tuple(draw.choice(LETTERS) for _ in range(draw.choice([1, 4, 30]))),
                draw.randrange(4, 20),
                0,
            ),
        )
        for _ in range(12)
    ]
    for each in asked:
        judge.check(each)
    engine.drain(1)


def test_the_language_models_of_the_zoo(tmp_path: Path) -> None:
    zoo = SHARED / "zoo" / "lm"
    if not zoo.is_dir():
        pytest.skip("the language models (../shared/zoo) are not here")
    paths = {
        path.name: str(path) for path in zoo.iterdir() if path.is_dir() and path.name != "base"
    }
    bundle = fusionkit.compress(str(zoo / "base"), paths, SVD(8), tmp_path / "b")
    engine, judge, draw = Engine(bundle, dtype="fp32"), Judge(bundle), random.Random(0)
    texts = ["Once upon a time", "def main(", "To be or", "What is the", "Free prize!"]
    asked = []
    for _ in range(16):
        task = draw.choice([None, *paths])
        prompt = engine.tokens(task, draw.choice(texts))
        asked.append(ask(engine, Generate(task, prompt, draw.randrange(4, 24), 0)))
    for each in asked:
        judge.check(each)
    engine.drain(1)


def test_a_seeds_draws_do_not_depend_on_the_other_rows(engine: Engine) -> None:
    draw = random.Random(1)
    wanted = [Generate(task, (5, 6), 12, 1.3, 0.9, seed=seed) for task in TASKS for seed in (0, 1)]
    alone = [ask(engine, each).text for each in wanted]
    crowd = [ask(engine, draw_request(draw)) for _ in range(5)]
    together = [ask(engine, each) for each in wanted]
    assert [each.text for each in together] == alone
    assert len({*alone}) == len(alone)
    assert all(each.text is not None for each in crowd)


def test_without_a_seed_answers_differ(engine: Engine) -> None:
    request = Generate("cats", (5,), 12, 2.0)
    assert len({ask(engine, request).text for _ in range(8)}) > 1


@pytest.mark.parametrize("streamed", [True, False])
def test_stop_strings(engine: Engine, streamed: bool) -> None:
    whole = ask(engine, Generate(None, (4, 9), 20, 0)).text
    stop = whole[3:8]
    asked = ask(engine, Generate(None, (4, 9), 20, 0, stop=("#", stop), streamed=streamed))
    assert asked.text == whole[: whole.find(stop)]
    assert asked.last.finish == "stop"
    assert asked.last.completion_tokens < 20
    assert streamed or len(asked.answers) == 1


def test_a_prompt_is_tokens_a_text_or_a_conversation(engine: Engine) -> None:
    messages = [{"role": "user", "content": "a b"}]
    ids = engine.tokens("cats", messages)
    assert ids == engine.tokens("cats", "u a b z")
    texts = {
        ask(engine, Generate("cats", prompt, 8, 0)).text for prompt in (ids, "u a b z", messages)
    }
    assert len(texts) == 1
    with pytest.raises(RequestError, match="the prompt is empty; give at least one token"):
        engine.tokens("cats", "")


def test_an_answer_ends_where_the_context_does(engine: Engine) -> None:
    asked = ask(engine, Generate("dogs", tuple(LETTERS)[:20], 10_000, 0))
    last = asked.last
    assert last.finish == "stop" or last.prompt_tokens + last.completion_tokens == 32


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (
            Generate("cats", (2,) * 32, 1),
            r"has 32 tokens, and the model's context is 32, the answer",
        ),
        (Generate("cats", (2, 40), 1), r"has token 40; .*task 'cats' knows tokens from 0 to 39"),
        (Generate("cats", (-1,), 1), r"has token -1; "),
        (Generate("cats", "", 1), "the prompt is empty"),
        (
            Generate("cats", [{"content": "a"}], 1),
            r"can't write these messages .*each has `role` and `content`",
        ),
    ],
)
def test_what_can_not_be_answered(engine: Engine, request_: Generate, said: str) -> None:
    asked = ask(engine, request_)
    assert isinstance(asked.last, FusionKitError)
    with pytest.raises(FusionKitError, match=said):
        _ = asked.text


def test_what_is_refused_at_once(engine: Engine) -> None:
    with pytest.raises(
        UnknownTaskError, match=r"has no task 'cat'; it has cats, dogs; did you mean"
    ):
        engine.submit(Generate("cat", (1,), 1), print)
    with pytest.raises(RequestError, match=r"generate text, and do nothing else"):
        engine.submit(Predict("cats", "a"), print)
    for wrong, said in (
        ({"max_tokens": 0}, "`max_tokens` of at least 1, got 0"),
        ({"temperature": -1}, "`temperature` of at least 0, got -1"),
        ({"temperature": float("nan")}, "`temperature` of at least 0, got nan"),
        ({"top_p": 0}, "`top_p` above 0 and at most 1, got 0"),
        ({"stop": ("a", "")}, "a `stop` string is empty"),
        ({"prompt": ()}, "the prompt is empty"),
    ):
        with pytest.raises(RequestError, match=said):
            Generate(**{"task": None, "prompt": (1,), "max_tokens": 1, **wrong})
