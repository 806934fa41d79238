"""The bodies of responses, which the server's OpenAPI schema describes."""

from typing import Literal

from pydantic import BaseModel


class Usage(BaseModel):
    """How many tokens there were."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Routed(BaseModel):
    """What the router picked, and how sure it is."""

    task: str
    probability: float


class CompletionChoice(BaseModel):
    """An answer to a prompt."""

    index: int
    text: str
    logprobs: None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """Answers to `POST /v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    router: Routed | None = None


class Reply(BaseModel):
    """What the model says in a conversation."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """An answer to a conversation."""

    index: int
    message: Reply
    logprobs: None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """The answer to `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    router: Routed | None = None


class Model(BaseModel):
    """A task, as OpenAI's API lists models."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"]
    data: list[Model]


class Predicted(BaseModel):
    """What a task's model says of an input.

    Attributes:
        label: the likeliest class; null where the task predicts a number.
        probabilities: of each class.
        value: the number that the task predicts; null where it has classes.
    """

    label: str | None
    probabilities: dict[str, float]
    value: float | None


class PredictUsage(BaseModel):
    """How many tokens were read."""

    prompt_tokens: int


class Predictions(BaseModel):
    """The answer to `POST /predict`, an item for each input."""

    task: str
    predictions: list[Predicted]
    usage: PredictUsage
    router: Routed | None = None


class Served(BaseModel):
    """A task that is served."""

    name: str
    bytes: int


class TaskList(BaseModel):
    """All of them, and what their models do."""

    kind: Literal["generation", "classification"]
    tasks: list[Served]
    router: bool = False


class State(BaseModel):
    """How the server is."""

    status: str
