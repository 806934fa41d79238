"""What lies there for a language model: a text, rows of texts, prompts with answers, chats."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fusionkit.errors import DataError
from fusionkit.tasks.columns import has_labels
from fusionkit.tasks.data import Split
from fusionkit.tasks.table import MissingSplitError, Table, quoted
from fusionkit.tasks.table_files import names_of_split, read_table, text_of

Form = Literal["texts", "choices", "completions", "chats"]
"""What a row is: a text; a prompt, choices, and which is right; a prompt and its completion; a
chat."""

PLAIN_FILES = (".txt", ".txt.gz")
"""Files that are one text each."""

_COLUMNS: dict[Form, tuple[str, ...]] = {
    "choices": ("prompt", "choices", "answer"),
    "completions": ("prompt", "completion"),
    "chats": ("messages",),
    "texts": ("text",),
}
"""The columns that a row of each form has; of several that fit, the first counts."""


@dataclass(frozen=True)
class LanguageRows:
    """One split of one task.

    Attributes:
        form: what its rows are.
        table: the rows.
    """

    form: Form
    table: Table


@dataclass(frozen=True)
class Question:
    """A prompt, or a chat, and what is to be answered.

    Attributes:
        at: how messages call the row.
        prompt: text, or a chat's messages, the answer's own being the last.
        answers: texts that would be right; or, of choices, all of them.
        choice: which of the choices is right; None where all answers are.
    """

    at: str
    prompt: str | list[dict[str, Any]]
    answers: list[str]
    choice: int | None = None

    @property
    def right(self) -> list[str]:
        """The answers that are right; the first is the one that is learned."""
        return self.answers if self.choice is None else [self.answers[self.choice]]


def read_rows(
    path: Path,
    split: Split,
    called: Mapping[str, str] | None = None,
    columns: Mapping[str, str] | None = None,
) -> LanguageRows:
    """Read one split of a task.

    Args:
        path: a plain text file, or a folder of such, or rows: see `read_table`.
        split: which.
        called: `train` and `test` → what they are called.
        columns: `prompt`, `text`, … → what the data call it.

    Raises:
        MissingSplitError: there is no such split.
        DataError: it can't be read, or its rows are of no form that is known.
    """
    if plain := plain_file(path, split, called):
        text = text_of(plain)
        if not text.strip():
            raise DataError(f"{plain}: has no text")
        return LanguageRows("texts", Table(str(plain), ("text",), [{"text": text}], (1,)))
    table = _renamed(read_table(path, split, called), columns or {})
    form = form_of(table.columns)
    if form is None:
        forms = "; ".join(quoted(names) for names in _COLUMNS.values())
        raise DataError(
            f"{table.where}: has the columns {quoted(table.columns)}, and rows for a language "
            f"model have {forms}; `columns` says what they are called: {{prompt: question}}, say"
        )
    return LanguageRows(form, table)


def form_of(columns: Iterable[str]) -> Form | None:
    """What rows with some columns are; None where they are nothing for a language model."""
    there = set(columns)
    return next((form for form, names in _COLUMNS.items() if there.issuperset(names)), None)


def is_language(columns: Sequence[str]) -> bool:
    """Whether rows are for a language model, and not texts with labels."""
    form = form_of(columns)
    return form is not None and (form != "texts" or not has_labels(columns))


def plain_file(path: Path, split: Split, called: Mapping[str, str] | None = None) -> Path | None:
    """The file of plain text that is a task's split; None where its rows are something else.

    Raises:
        MissingSplitError: it is one file of plain text, whose text is for testing.
    """
    names = names_of_split(split, called)
    if "{split}" in path.name and path.name.endswith(PLAIN_FILES):
        files = [path.with_name(path.name.replace("{split}", name)) for name in names]
        found = next((file for file in files if file.is_file()), None)
        if found is None:
            looked = ", ".join(file.name for file in files)
            raise MissingSplitError(f"{path}: no such file; looked for {looked}")
        return found
    if path.is_file() and path.name.endswith(PLAIN_FILES):
        if split == "train":
            raise MissingSplitError(
                f"{path}: is one file, and its text is for testing; put text to train on beside "
                f"it: a folder with train{path.suffix} and test{path.suffix}"
            )
        return path
    files = [path / f"{name}{ending}" for name in names for ending in PLAIN_FILES]
    return next((file for file in files if file.is_file()), None)


def texts(rows: LanguageRows) -> list[str]:
    """The texts of rows that are such.

    Raises:
        DataError: a row has none.
    """
    return [_text(value, rows.table, row, "text") for row, value in _column(rows, "text")]


def questions(rows: LanguageRows) -> list[Question]:
    """The prompts, and what is to be answered, of rows that are such.

    Raises:
        DataError: a row lacks one of them, or has something else there.
    """
    table = rows.table
    if rows.form == "chats":
        return [_chat(table.at(row), value) for row, value in _column(rows, "messages")]
    prompts = [_text(value, table, row, "prompt") for row, value in _column(rows, "prompt")]
    if rows.form == "completions":
        answers = [_answers(table, row, value) for row, value in _column(rows, "completion")]
        found = zip(prompts, answers, strict=True)
        return [Question(table.at(row), *each) for row, each in enumerate(found)]
    choices = [_choices(table, row, value) for row, value in _column(rows, "choices")]
    right = [_right(table, row, value, choices[row]) for row, value in _column(rows, "answer")]
    return [
        Question(table.at(row), *each)
        for row, each in enumerate(zip(prompts, choices, right, strict=True))
    ]


def _column(rows: LanguageRows, name: str) -> Iterable[tuple[int, Any]]:
    return enumerate(rows.table.column(name))


def _renamed(table: Table, columns: Mapping[str, str]) -> Table:
    """A table with columns called as we call them."""
    if not columns:
        return table
    for name in columns.values():
        table.check_column(name, "columns")
    ours = {theirs: name for name, theirs in columns.items()}
    names = tuple(ours.get(name, name) for name in table.columns)
    rows = [{ours.get(name, name): value for name, value in row.items()} for row in table.rows]
    return replace(table, columns=names, rows=rows, lines=table.lines or range(1, len(rows) + 1))


def _text(value: Any, table: Table, row: int, column: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{table.at(row)}: expected a text in '{column}', got {type(value).__name__}"
        )
    return value


def _answers(table: Table, row: int, value: Any) -> list[str]:
    found = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not found:
        raise DataError(f"{table.at(row)}: expected a text in 'completion', got an empty list")
    return [_text(each, table, row, "completion") for each in found]


def _choices(table: Table, row: int, value: Any) -> list[str]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) < 2:
        raise DataError(
            f"{table.at(row)}: expected two or more texts in 'choices', got {str(value)[:40]}"
        )
    return [_text(each, table, row, "choices") for each in value]


def _right(table: Table, row: int, value: Any, choices: list[str]) -> int:
    if isinstance(value, str) and value in choices:
        return choices.index(value)
    if isinstance(value, int) and 0 <= value < len(choices):
        return value
    raise DataError(
        f"{table.at(row)}: expected in 'answer' which of its {len(choices)} choices is right, from "
        f"0 on, or its text; got {str(value)[:40]!r}"
    )


def _chat(at: str, value: Any) -> Question:
    messages = list(value) if isinstance(value, Sequence) else []
    known = [isinstance(each, Mapping) and {"role", "content"} <= each.keys() for each in messages]
    if not messages or not all(known):
        raise DataError(
            f"{at}: expected in 'messages' a list of objects with 'role' and 'content', got "
            f"{str(value)[:40]}"
        )
    last = messages[-1]
    if last["role"] != "assistant":
        raise DataError(
            f"{at}: its last message is of '{last['role']}'; the answer, of 'assistant', comes last"
        )
    return Question(at, messages, [last["content"]])
