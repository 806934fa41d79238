"""Images with captions, for retrieval."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fusionkit.checkpoints.hub_names import Use, reads_hub
from fusionkit.tasks.columns import caption_column, image_column, texts_in
from fusionkit.tasks.data import Split, Splits, TaskData, checked_splits
from fusionkit.tasks.dual_encoders import TextTokens
from fusionkit.tasks.image_files import image_in
from fusionkit.tasks.retrieval import CAPTIONS, ImageTextRetrieval
from fusionkit.tasks.table import Table
from fusionkit.tasks.table_files import read_table
from fusionkit.tasks.transforms import ImageTransform, image_transform

Row = tuple[Tensor, list[str]]


@reads_hub(tasks=Use.ROWS, encoder=Use.PREPROCESSING)
class ImageTextPairs(TaskData):
    """Images and their captions, made ready as a dual encoder wants them.

    Where a task's rows are, is a table with a column of images or of their paths, and one of
    captions, a text or a list of texts: whatever `ImageClassification` reads as a table. Rows with
    one path are one image, which has the captions of all.

    Args:
        tasks: task name → where its rows are.
        encoder: the dual encoder, whose preprocessing and tokenizer are taken; see `dual_encoder`.
        batch_size: images per batch.
        val_fraction: share of the training rows kept for validation, in [0, 1).
        limit: at most so many images per task and split; all by default.
        num_workers: loading processes per dataloader.
        seed: of the draws.
        image: column of the images; by default as it is commonly called.
        caption: column of the captions; by default as it is commonly called.
        splits: `train` and `test` → what they are called; see `Splits`.

    Raises:
        DataError: there are no such rows or columns, or neither preprocessing nor tokenizer. An
            image that can't be read is named when it is needed.
    """

    def __init__(
        self,
        tasks: dict[str, str],
        encoder: str,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        limit: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        image: str | None = None,
        caption: str | None = None,
        splits: Splits | None = None,
    ) -> None:
        super().__init__(tasks, batch_size, val_fraction, limit, num_workers, seed)
        self.image, self.caption = image, caption
        self.splits = checked_splits(splits, tasks)
        self.tokens = TextTokens(encoder)
        self.transform = image_transform(encoder)
        self.kinds = {task: ImageTextRetrieval() for task in self.tasks}

    def read(self, task: str, split: Split) -> Dataset[Row]:
        """All images: they are opened as they are needed."""
        table = read_table(self.paths[task], split, self.called(task))
        column = image_column(table, self.image)
        captions = table.column(caption_column(table, self.caption))
        paths = isinstance(table.rows[0].get(column), str)
        named = table.column(column) if paths else range(len(captions))
        places: dict[Any, tuple[int, list[str]]] = {}
        for row, (name, given) in enumerate(zip(named, captions, strict=True)):
            _, own = places.setdefault(name, (row, []))
            own.extend(texts_in(given, table.at(row), "a caption"))
        return _Pairs(table, column, list(places.values()), self.transform)

    def collate(self, rows: list[Row]) -> dict[str, Tensor]:
        """Images, the tokens of all their captions, and how many each has."""
        texts = [text for _, captions in rows for text in captions]
        return {
            self.tokens.image: torch.stack([image for image, _ in rows]),
            **self.tokens(texts),
            CAPTIONS: torch.tensor([len(captions) for _, captions in rows]),
        }


class _Pairs(Dataset[Row]):
    def __init__(
        self,
        table: Table,
        column: str,
        places: list[tuple[int, list[str]]],
        transform: ImageTransform,
    ) -> None:
        self._table, self._column = table, column
        self._places, self._transform = places, transform

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Row:
        row, captions = self._places[index]
        image = image_in(self._table, self._column, row, self._transform.mode)
        return self._transform(image), captions
