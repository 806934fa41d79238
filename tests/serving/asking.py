"""An engine asked, and the tasks' own models beside it as judges."""

import threading
from dataclasses import dataclass, field
from typing import Any

import torch

import fusionkit
from fusionkit import Bundle
from fusionkit.serving.engine import Engine
from fusionkit.serving.requests import Answer, Generate, Piece, Prediction, Request

LONG = 30.0
"""Seconds after which an answer will not come."""


@dataclass
class Asked:
    """A request, and what came of it."""

    request: Request
    answers: list[Answer] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)
    ticket: Any = None

    def take(self, answer: Answer) -> None:
        assert not self.ended.is_set(), f"{answer} after {self.answers[-1]}"
        self.answers.append(answer)
        self.begun.set()
        if not isinstance(answer, Piece) or answer.finish is not None:
            self.ended.set()

    @property
    def last(self) -> Any:
        assert self.ended.wait(LONG), f"no answer to {self.request}"
        return self.answers[-1]

    @property
    def text(self) -> str:
        """A generated answer's."""
        if isinstance(self.last, Exception):
            raise self.last
        return "".join(piece.text for piece in self.answers if isinstance(piece, Piece))

    @property
    def prediction(self) -> Prediction:
        if isinstance(self.last, Exception):
            raise self.last
        assert isinstance(self.last, Prediction)
        return self.last


def ask(engine: Engine, request: Request) -> Asked:
    asked = Asked(request)
    asked.ticket = engine.submit(request, asked.take)
    return asked


class Judge:
    """Each task's own model, by itself, and transformers' `generate`."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._known: dict[str | None, tuple[Any, Any]] = {}

    def own(self, task: str | None) -> tuple[Any, Any]:
        if task not in self._known:
            words = fusionkit.tokenizer(self._bundle, task)
            self._known[task] = (fusionkit.load(self._bundle, task), words)
        return self._known[task]

    def check(self, asked: Asked) -> None:
        """An answer is what the task's model says, token for token."""
        request = asked.request
        assert isinstance(request, Generate)
        assert isinstance(request.prompt, tuple)
        model, words = self.own(request.task)
        prompt = torch.tensor([request.prompt])
        with torch.no_grad():
            made = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=request.max_tokens,
                do_sample=False,
                pad_token_id=0,
            )[0].tolist()
        ends = model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else {*(ends or ())}
        count = len(made) - len(request.prompt)
        before = len(words.decode(request.prompt, skip_special_tokens=True))
        kept = made[:-1] if made[-1] in ends else made
        assert asked.text == words.decode(kept, skip_special_tokens=True)[before:], request
        last = asked.last
        assert last.finish == ("stop" if made[-1] in ends else "length")
        assert (last.prompt_tokens, last.completion_tokens) == (len(request.prompt), count)
        assert sum(piece.tokens for piece in asked.answers) == count  # type: ignore[union-attr]
