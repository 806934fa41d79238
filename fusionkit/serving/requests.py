"""What the engine is asked, and what it answers: of one task each, in a batch of many."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fusionkit.errors import RequestError
from fusionkit.reuse.prompts import Messages

Finish = Literal["stop", "length", "cancelled"]
"""Why an answer ended: by itself or at a stop string; it was as long as may be; nobody waits."""


@dataclass(frozen=True)
class Generate:
    """A text to go on with.

    Settings are OpenAI's, and so are their defaults: what a model's `generation_config.json` says
    of sampling is not used, but for the tokens that end an answer.

    Attributes:
        task: whose model answers; None: the base.
        prompt: a text, a conversation as chat templates take it, or tokens, at least one.
        max_tokens: the answer's length, at most; it ends sooner where the context is full.
        temperature: 0: the likeliest token always; else tokens are drawn, below 1 from a sharper
            distribution.
        top_p: in (0, 1]: tokens are drawn from the likeliest that have this probability together.
        stop: strings at which the answer ends; they are not in it.
        seed: the same makes the same draws, whatever else is in the batch; None: any.
        streamed: pieces as they come; else one with all of the answer, which costs less.

    Raises:
        RequestError: a setting is out of its range.
    """

    task: str | None
    prompt: str | Messages | tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    streamed: bool = True

    def __post_init__(self) -> None:
        if self.prompt == ():
            raise RequestError("the prompt is empty; give at least one token")
        if self.max_tokens < 1:
            raise RequestError(f"expected `max_tokens` of at least 1, got {self.max_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise RequestError(f"expected `temperature` of at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"expected `top_p` above 0 and at most 1, got {self.top_p}")
        if not all(self.stop):
            raise RequestError("a `stop` string is empty; leave it out")


@dataclass(frozen=True)
class Predict:
    """A row to be classified.

    Attributes:
        task: whose model answers; None: the base.
        inputs: a text; a pair of texts, as a tuple; an image, encoded (PNG, JPEG), as bytes; or
            numbers, as an array or nested lists: what the model itself takes, without the batch's
            axis.
    """

    task: str | None
    inputs: Any


@dataclass(frozen=True)
class Piece:
    """A part of a generated answer.

    Attributes:
        text: what came since the last piece, in whole characters.
        tokens: how many tokens were generated since the last piece, special ones too.
        finish: why the answer ends with this piece; None: it goes on.
        prompt_tokens: of the last piece: the prompt's tokens.
        completion_tokens: of the last piece: the answer's.
    """

    text: str
    tokens: int
    finish: Finish | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Prediction:
    """What a task's model says of a row.

    Attributes:
        labels: the names of the task's classes, in the order of its head's rows; their numbers
            where they have no names. Of a task that predicts a number, none.
        probabilities: of each class; together 1, but where several classes may hold at once.
        value: the number that the task predicts; None for classes.
        tokens: how many tokens the text has.
    """

    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    value: float | None = None
    tokens: int = 0

    @property
    def label(self) -> str | None:
        """The likeliest class; None of a task that predicts a number."""
        if not self.labels:
            return None
        return self.labels[max(range(len(self.labels)), key=self.probabilities.__getitem__)]


Request = Generate | Predict
Answer = Piece | Prediction | Exception
"""An error is the last answer to a request, as a `Prediction` and a piece with `finish` are."""
To = Callable[[Answer], None]


@dataclass(eq=False)
class Ticket:
    """A request that was taken; `Engine.cancel` takes it back.

    Attributes:
        request: what was asked.
        to: who is told, from the engine's thread: it must not block.
        cancelled: whether it was taken back.
    """

    request: Request
    to: To
    cancelled: bool = False
