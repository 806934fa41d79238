"""One generated answer as it grows."""

from dataclasses import dataclass, field

from fusionkit.serving.answer_text import AnswerText
from fusionkit.serving.requests import Finish, Generate, Piece, Ticket
from fusionkit.serving.sampling import Draw, generator
from fusionkit.serving.served_tasks import ServedTask


@dataclass(eq=False)
class Row:
    """An answer.

    Attributes:
        ticket: whose.
        task: the task, or the base.
        prompt: its tokens.
        longest: how many tokens the answer may have: as asked, or as the context has room for.
        answer: the tokens so far.
        ended: whether it is all there.
    """

    ticket: Ticket
    task: ServedTask
    prompt: tuple[int, ...]
    longest: int
    answer: list[int] = field(default_factory=list)
    ended: bool = False

    def __post_init__(self) -> None:
        asked = self.ticket.request
        assert isinstance(asked, Generate)
        self.draw = Draw(asked.temperature, asked.top_p, generator(asked.seed))
        self._text = AnswerText(self.task.need_words().tokenizer, self.prompt, asked.stop)
        self._streamed = asked.streamed
        self._by_token = asked.streamed or bool(asked.stop)
        self._new, self._told = "", 0

    @property
    def length(self) -> int:
        """How many tokens the prompt and the answer so far have."""
        return len(self.prompt) + len(self.answer)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The prompt, and the answer so far."""
        return (*self.prompt, *self.answer)

    def take(self, token: int) -> Piece | None:
        """Go on with a token; what the client is told now."""
        self.answer.append(token)
        last = token in self.task.ends
        if self._by_token and not last:
            self._new += self._text.add([token])
        if last or self._text.stopped:
            return self.end("stop")
        if len(self.answer) >= self.longest:
            return self.end("length")
        return self._piece() if self._new and self._streamed else None

    def end(self, why: Finish) -> Piece:
        """The last piece."""
        self.ended = True
        if not self._by_token:
            last = self.answer and self.answer[-1] in self.task.ends
            self._new += self._text.add(self.answer[:-1] if last else self.answer)
        self._new += self._text.end()
        return self._piece(why)

    def _piece(self, why: Finish | None = None) -> Piece:
        new, tokens = self._new, len(self.answer) - self._told
        self._new, self._told = "", len(self.answer)
        usage = (0, 0) if why is None else (len(self.prompt), len(self.answer))
        return Piece(new, tokens, why, *usage)
