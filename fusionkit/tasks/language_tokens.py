"""Texts, answers and chats as a language model's tokens."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fusionkit.checkpoints.paths import open_path, written_out
from fusionkit.errors import DataError
from fusionkit.tasks.language_rows import Question
from fusionkit.tasks.models import tokenizer_of

Cut = Literal["left"]
"""Which end of a prompt that is too long is left out."""
LastPiece = Literal["keep", "drop"]
"""What becomes of a text's last piece, which is shorter than the others."""

_LONG = 1024
"""Tokens of a row, where neither a setting nor the tokenizer says how many."""
_MARKED = re.compile(r"\{%-?\s*generation\b")
"""Of a chat template that says itself which tokens are the assistant's."""


class LanguageTokens:
    """A tokenizer, and how rows are made of its tokens.

    Args:
        path: where the tokenizer is; see `tokenizer_of`.
        max_length: tokens of a row, at most; by default as many as the tokenizer says, or 1,024.
        end: put the token that ends a sequence after each answer, and between texts.
        cut: leave out the beginning (`left`) of a prompt that is too long; None: refuse it.
        chat_template: a Jinja template, or its file, in place of the tokenizer's own.

    Raises:
        DataError: there is no tokenizer, or no such file.
    """

    def __init__(
        self,
        path: str,
        max_length: int | None = None,
        end: bool = True,
        cut: Cut | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.path = written_out(path)
        self.tokenizer = tokenizer_of(path)
        own = self.tokenizer.model_max_length
        self.max_length = max_length or (own if own < 10**6 else _LONG)
        self.cut = cut
        self.end = [self.tokenizer.eos_token_id] if end else []
        if self.end == [None]:
            raise DataError(
                f"{path}: its tokenizer has no token that ends a sequence; `end: false`"
            )
        if chat_template is not None:
            self.tokenizer.chat_template = _template(chat_template)

    def pieces(self, texts: Sequence[str], packed: bool, last: LastPiece) -> list[list[int]]:
        """Texts in pieces of at most `max_length` tokens, each after a token that begins one.

        Args:
            texts: one or more; several are each ended, if `end`.
            packed: as one text, one after the other; or each in pieces of its own.
            last: what becomes of a piece that is shorter.
        """
        ended = self.end if len(texts) > 1 else []
        found = [[*self._bare(text), *ended] for text in texts]
        if packed:
            found = [[token for tokens in found for token in tokens]]
        size, begin = self.max_length - 1, self._begin
        starts = [(tokens, at) for tokens in found for at in range(0, len(tokens), size)]
        cut = [tokens[at : at + size] for tokens, at in starts]
        return [[*begin, *piece] for piece in cut if last == "keep" or len(piece) == size]

    def answered(self, prompt: str, answer: str, at: str) -> tuple[list[int], int]:
        """A prompt and an answer.

        Args:
            prompt: what is asked.
            answer: what is answered.
            at: how messages call the row.

        Returns:
            tokens, and how many of them, at the beginning, are the prompt's.

        Raises:
            DataError: they are too long.
        """
        bare = prompt.rstrip(" ")  # a space belongs to the word that follows
        answer = prompt[len(bare) :] + answer
        first, whole = self._begun(bare), self._begun(bare + answer)
        fits = whole[: len(first)] == first
        rest = [*(whole[len(first) :] if fits else self._bare(answer)), *self.end]
        first = self._fitting(first, self.max_length - len(rest), at)
        return [*first, *rest], len(first)

    def chat(self, messages: list[dict[str, Any]], at: str) -> tuple[list[int], list[bool]]:
        """A chat, by the tokenizer's template.

        Args:
            messages: objects with `role` and `content`.
            at: how messages of ours call the row.

        Returns:
            tokens, and which of them the assistant said.

        Raises:
            DataError: there is no template, it can't tell what the assistant said, or they are too
                long.
        """
        if _MARKED.search(self._known_template(at)):
            found = self._applied(messages, at, return_assistant_tokens_mask=True)
            tokens, said = found["input_ids"], [bool(each) for each in found["assistant_masks"]]
        else:
            tokens = self._applied(messages, at)["input_ids"]
            said = [False] * len(tokens)
            for place, message in enumerate(messages):
                if message["role"] != "assistant":
                    continue
                before = self._applied(messages[:place], at, add_generation_prompt=True)
                after = self._applied(messages[: place + 1], at)["input_ids"]
                start = len(before["input_ids"])
                if tokens[:start] != before["input_ids"] or tokens[: len(after)] != after:
                    raise DataError(
                        f"{at}: which tokens are the assistant's can't be told: by the chat "
                        "template a chat does not begin as its first messages alone do; give one "
                        "with {% generation %} around what the assistant says, in `chat_template`"
                    )
                said[start : len(after)] = [True] * (len(after) - start)
        if not any(said):
            raise DataError(f"{at}: by the chat template the assistant says nothing in it")
        kept = self._fitting(tokens, self.max_length, at)
        return kept, said[-len(kept) :]

    def prompt(self, question: Question, room: int) -> list[int]:
        """What is to be answered, without an answer.

        Args:
            question: a prompt or a chat.
            room: tokens that are kept free for the answer.

        Raises:
            DataError: as of `answered` and `chat`.
        """
        if isinstance(question.prompt, str):
            tokens = self._begun(question.prompt.rstrip(" "))
        else:
            self._known_template(question.at)
            chat = question.prompt[:-1]
            tokens = self._applied(chat, question.at, add_generation_prompt=True)["input_ids"]
        return self._fitting(tokens, self.max_length - room, question.at)

    def source(self, prompt: str, at: str) -> list[int]:
        """A prompt as an encoder reads it.

        Raises:
            DataError: it is too long.
        """
        return self._fitting(self._tokens(prompt), self.max_length, at)

    def target(self, answer: str) -> list[int]:
        """An answer as a decoder says it, cut to `max_length`."""
        tokens: list[int] = self.tokenizer(text_target=answer, verbose=False)["input_ids"]
        return tokens[: self.max_length]

    @property
    def _begin(self) -> list[int]:
        """The token that a sequence begins with: what lm-eval takes, too."""
        known = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return [token for token in known if token is not None][:1]

    def _tokens(self, text: str, **settings: Any) -> list[int]:
        found: list[int] = self.tokenizer(text, verbose=False, **settings)["input_ids"]
        return found

    def _bare(self, text: str) -> list[int]:
        return self._tokens(text, add_special_tokens=False)

    def _begun(self, text: str) -> list[int]:
        """Tokens with what the tokenizer puts before them, and nothing after them."""
        tokens = self._tokens(text)
        if len(tokens) > 1 and tokens[-1] == self.tokenizer.eos_token_id:
            bare = self._bare(text)
            tokens = tokens if bare[-1:] == tokens[-1:] else tokens[:-1]
        return tokens or self._begin

    def _fitting(self, tokens: list[int], room: int, at: str) -> list[int]:
        """The last tokens of a prompt, as many as there is room for.

        Raises:
            DataError: that would cut it, and is not asked for; or there is no room.
        """
        if len(tokens) <= room:
            return tokens
        over = (
            f"{at}: has {len(tokens)} tokens, and `max_length`, {self.max_length}, has room for "
            + ("no more" if room == self.max_length else f"{max(room, 0)} beside the answer's")
        )
        if room < 1 or self.cut is None:
            cut = "`cut: left` leaves out its beginning, or " if room >= 1 else ""
            raise DataError(f"{over}; {cut}give a larger `max_length`, up to the model's context")
        return tokens[-room:]

    def _known_template(self, at: str) -> str:
        template = getattr(self.tokenizer, "chat_template", None)
        if not template:
            raise DataError(
                f"{at}: is a chat, and the tokenizer {self.path} has no chat template; give one, "
                "Jinja or its file, in `chat_template`, or rows of 'prompt' and 'completion'"
            )
        if isinstance(template, Mapping):
            template = template.get("default") or next(iter(template.values()))
        return str(template)

    def _applied(self, messages: list[dict[str, Any]], at: str, **settings: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, **settings
            )
        except (TemplateError, ValueError, IndexError) as error:
            raise DataError(f"{at}: the chat template refuses its messages ({error})") from error


def _template(given: str) -> str:
    """A template, or what its file has."""
    if "{" in given:
        return given
    path: Path = open_path(given)
    if not path.is_file():
        raise DataError(f"{given}: no such file; `chat_template` is Jinja, or a file of it")
    return path.read_text(encoding="utf-8")
