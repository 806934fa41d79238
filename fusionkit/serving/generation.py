"""Texts of many tasks, token by token: rows join and leave between steps."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache

from fusionkit.errors import RequestError
from fusionkit.reuse.mixed_batch import MixedBatch
from fusionkit.serving.calls import Calls
from fusionkit.serving.requests import Answer, Generate, Ticket
from fusionkit.serving.row_cache import RowCache
from fusionkit.serving.rows import Row
from fusionkit.serving.sampling import next_tokens
from fusionkit.serving.served_tasks import ServedTask
from fusionkit.serving.work import Tally, answered, by_task, no_memory, release

_PROMPTS = 8192
"""Tokens of prompts, padding included, that one call reads at most, but for a longer prompt."""
_FAULTS = 3
"""Steps that may fail one after the other without any row that fails by itself."""
_PATIENCE = 64
"""Steps after which one row more may run, where memory ran out before."""
_TOGETHER = 8
"""Of so many rows one: as many places are to be free before rows join, where more rows wait than
there is room for, and before rows that ended leave. Other rows cost what is worked out for them."""

Told = list[tuple[Row, Answer]]
"""What rows' clients are to be told."""


class Generation:
    """The rows that run, and one model that goes on with all of them, a token a step.

    Args:
        model: the base, which `mixed` is of.
        mixed: answers each row by its task.
        max_rows: how many rows may run at once.
        tally: counts what is done.

    Raises:
        FusionKitError: the model does not answer rows of a batch as it answers them alone.

    Attributes:
        rows: those that run, and some that ended; of one task side by side, as the model goes
            through them task by task.
        resumed: rows that memory had no room for; they join again with what they have.
    """

    def __init__(self, model: Any, mixed: MixedBatch, max_rows: int, tally: Tally) -> None:
        self._model, self._mixed, self._tally = model, mixed, tally
        self._calls = Calls(model, mixed, tally)
        self._calls.check()
        self._max_rows = self._most = max_rows
        self._faults = 0
        self._cache = RowCache()
        self.rows: list[Row] = []
        self.resumed: list[Row] = []

    @property
    def running(self) -> list[Row]:
        """The rows that run, and those that have to join again."""
        return [*(row for row in self.rows if not row.ended), *self.resumed]

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values."""
        return self._cache.nbytes

    def row(self, ticket: Ticket, task: ServedTask) -> Row:
        """A row for a request.

        Raises:
            RequestError: the prompt is longer than the context, or has what is no token.
            FusionKitError: as of `ServedTask.tokens`.
        """
        asked = ticket.request
        assert isinstance(asked, Generate)
        prompt, longest = task.tokens(asked.prompt), asked.max_tokens
        config = self._model.config.get_text_config()
        if context := getattr(config, "max_position_embeddings", None):
            if len(prompt) >= context:
                raise RequestError(
                    f"the prompt has {len(prompt)} tokens, and the model's context is {context}, "
                    "the answer included; shorten the prompt"
                )
            longest = min(longest, context - len(prompt))
        known = self._mixed.classes(task.name) or self._model.get_input_embeddings().num_embeddings
        if not 0 <= min(prompt) <= max(prompt) < known:
            wrong = next(token for token in prompt if not 0 <= token < known)
            raise RequestError(
                f"the prompt has token {wrong}; {task.label} knows tokens from 0 to {known - 1}"
            )
        return Row(ticket, task, prompt, longest)

    def choose(self, waiting: Sequence[Row]) -> list[Row]:
        """As many as there is room for; if that is little, and more wait, none for a while."""
        running = len(self.running)
        room = max(self._most - running, 0)
        few = room < min(len(waiting), self._most // _TOGETHER)
        return [] if few and running else [*waiting[:room]]

    def turn(self, rows: Sequence[Row]) -> Told:
        """Rows join; then a token for each."""
        room = max(self._most - len(self.running) + len(self.resumed) - len(rows), 0)
        again, self.resumed = self.resumed[:room], self.resumed[room:]
        told = self.join([*again, *rows]) if again or rows else []
        return told + (self.step() if self.rows else [])

    def cancelled(self, row: Row) -> Answer:
        """What the answer had, and that it ends."""
        return row.end("cancelled")

    def join(self, rows: Sequence[Row]) -> Told:
        """Read rows' prompts; each has its first token then.

        A row whose prompt the model fails over ends with the error; the others don't notice.
        """
        self._arrange()
        told: Told = []
        for group in _of_size(sorted(rows, key=lambda row: row.length)):
            for part, found in answered(by_task(group), self._read):
                if not isinstance(found, Exception):
                    self._cache.join(found[1], [row.length for row in part])
                    self.rows += part
                    told += self._taken(part, found[0])
                elif no_memory(found) and self.rows:
                    self.resumed += part
                    self._most = len(self.rows)
                else:
                    told += [(row, found) for row in part]
        self._arrange()
        return told

    def step(self) -> Told:
        """A token for each row.

        Where the model fails over all rows, it is tried over each task's, and where it fails over
        these, over each row: rows over which it fails by themselves end with the error.
        """
        try:
            logits = self._ahead(self.rows, self._cache)
        except Exception as error:  # whatever a model, or a codec's plugin, raises
            failed = error
        else:
            self._cache.advance()
            self._faults = 0
            if self._tally.steps % _PATIENCE == 0:
                self._most = min(self._most + 1, self._max_rows)
            told = self._taken(self.rows, logits)
            ended = sum(row.ended for row in self.rows)
            if ended == len(self.rows) or ended >= max(self._most // _TOGETHER, 1):
                self._arrange()
            return told
        return self._mended(failed)

    def drop(self, rows: Collection[Row]) -> None:
        """Let rows go."""
        for row in rows:
            row.ended = True
        self.resumed = [row for row in self.resumed if not row.ended]
        self._arrange()

    def _read(self, rows: Sequence[Row]) -> tuple[Tensor, DynamicCache]:
        """Prompts → logits `(rows, vocabulary)` of what follows, and keys and values."""
        self._tally.prompt_tokens += sum(row.length for row in rows)
        return self._calls.read([row.task.name for row in rows], [row.tokens for row in rows])

    def _ahead(self, rows: Sequence[Row], cache: RowCache) -> Tensor:
        """The last tokens → logits `(rows, vocabulary)` of what follows."""
        names, last = [row.task.name for row in rows], [row.answer[-1] for row in rows]
        return self._calls.ahead(names, last, [row.length for row in rows], cache)

    def _taken(self, rows: Sequence[Row], logits: Tensor) -> Told:
        live = [place for place, row in enumerate(rows) if not row.ended]
        if len(live) < len(rows):
            rows, logits = [rows[place] for place in live], logits[live]
        tokens = next_tokens(logits, [row.draw for row in rows])
        self._tally.tokens += len(rows)
        told: Told = []
        for row, token in zip(rows, tokens, strict=True):
            try:
                piece: Answer | None = row.take(token)
            except Exception as error:  # of its tokenizer
                row.ended, piece = True, error
            if piece is not None:
                told.append((row, piece))
        return told

    def _arrange(self) -> None:
        """Rows that ended leave; those of a task are put side by side."""
        order = _side_by_side(self.rows)
        if order != [*range(len(self.rows))]:
            self._cache.arrange(order)
            self.rows = [self.rows[place] for place in order]

    def _mended(self, error: Exception) -> Told:
        """After a failed step: rows over which the model fails by themselves end."""
        release(error)
        self._arrange()
        if no_memory(error) and len(self.rows) > 1:
            self._most = len(self.rows) // 2
            self.resumed += self.rows[self._most :]
            self._cache.arrange([*range(self._most)])
            self.rows = self.rows[: self._most]
            return []
        places = {row: place for place, row in enumerate(self.rows)}
        told: Told = []

        def tried(rows: Sequence[Row]) -> None:
            self._ahead(rows, self._cache.part([places[row] for row in rows]))

        if len(self.rows) > 1:
            for part, found in answered(self.rows, tried):
                told += [(row, found) for row in part] if isinstance(found, Exception) else []
            self._faults += 1
        if not told and (len(self.rows) == 1 or self._faults >= _FAULTS):
            told = [(row, error) for row in self.rows]
        self.drop([row for row, _ in told])
        return told


def _of_size(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows, the shortest first, in groups that one call can read."""
    group: list[Row] = []
    for row in rows:
        if group and (len(group) + 1) * row.length > _PROMPTS:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _side_by_side(rows: Sequence[Row]) -> list[int]:
    """The places of rows that go on, those of a task side by side; as few as can be are moved."""
    places: dict[str | None, list[int]] = {}
    for place, row in enumerate(rows):
        if not row.ended:
            places.setdefault(row.task.name, []).append(place)
    order: list[int] = []
    for own in places.values():
        wanted = range(len(order), len(order) + len(own))
        moved = iter([place for place in own if place not in wanted])
        order += [place if place in own else next(moved) for place in wanted]
    return order
