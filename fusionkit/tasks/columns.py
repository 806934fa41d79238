"""Which of a table's columns are meant: as a setting says, or as data sets commonly call them."""

from collections.abc import Sequence

from fusionkit.errors import DataError
from fusionkit.tasks.table import Table

_LABELS = ("label", "labels", "fine_label", "cls", "class", "category", "target", "score")
_IMAGES = (
    *("image", "img", "jpg", "png", "webp"),  # of WebDataset's files, their endings
    *("path", "file", "file_name", "filename", "image_path", "filepath"),
)
_CAPTIONS = ("caption", "captions", "text", "texts", "sentence", "sentences", "sentences_raw")
_QUESTIONS = ("question", "prompt", "query", "text")
_ANSWERS = ("answer", "answers", "completion", "multiple_choice_answer", "label", "labels")
_TEXTS = ("text", "sentence", "content")
_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
)


def label_column(table: Table, given: str | None) -> str:
    """The column of the labels.

    Args:
        table: the rows.
        given: what a setting says.

    Raises:
        DataError: there is no such column, or it can't be told.
    """
    return _column(table, given, _LABELS, "labels", "label")


def text_columns(table: Table, given: str | Sequence[str] | None, label: str) -> list[str]:
    """The column of the texts, or those of the first and the second.

    Args:
        table: the rows.
        given: what a setting says.
        label: the column of the labels.

    Raises:
        DataError: there is no such column, or it can't be told.
    """
    if given is not None:
        names = [given] if isinstance(given, str) else list(given)
        if not 1 <= len(names) <= 2:
            raise DataError(f"expected one column of texts (`text`), or two, got {len(names)}")
        return [table.check_column(name, "text") for name in names]
    for pair in _PAIRS:
        if {*pair} <= {*table.columns}:
            return list(pair)
    for name in _TEXTS:
        if name in table.columns and name != label:
            return [name]
    row = table.rows[0]
    strings = [name for name in table.columns if name != label and isinstance(row.get(name), str)]
    return strings if len(strings) == 1 else [_untold(table, "texts", "text")]


def image_column(table: Table, given: str | None) -> str:
    """The column of the images, or of their paths.

    Args:
        table: the rows.
        given: what a setting says.

    Raises:
        DataError: there is no such column, or it can't be told.
    """
    return _column(table, given, _IMAGES, "images or their paths", "image")


def caption_column(table: Table, given: str | None) -> str:
    """The column of the captions.

    Args:
        table: the rows.
        given: what a setting says.

    Raises:
        DataError: there is no such column, or it can't be told.
    """
    return _column(table, given, _CAPTIONS, "captions", "caption")


def question_column(table: Table, given: str | None) -> str:
    """The column of the questions; arguments and errors as of `caption_column`."""
    return _column(table, given, _QUESTIONS, "questions", "question")


def answer_column(table: Table, given: str | None) -> str:
    """The column of the answers; arguments and errors as of `caption_column`."""
    return _column(table, given, _ANSWERS, "answers", "answer")


def texts_in(value: object, at: str, what: str) -> list[str]:
    """The texts of a field that holds one, or a list of such.

    Args:
        value: what the field holds.
        at: where it is, for messages.
        what: what is expected: an article, and how the setting is called that names the column.

    Raises:
        DataError: it holds something else.
    """
    found = [value] if isinstance(value, str) else value
    if (
        not isinstance(found, Sequence)
        or not found
        or not all(isinstance(text, str) for text in found)
    ):
        raise DataError(
            f"{at}: expected {what}, or a list of such, got {str(value)[:40]!r}; "
            f"`{what.rsplit(maxsplit=1)[-1]}` chooses another column"
        )
    return list(found)


def has_images(table: Table) -> bool:
    """Whether a table has a column that is called as images, or their paths, are."""
    return any(name in table.columns for name in _IMAGES)


def has_labels(columns: Sequence[str]) -> bool:
    """Whether one of some columns is called as labels are."""
    return any(name in columns for name in _LABELS)


def _column(table: Table, given: str | None, usual: Sequence[str], what: str, setting: str) -> str:
    """The column that a setting names, else the first that is called as is usual."""
    if given is not None:
        return table.check_column(given, setting)
    found = next((name for name in usual if name in table.columns), None)
    return found or _untold(table, what, setting)


def _untold(table: Table, what: str, setting: str) -> str:
    names = ", ".join(f"'{name}'" for name in table.columns)
    raise DataError(
        f"{table.where}: which column has the {what} can't be told from their names, {names}; "
        f"say it in `{setting}`"
    )
