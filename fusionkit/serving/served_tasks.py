"""What the engine knows of each task beside its weights: tokenizer, ends of answers, classes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.config import config_of
from fusionkit.checkpoints.from_config import CONFIG
from fusionkit.errors import BundleError, RequestError
from fusionkit.reuse.beside import files_for, generation_config, tokenizer, tokenizer_digest
from fusionkit.reuse.prompts import Messages, prompt_tokens
from fusionkit.tasks.class_names import named_classes

Says = Literal["classes", "several", "number"]
"""What a head says: which class it is, which of several hold, or a number."""


@dataclass(frozen=True)
class Words:
    """A tokenizer, which several tasks may have; used by one thread at a time.

    Attributes:
        tokenizer: transformers' own.
        lock: to be held while it is used.
    """

    tokenizer: Any
    lock: Lock = field(default_factory=Lock)


@dataclass(frozen=True)
class ServedTask:
    """A task, or the base.

    Attributes:
        name: the task's; None: the base.
        label: how messages call it.
        words: its tokenizer; None: it has none.
        ends: tokens that end an answer.
        labels: its classes' names; None: they have none.
        says: what its head says.
    """

    name: str | None
    label: str
    words: Words | None
    ends: frozenset[int] = frozenset()
    labels: tuple[str, ...] | None = None
    says: Says = "classes"

    def need_words(self) -> Words:
        """Its tokenizer.

        Raises:
            BundleError: it has none.
        """
        if self.words is None:
            raise BundleError(
                f"{self.label} has no tokenizer, nor has the base; put the tokenizer's files "
                "beside the base's weights, or give a base that has them"
            )
        return self.words

    def tokens(self, prompt: str | Messages | tuple[int, ...]) -> tuple[int, ...]:
        """A prompt as the model reads it.

        Raises:
            FusionKitError: it has no tokenizer, or no chat template, or that refuses the messages.
            RequestError: there is nothing in the prompt.
        """
        if not isinstance(prompt, tuple):
            words = self.need_words()
            with words.lock:
                found = prompt_tokens(words.tokenizer, prompt, f"{self.label}: its tokenizer")
            prompt = tuple(found)
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token")
        return prompt


class ServedTasks:
    """The tasks that were asked for, each looked at once; from any thread.

    Args:
        bundle: whose.
        generates: whether its models generate text; they classify rows otherwise.
    """

    def __init__(self, bundle: Bundle, generates: bool) -> None:
        self._bundle, self._generates = bundle, generates
        self._known: dict[str | None, ServedTask] = {}
        self._words: dict[str, Words] = {}
        self._lock = Lock()

    def known(self, task: str | None) -> ServedTask | None:
        """A task that was looked at before."""
        return self._known.get(task)

    def find(self, task: str | None) -> ServedTask:
        """A task, looked at now unless it was before, which takes up to seconds.

        Raises:
            BundleError: a file of it can't be read.
        """
        if (found := self.known(task)) is not None:  # without waiting for another's first look
            return found
        with self._lock:
            if task not in self._known:
                self._known[task] = self._found(task)
            return self._known[task]

    def forget(self, task: str) -> None:
        """The task is gone, or another."""
        with self._lock:
            self._known.pop(task, None)

    def _found(self, task: str | None) -> ServedTask:
        files = files_for(self._bundle, task)
        label = f"{self._bundle.path}: {'its base' if task is None else f'task {task!r}'}"
        words = self._words_of(task)
        config = config_of(self._bundle, files) or {}
        if self._generates:
            return ServedTask(task, label, words, ends=_ends(files, config, self._bundle))
        return ServedTask(task, label, words, labels=_labels(files), says=_says(config))

    def _words_of(self, task: str | None) -> Words | None:
        key = tokenizer_digest(self._bundle, task)
        if key not in self._words:
            try:
                self._words[key] = Words(tokenizer(self._bundle, task))
            except BundleError:
                return None
        return self._words[key]


def _ends(
    files: Mapping[str, bytes | Path], config: Mapping[str, Any], bundle: Bundle
) -> frozenset[int]:
    """The tokens that end an answer, as `generate` would know them."""
    from transformers import AutoConfig

    made = AutoConfig.for_model(**config) if "model_type" in config else None
    said = generation_config(files, made, bundle).eos_token_id if made is not None else None
    return frozenset([said] if isinstance(said, int) else said or ())


def _labels(files: Mapping[str, bytes | Path]) -> tuple[str, ...] | None:
    found = named_classes(files.get(CONFIG))
    return None if found is None else tuple(found)


def _says(config: Mapping[str, Any]) -> Says:
    """By `problem_type`, as transformers' classes go by it."""
    kind = config.get("problem_type")
    count = len(config["id2label"]) if config.get("id2label") else config.get("num_labels")
    if kind == "regression" or (kind is None and count == 1):
        return "number"
    return "several" if kind == "multi_label_classification" else "classes"
