"""OpenAI's API, by OpenAI's own client over a real server; answers as transformers gives them."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from served import Served

from fusionkit import Bundle
from fusionkit.reuse.speaker import Speaker

pytestmark = pytest.mark.slow
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6}
CHAT = [{"role": "user", "content": "d"}]


@pytest.fixture(scope="module")
def client(talker: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{talker.url}/v1", api_key="any", max_retries=0)


@pytest.fixture(scope="module")
def said(models: Path) -> dict[str, dict[str, str]]:
    """What each task, and the base, says to prompts and to a conversation, one at a time."""
    speaker = Speaker(Bundle(models / "talk.bundle"), "cats", max_new_tokens=6)
    found: dict[str, dict[str, str]] = {}
    for task in ("cats", "dogs", None):
        speaker.switch(task)
        prompts = {text: speaker.say(speaker.tokens(text)) for text in ("b c", "d", "e f g")}
        chat = speaker.say(speaker.tokens(CHAT))
        found[task or "base"] = {name: text.strip() for name, text in prompts.items()}
        found[task or "base"]["chat"] = chat.strip()
    assert len({each["chat"] for each in found.values()} - {""}) > 1
    return found


def test_each_task_answers_as_its_own_model(
    client: openai.OpenAI, said: dict[str, dict[str, str]]
) -> None:
    assert [model.id for model in client.models.list()] == ["cats", "dogs", "base"]
    assert client.models.retrieve("dogs").owned_by == "fusionkit"

    def ask(task: str, prompt: str) -> str:
        return client.completions.create(model=task, prompt=prompt, **GREEDY).choices[0].text

    asked = [(task, prompt) for task in said for prompt in ("b c", "d", "e f g")] * 4
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda each: ask(*each), asked))
    expected = [said[task][prompt] for task, prompt in asked]
    assert [text.strip() for text in found] == expected


def test_a_conversation_and_its_stream(
    client: openai.OpenAI, said: dict[str, dict[str, str]]
) -> None:
    for task in ("cats", "dogs"):
        whole = client.chat.completions.create(model=task, messages=CHAT, **GREEDY)  # type: ignore[arg-type]
        message, usage = whole.choices[0].message, whole.usage
        assert (message.content or "").strip() == said[task]["chat"]
        assert message.role == "assistant"
        assert usage is not None
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        stream = client.chat.completions.create(
            model=task,
            messages=CHAT,  # type: ignore[arg-type]
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
        *chunks, last = list(stream)
        pieces = [chunk.choices[0] for chunk in chunks]
        assert "".join(each.delta.content or "" for each in pieces) == message.content
        assert pieces[0].delta.role == "assistant"
        assert pieces[-1].finish_reason == whole.choices[0].finish_reason
        assert all(each.finish_reason is None for each in pieces[:-1])
        assert (last.choices, last.usage) == ([], usage)
        assert len({chunk.id for chunk in [*chunks, last]}) == 1


def test_parts_of_a_message_are_one_text(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "b "}, {"type": "text", "text": "c"}]
    both = [
        client.chat.completions.create(
            model="cats",
            messages=[{"role": "user", "content": content}],  # type: ignore[list-item]
            **GREEDY,
        )
        for content in ("b c", parts)
    ]
    assert both[0].choices == both[1].choices


def test_several_prompts_and_tokens(client: openai.OpenAI, said: dict[str, dict[str, str]]) -> None:
    both = client.completions.create(model="dogs", prompt=["b c", "d"], **GREEDY)
    assert [c.text.strip() for c in both.choices] == [said["dogs"]["b c"], said["dogs"]["d"]]
    assert [choice.index for choice in both.choices] == [0, 1]
    tokens = client.completions.create(model="dogs", prompt=[[3, 4], [5]], **GREEDY)
    assert [c.text for c in tokens.choices] == [c.text for c in both.choices]
    assert tokens.usage == both.usage
    streamed = client.completions.create(model="dogs", prompt=["b c", "d"], stream=True, **GREEDY)
    texts = ["", ""]
    for chunk in streamed:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in both.choices]


def test_a_seed_makes_the_same_draws(client: openai.OpenAI) -> None:
    def drawn(seed: int) -> str:
        found = client.completions.create(model="cats", prompt="b", max_tokens=12, seed=seed)
        return found.choices[0].text

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(8)}) > 1


def test_a_stop_ends_the_answer(client: openai.OpenAI, said: dict[str, dict[str, str]]) -> None:
    whole = said["dogs"]["b c"]
    before, last = whole[:-2], whole[-1]
    assert before
    assert last not in before
    found = client.completions.create(model="dogs", prompt="b c", stop=[f" {last}"], **GREEDY)
    assert found.choices[0].text.strip() == before
    assert found.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": 3}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True}, "echo"),
        ({"suffix": "z"}, "suffix"),
        ({"logit_bias": {"3": 1}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"extra_body": {"min_p": 0.1}}, "min_p"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    client: openai.OpenAI, more: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="cats", prompt="b", **more)
    assert refused.value.param == param
    assert f"`{param}`" in refused.value.message


@pytest.mark.parametrize("field", ["tools", "tool_choice", "functions", "audio", "modalities"])
def test_so_is_what_chats_may_have(client: openai.OpenAI, field: str) -> None:
    with pytest.raises(openai.BadRequestError, match=f"`{field}` is not supported") as refused:
        client.chat.completions.create(model="cats", messages=CHAT, extra_body={field: []})  # type: ignore[arg-type]
    assert (refused.value.param, refused.value.code) == (field, "unsupported")


def test_an_unknown_model_is_told_with_those_that_are_there(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there are cats, dogs; did you mean 'cats'"):
        client.completions.create(model="cots", prompt="b")
    with pytest.raises(openai.NotFoundError, match="there are cats, dogs"):
        client.models.retrieve("none/such")


def test_a_prompt_that_is_too_long_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="4100 tokens"):
        client.completions.create(model="cats", prompt="b " * 4100)
