"""The bodies of requests and responses, which the server's OpenAPI schema describes.

A field of OpenAI's API is here if it is followed, or if a value of it asks for nothing; all others
are refused, by name.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Base64Bytes, BaseModel, ConfigDict, Field, FiniteFloat
from typing_extensions import TypeAliasType


def _whole(text: str) -> str:
    """Refuse half of a surrogate pair, which JSON can hold, and no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds half a character, a lone surrogate") from error
    return text


Chars = Annotated[str, AfterValidator(_whole)]
Nothing = Literal[False] | None
Zero = Annotated[float, Field(ge=0, le=0)] | None
Token = Annotated[int, Field(ge=0, lt=2**31)]
Numbers = TypeAliasType("Numbers", "FiniteFloat | list[Numbers]")


class Body(BaseModel):
    """What a client sends: no field but those that there are, no value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class StreamOptions(Body):
    """What a stream is to have beside the answer."""

    include_usage: bool | None = Field(None, description="end with how many tokens there were")


class Asking(Body):
    """What is asked of a language model, however its prompt is given."""

    model: Chars | None = Field(
        None,
        description="the task that answers, one of GET /v1/models; where the server has a router, "
        "none, or auto, has it pick the task",
    )
    max_tokens: int | None = Field(None, ge=1, description="the answer's length in tokens, at most")
    temperature: float | None = Field(
        None, ge=0, le=2, description="from 0, the likeliest token always, to 2; 1 if not given"
    )
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="above 0 and at most 1: tokens are drawn from the likeliest that have this "
        "probability together",
    )
    stop: (
        Annotated[Chars, Field(min_length=1)]
        | Annotated[list[Annotated[Chars, Field(min_length=1)]], Field(max_length=4)]
        | None
    ) = Field(None, description="a text at which the answer ends, or up to four")
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="a number from 0: the same makes the same draws"
    )
    stream: bool | None = Field(None, description="whether to send the answer piece by piece")
    stream_options: StreamOptions | None = Field(
        None, description="with `stream` alone: {include_usage: true}"
    )
    user: Chars | None = Field(None, description="a text, which is not used")
    n: Annotated[int, Field(ge=1, le=1)] | None = Field(None, description="1, if anything")
    presence_penalty: Zero = Field(None, description="0, if anything")
    frequency_penalty: Zero = Field(None, description="0, if anything")

    @property
    def stops(self) -> tuple[Chars, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionBody(Asking):
    """`POST /v1/completions`."""

    prompt: (
        Chars
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Chars], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1)]
    ) = Field(description="what to go on with: a text, a list of texts, tokens, or lists of tokens")
    echo: Nothing = Field(None, description="false, if anything")
    best_of: Annotated[int, Field(ge=1, le=1)] | None = Field(None, description="1, if anything")
    logprobs: None = Field(None, description="null, if anything")

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """Each prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [tuple(self.prompt)]
        return [each if isinstance(each, str) else tuple(each) for each in self.prompt]


class TextPart(Body):
    """A part of a message that has several."""

    type: Literal["text"]
    text: Chars


class Message(Body):
    """What was said in a conversation, and by whom."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Chars | Annotated[list[TextPart], Field(min_length=1)]
    name: Chars | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        name = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": text, **name}


class TextFormat(Body):
    """An answer as it comes."""

    type: Literal["text"]


class ChatBody(Asking):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(
        min_length=1,
        description="a list of {role, content}; roles: system, developer, user, assistant; "
        "content: a text, or parts of type text",
    )
    max_completion_tokens: int | None = Field(None, ge=1, description="the same as `max_tokens`")
    logprobs: Nothing = Field(None, description="false, if anything")
    response_format: TextFormat | None = Field(None, description="{type: text}, if anything")


class Pair(Body):
    """Two texts that are classified together."""

    text: Chars
    pair: Chars


class Image(Body):
    """A picture."""

    image: Base64Bytes = Field(description="a PNG or JPEG file, in Base64")


class Values(Body):
    """What the model itself takes."""

    values: list[Numbers] = Field(description="numbers, in lists as the model's input has axes")


Input = Chars | Pair | Image | Values


class PredictBody(Body):
    """`POST /predict`."""

    task: Chars | None = Field(
        None,
        description="the task that answers, one of GET /tasks; where the server has a router, "
        "none, or auto, has it pick the task",
    )
    inputs: Input | Annotated[list[Input], Field(min_length=1)] = Field(
        description="a text; {text, pair}; {image} in Base64; {values}; or a list of such"
    )

    @property
    def rows(self) -> list[Any]:
        """Each input, as `Predict` takes it."""
        inputs = self.inputs if isinstance(self.inputs, list) else [self.inputs]
        return [_row(each) for each in inputs]


def _row(given: Input) -> Any:
    if isinstance(given, Pair):
        return (given.text, given.pair)
    if isinstance(given, Image):
        return given.image
    return given.values if isinstance(given, Values) else given


class AddBody(Body):
    """`POST /tasks`."""

    name: Chars = Field(min_length=1, description="what the task is to be called")
    path: Chars = Field(
        min_length=1, description="its model: a folder or file, below the server's --tasks-root"
    )
