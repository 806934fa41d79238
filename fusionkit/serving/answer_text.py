"""Text out of tokens as they come: whole characters only, and an end at stop strings."""

from collections.abc import Sequence
from typing import Any

_CONTEXT = 5
"""So many tokens of the prompt are decoded with the first of the answer, which tells whether a
space stands between them."""
_HALF = "\ufffd"
"""What a character decodes to of which tokens are lacking."""


class AnswerText:
    """One answer's text: what follows the prompt's in the text of both, special tokens left out.

    Args:
        tokenizer: the task's.
        prompt: the prompt's tokens.
        stop: strings at which the answer ends.

    Attributes:
        stopped: whether a stop string came; nothing follows then.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-_CONTEXT:])
        self._read = len(self._tokens)
        self._known = self._decoded(self._tokens)
        self._stop = stop
        self._held = ""
        self.stopped = False

    def add(self, tokens: Sequence[int]) -> str:
        """What can be told now: no half of a character, nothing that may begin a stop string."""
        self._tokens += tokens
        text = self._decoded(self._tokens)
        if len(text) <= len(self._known) or text.endswith(_HALF):
            return ""
        return self._told(text)

    def end(self) -> str:
        """What was held back, when no token follows."""
        text = self._told(self._decoded(self._tokens))
        held, self._held = self._held, ""
        return text + held

    def _told(self, text: str) -> str:
        new = self._held + text[len(self._known) :]
        # The last tokens stay as the context of the next: spaces depend on it.
        self._tokens = self._tokens[self._read :] or self._tokens
        self._read, self._known = len(self._tokens), self._decoded(self._tokens)
        if self.stopped:
            return ""
        found = [place for stop in self._stop if (place := new.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return new[: min(found)]
        kept = max((_beginning(new, stop) for stop in self._stop), default=0)
        told, self._held = new[: len(new) - kept], new[len(new) - kept :]
        return told

    def _decoded(self, tokens: Sequence[int]) -> str:
        found: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return found


def _beginning(text: str, stop: str) -> int:
    """How many characters at a text's end may begin a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
