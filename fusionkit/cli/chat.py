"""`fusionkit chat`."""

import sys
from collections.abc import Iterator

from fusionkit.cli import report
from fusionkit.cli.arguments import call
from fusionkit.cli.table import Table
from fusionkit.errors import FusionKitError, UsageError, meant
from fusionkit.reuse.prompts import Messages
from fusionkit.reuse.speaker import Speaker, open_speaker

_COMMANDS = {
    "/task": "/task NAME switches to another task",
    "/compare": "/compare A B [PROMPT] has two tasks answer, the last prompt if none is given",
    "/tasks": "/tasks lists them",
    "/new": "/new begins anew",
    "/quit": "/quit",
}
_BASE = "base"


def run(args: list[str]) -> None:
    """Talk to a task's language model."""
    call(chat, args, positional="bundle")


def chat(
    bundle: str,
    task: str | None = None,
    base: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Talk to a task's language model; lines of a pipe are read likewise.

    Args:
        bundle: the bundle's folder, or its name on the Hugging Face Hub.
        task: who answers first; by default the bundle's first task.
        base: the base model, if it is not where it was when the bundle was made.
        system: what a conversation begins with, where there is a chat template.
        max_new_tokens: how long an answer may be.
        temperature: 0: the likeliest token, always; else tokens are drawn.
        seed: of what is drawn.
        device: where to run: cpu, cuda; by default the GPU where there is one.
        dtype: fp32, fp16 or bf16; by default the base's.
    """
    import torch

    speaker = open_speaker(
        bundle,
        task,
        base,
        device,
        dtype=dtype,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
    torch.manual_seed(seed)
    session = _Session(speaker, system)
    session.greet()
    for line in _lines():
        try:
            if not session.take(line):
                break
        except FusionKitError as error:
            if not sys.stdin.isatty():
                raise
            report.show(f"error: {error}")
        except KeyboardInterrupt:  # enough of this answer
            print()


def _lines() -> Iterator[str]:
    """What is typed, or comes through a pipe, which is shown then."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (lines can be edited)

        while True:
            try:
                yield input("> ")
            except (EOFError, KeyboardInterrupt):
                print()
                return
    for line in sys.stdin:
        print(f"> {line.rstrip()}", flush=True)
        yield line


class _Session:
    """A conversation: what was said so far, and who answers.

    Args:
        speaker: answers.
        system: what it begins with.
    """

    def __init__(self, speaker: Speaker, system: str | None) -> None:
        self._speaker, self._system = speaker, system
        self._said: Messages = []
        self._last: str | None = None

    def greet(self) -> None:
        """Say who answers, how prompts are understood, and what can be done."""
        tasks = self._speaker.bundle.tasks
        report.show(f"{self._speaker.task} answers, of {len(tasks)} tasks: {', '.join(tasks)}")
        if not self._speaker.has_template:
            report.show(
                "the tokenizer has no chat template: each line is continued as it is, and earlier "
                "ones are not seen"
            )
        report.show("; ".join(_COMMANDS.values()))

    def take(self, line: str) -> bool:
        """Answer a line, or do what it says; whether to go on.

        Raises:
            FusionKitError: there is no such task or command, or the prompt can't be answered.
        """
        line = line.strip()
        if not line:
            return True
        if not line.startswith("/"):
            self._answer(line)
            return True
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return False
        if command == "/new":
            self._said = []
        elif command == "/tasks":
            self._list()
        elif command == "/task":
            self._speaker.switch(self._known(rest.strip()))
            report.show(f"{rest.strip()} answers")
        elif command == "/compare":
            self._compare(rest.split(maxsplit=2))
        else:
            raise UsageError(
                f"no command '{command}'{meant(command, _COMMANDS)}\nthere are "
                + ", ".join(_COMMANDS)
            )
        return True

    def _answer(self, line: str) -> None:
        prompt = self._prompt(line)
        answer = self._speaker.say(self._speaker.tokens(prompt), streamed=True)
        self._last = line
        if not isinstance(prompt, str):
            self._said = [*self._said, _user(line), {"role": "assistant", "content": answer}]

    def _prompt(self, line: str) -> str | Messages:
        """A line after what was said, by the chat template; as it is, where there is none."""
        if not self._speaker.has_template:
            return line
        system = [{"role": "system", "content": self._system}] if self._system else []
        return [*system, *self._said, _user(line)]

    def _list(self) -> None:
        for task in (*self._speaker.bundle.tasks, _BASE):
            mark = "*" if task == (self._speaker.task or _BASE) else " "
            report.show(f"{mark} {task}")

    def _known(self, task: str) -> str | None:
        """A task's name; None for the base, which has none of its own."""
        tasks = self._speaker.bundle.tasks
        if task == _BASE and task not in tasks:
            return None
        if task not in tasks:
            raise UsageError(f"no task '{task}'{meant(task, tasks)}\nthere are {', '.join(tasks)}")
        return task

    def _compare(self, words: list[str]) -> None:
        """Have two tasks answer one prompt after what was said; neither is remembered."""
        line = words[2] if len(words) > 2 else self._last
        if len(words) < 2 or line is None:
            raise UsageError(
                "expected /compare A B PROMPT: two tasks, and what they are asked, if nothing was "
                "asked before"
            )
        if len(words) == 2 and self._said:
            before, self._said = self._said, self._said[:-2]  # as when it was asked
        else:
            before = self._said
        active, found = self._speaker.task, []
        try:
            for task in words[:2]:
                self._speaker.switch(self._known(task))
                found.append(self._speaker.say(self._speaker.tokens(self._prompt(line))))
        finally:
            self._said = before
            self._speaker.switch(active)
        table = Table(line, words[:2], words=2)
        table.add(*(each.strip() for each in found))
        report.show(table)


def _user(line: str) -> dict[str, str]:
    return {"role": "user", "content": line}
