"""OpenAI's API over a bundle's language models: a model is a task."""

import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fusionkit.serving.asked_task import task_of
from fusionkit.serving.bodies import Asking, ChatBody, CompletionBody
from fusionkit.serving.failures import RefusedError, failure, no_task
from fusionkit.serving.gate import Record, record_of
from fusionkit.serving.link import Asked, Link
from fusionkit.serving.messages import Text
from fusionkit.serving.requests import Piece
from fusionkit.serving.responses import ChatCompletion, Completion, Model, ModelList
from fusionkit.serving.settings import Limits

BASE = "base"
"""The model's name that means the base, where no task has it."""
_COMPLETION_TOKENS = 16
"""How long a completion is where nobody says, as OpenAI has it."""
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
}


@dataclass(frozen=True)
class Form:
    """How an endpoint writes its answers.

    Attributes:
        whole: the name of an answer's kind.
        chunk: of a piece's.
        prefix: what answers' ids begin with.
        chat: whether a choice is a message, or a text.
    """

    whole: str
    chunk: str
    prefix: str
    chat: bool

    def choice(self, place: int, text: str, finish: str | None) -> dict[str, Any]:
        """An answer's choice."""
        message = {"role": "assistant", "content": text, "refusal": None}
        said = {"message": message} if self.chat else {"text": text}
        return {"index": place, **said, "logprobs": None, "finish_reason": finish}

    def delta(self, place: int, text: str, finish: str | None, first: bool) -> dict[str, Any]:
        """A piece's choice."""
        if not self.chat:
            return self.choice(place, text, finish)
        said = {"role": "assistant", "content": text} if first else {"content": text}
        if finish is not None and not text and not first:
            said = {}
        return {"index": place, "delta": said, "logprobs": None, "finish_reason": finish}


_COMPLETION = Form("text_completion", "text_completion", "cmpl-", False)
_CHAT = Form("chat.completion", "chat.completion.chunk", "chatcmpl-", True)


def router(link: Link, limits: Limits) -> APIRouter:
    """The routes.

    Args:
        link: the line to the model's process.
        limits: how much may be asked.
    """
    routes, started = APIRouter(tags=["language models"]), int(time.time())

    def model(task: str) -> Model:
        return Model(id=task, object="model", created=started, owned_by="fusionkit")

    @routes.get("/v1/models")
    async def models() -> ModelList:
        """The tasks, and the base."""
        return ModelList(object="list", data=[model(task) for task in names_of(link)])

    @routes.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Model:
        """One of them."""
        if name not in names_of(link):
            raise no_task(name, link.tasks, "model")
        return model(name)

    @routes.post("/v1/completions", response_model=Completion, responses=_STREAM)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Go on with a prompt, or with each of several."""
        tokens = body.max_tokens or _COMPLETION_TOKENS
        return await _answer(link, limits, _COMPLETION, body, body.prompts, tokens, request)

    @routes.post("/v1/chat/completions", response_model=ChatCompletion, responses=_STREAM)
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer in a conversation."""
        if body.max_tokens and body.max_completion_tokens:
            raise RefusedError(400, "give `max_tokens` or `max_completion_tokens`, not both")
        tokens = body.max_completion_tokens or body.max_tokens or limits.tokens
        messages = [message.plain() for message in body.messages]
        return await _answer(link, limits, _CHAT, body, [messages], tokens, request)

    return routes


def names_of(link: Link) -> list[str]:
    """The models' names: the tasks', and the base's."""
    return [*link.tasks, *([] if BASE in link.tasks else [BASE])]


async def _answer(
    link: Link,
    limits: Limits,
    form: Form,
    body: Asking,
    prompts: Sequence[Any],
    tokens: int,
    request: Request,
) -> Response:
    record = record_of(request.scope)
    if tokens > limits.tokens:
        raise RefusedError(
            400,
            f"`max_tokens`: this server's answers have at most {limits.tokens}, got {tokens}",
            param="max_tokens",
        )
    if len(prompts) > limits.rows:
        raise RefusedError(
            400,
            f"`prompt`: a request has at most {limits.rows} prompts here, got {len(prompts)}; send "
            "several requests",
            param="prompt",
        )
    if body.stream_options is not None and not body.stream:
        raise RefusedError(400, "`stream_options` is for `stream` alone", param="stream_options")
    model, picked = await task_of(link, body.model, names_of(link), "model", prompts, record)
    task = None if model == BASE and BASE not in link.tasks else model
    settings = {
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "stop": body.stops,
        "seed": body.seed,
        "streamed": bool(body.stream),
    }
    asked = link.ask([Text(task, each, tokens, settings) for each in prompts], record.deadline)
    record.closing.append(asked.close)
    writer = _Writer(form, body, {"model": model, **picked}, record, len(prompts), limits.seconds)
    if not body.stream:
        return await writer.whole(asked)
    answers = asked.answers()
    return EventStream(writer.events(await anext(answers), answers))


class _Writer:
    """Writes an answer, as a whole or piece by piece.

    Args:
        form: the endpoint's.
        body: what was asked.
        head: what each part of the answer says: the model, and how it was picked.
        record: of the request.
        count: how many prompts there are.
        seconds: that a request has.
    """

    def __init__(
        self,
        form: Form,
        body: Asking,
        head: Mapping[str, Any],
        record: Record,
        count: int,
        seconds: float,
    ) -> None:
        self._form, self._body, self._record = form, body, record
        self._count, self._seconds = count, seconds
        number = f"{form.prefix}{record.number}"
        self._head = {"id": number, "created": int(time.time()), **head}

    async def whole(self, asked: Asked) -> Response:
        """The answer as one."""
        texts, ends = [""] * self._count, [""] * self._count
        async for place, piece in asked.answers():
            texts[place] += piece.text
            ends[place] = piece.finish or ""
            self._counted(piece)
        choices = [
            self._form.choice(place, text, end)
            for place, (text, end) in enumerate(zip(texts, ends, strict=True))
        ]
        content = {
            **self._head,
            "object": self._form.whole,
            "choices": choices,
            "usage": self._usage(),
        }
        return Response(json.dumps(content), media_type="application/json")

    async def events(
        self, first: tuple[int, Piece], answers: AsyncIterator[tuple[int, Piece]]
    ) -> AsyncIterator[bytes]:
        """Its pieces as server-sent events; of an error after the first, the error."""
        options = self._body.stream_options
        counts = options is not None and bool(options.include_usage)
        unused = {"usage": None} if counts else {}
        begun: set[int] = set()
        yield self._event([self._delta(*first, begun)], unused)
        try:
            async for place, piece in answers:
                yield self._event([self._delta(place, piece, begun)], unused)
        except Exception as error:
            told = failure(error, self._record.number, self._seconds)
            self._record.status = told.status
            yield b"data: " + json.dumps(told.content()).encode() + b"\n\n"
            return
        if counts:
            yield self._event([], {"usage": self._usage()})
        yield b"data: [DONE]\n\n"

    def _delta(self, place: int, piece: Piece, begun: set[int]) -> dict[str, Any]:
        first = place not in begun
        begun.add(place)
        self._counted(piece)
        return self._form.delta(place, piece.text, piece.finish, first)

    def _event(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> bytes:
        content = {
            **self._head,
            "object": self._form.chunk,
            "choices": choices,
            **more,
        }
        return b"data: " + json.dumps(content).encode() + b"\n\n"

    def _counted(self, piece: Piece) -> None:
        self._record.prompt_tokens += piece.prompt_tokens
        self._record.completion_tokens += piece.tokens

    def _usage(self) -> dict[str, int]:
        read, made = self._record.prompt_tokens, self._record.completion_tokens
        return {
            "prompt_tokens": read,
            "completion_tokens": made,
            "total_tokens": read + made,
        }


class EventStream(Response):
    """Server-sent events, each sent as it comes."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
