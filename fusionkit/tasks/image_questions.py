"""A datamodule of questions about images."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from fusionkit.checkpoints.hub_names import Use, reads_hub
from fusionkit.errors import DataError
from fusionkit.tasks.columns import answer_column, image_column, question_column, texts_in
from fusionkit.tasks.data import Split, Splits, TaskData, checked_splits
from fusionkit.tasks.generation import pad_token
from fusionkit.tasks.image_files import image_in
from fusionkit.tasks.language_modeling import IGNORED
from fusionkit.tasks.models import processor_of
from fusionkit.tasks.table import Table
from fusionkit.tasks.table_files import read_table
from fusionkit.tasks.visual_questions import VisualQuestions


class Row(NamedTuple):
    """An image, what is asked about it, and the answers that would be right."""

    image: Image.Image
    question: str
    answers: list[str]


@reads_hub(tasks=Use.ROWS, processor=Use.BESIDE)
class ImageQuestions(TaskData):
    """Questions about images, made ready by a vision-language model's own processor.

    Where a task's rows are, is a table with columns of images or of their paths, of questions, and
    of answers, a text or a list of texts that are right: whatever `ImageClassification` reads as a
    table. The first answer is the one that is learned.

    Args:
        tasks: task name → where its rows are.
        processor: the model's folder or hub name, whose processor is taken.
        prompt: how a question is put, with `{question}` and, where the image goes, `{image}`; by
            default a user's message by the chat template.
        generation: settings of transformers' `generate`: `max_new_tokens` (64), ….
        batch_size: rows per batch.
        val_fraction: share of the training rows kept for validation, in [0, 1).
        limit: at most so many rows per task and split; all by default.
        num_workers: loading processes per dataloader.
        seed: of the draws.
        image: column of the images; by default as it is commonly called.
        question: column of the questions; by default as it is commonly called.
        answer: column of the answers; by default as it is commonly called.
        splits: `train` and `test` → what they are called; see `Splits`.

    Raises:
        DataError: there are no such rows or columns, no processor, or nothing says how questions
            are put. An image that can't be read is named when it is needed.
    """

    def __init__(
        self,
        tasks: dict[str, str],
        processor: str,
        prompt: str | None = None,
        generation: dict[str, Any] | None = None,
        batch_size: int = 8,
        val_fraction: float = 0.1,
        limit: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        image: str | None = None,
        question: str | None = None,
        answer: str | None = None,
        splits: Splits | None = None,
    ) -> None:
        super().__init__(tasks, batch_size, val_fraction, limit, num_workers, seed)
        self.columns = (image, question, answer)
        self.splits = checked_splits(splits, tasks)
        self.processor = processor_of(processor)
        self.prompt = self._prompt(prompt, processor)
        kind = VisualQuestions(
            self.processor.tokenizer, settings=dict(generation or {}), collate=self.collate
        )
        self.kinds = dict.fromkeys(self.tasks, kind)

    @property
    def tokenizer(self) -> Any:
        """The processor's."""
        return self.processor.tokenizer

    def read(self, task: str, split: Split) -> Dataset[Row]:
        """All rows: images are opened as they are needed."""
        table = read_table(self.paths[task], split, self.called(task))
        image, question, answer = self.columns
        named = question_column(table, question)
        questions = [_text(t, table.at(r)) for r, t in enumerate(table.column(named))]
        given = table.column(answer_column(table, answer))
        answers = [texts_in(each, table.at(row), "an answer") for row, each in enumerate(given)]
        return _Rows(table, image_column(table, image), questions, answers)

    def collate(self, rows: list[Row]) -> dict[str, Any]:
        """What the processor makes of prompts and images; and the same with answers behind it."""
        prompts = [self.prompt.replace("{question}", row.question) for row in rows]
        self.tokenizer.padding_side = "left"
        asked = self.processor(
            text=prompts, images=[[row.image] for row in rows], padding=True, return_tensors="pt"
        )
        asked = dict(asked)
        answered, labels = self._answered(asked, [row.answers[0] for row in rows])
        sizes = [len(row.answers[0].encode()) for row in rows]
        return {
            "asked": asked,
            "answered": answered,
            "labels": labels,
            "bytes": torch.tensor(sizes, dtype=torch.float32).clamp(min=1),
            "references": [row.answers for row in rows],
            "rows": rows,
        }

    def _answered(
        self, asked: dict[str, Tensor], answers: Sequence[str]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Prompts with answers behind them, padded on the right; and what is said of that."""
        lead = "" if self.prompt[-1:].isspace() else " "
        end = [token for token in [self.tokenizer.eos_token_id] if token is not None]
        own = [
            [*self.tokenizer(lead + text, add_special_tokens=False)["input_ids"], *end]
            for text in answers
        ]
        there, shape = asked["attention_mask"].bool(), asked["input_ids"].shape
        fill = {"input_ids": pad_token(self.tokenizer)}
        found = dict(asked)
        for name, value in asked.items():
            if value.shape != shape:
                continue  # of images
            more = {"input_ids": own, "attention_mask": [[1] * len(each) for each in own]}
            tails = more.get(name, [[0] * len(each) for each in own])
            joined = [
                torch.cat([row[mask], torch.tensor(tail, dtype=row.dtype)])
                for row, mask, tail in zip(value, there, tails, strict=True)
            ]
            found[name] = _padded(joined, fill.get(name, 0))
        prompts = there.sum(1).tolist()
        said = [
            torch.cat([torch.full((size,), IGNORED), torch.tensor(tail)])
            for size, tail in zip(prompts, own, strict=True)
        ]
        return found, _padded(said, IGNORED)

    def _prompt(self, given: str | None, path: str) -> str:
        """A prompt with `{question}`, and the processor's own token for the image.

        Raises:
            DataError: nothing says it, or it lacks one of them.
        """
        token = getattr(self.processor, "image_token", "<image>")
        if given is not None:
            if "{question}" not in given or ("{image}" not in given and token not in given):
                raise DataError(f"prompt: expected {{image}} and {{question}} in it, got {given!r}")
            return given.replace("{image}", token)
        if not getattr(self.processor, "chat_template", None):
            raise DataError(
                f"{path}: its processor has no chat template, which says how a question is put; "
                "give `prompt`: '{image} {question} Answer:', say"
            )
        content = [{"type": "image"}, {"type": "text", "text": "{question}"}]
        messages = [{"role": "user", "content": content}]
        found: str = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        return found


class _Rows(Dataset[Row]):
    def __init__(
        self, table: Table, column: str, questions: list[str], answers: list[list[str]]
    ) -> None:
        self._table, self._column = table, column
        self._questions, self._answers = questions, answers

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, index: int) -> Row:
        image = image_in(self._table, self._column, index, "RGB")
        return Row(image, self._questions[index], self._answers[index])


def _padded(rows: Sequence[Tensor], fill: int) -> Tensor:
    """Rows, filled up on the right to the longest: `(B, L)`."""
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=fill)


def _text(value: Any, at: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{at}: expected a question, got {type(value).__name__}; `question` chooses another "
            "column"
        )
    return value
