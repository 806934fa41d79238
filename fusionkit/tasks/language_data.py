"""A datamodule of tasks for language models: texts, answers, choices, chats."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fusionkit.checkpoints.hub_names import Use, reads_hub
from fusionkit.errors import DataError
from fusionkit.tasks.asked import Asked
from fusionkit.tasks.data import ListedRows, Split, Splits, TaskData, checked_splits
from fusionkit.tasks.generation import GREEDY, Generation, pad_token
from fusionkit.tasks.language_modeling import IGNORED, LanguageModeling, TextToText
from fusionkit.tasks.language_rows import LanguageRows, Question, questions, read_rows, texts
from fusionkit.tasks.language_tokens import Cut, LanguageTokens, LastPiece
from fusionkit.tasks.multiple_choice import MultipleChoice
from fusionkit.tasks.table import MissingSplitError
from fusionkit.tasks.table_files import read_table
from fusionkit.tasks.task import Task


@reads_hub(tasks=Use.ROWS, tokenizer=Use.BESIDE)
class LanguageData(TaskData):
    """What language models are scored, trained and calibrated on; of each task its rows say what.

    | rows | task |
    |---|---|
    | a plain text (`.txt`, `.txt.gz`), or rows of `text` | language modelling: every token |
    | `prompt`, `choices`, `answer` (which, from 0 on, or its text) | multiple choice |
    | `prompt`, `completion` (or a list of such) | language modelling, of the answer alone |
    | `messages`, a chat | the same, of what the assistant says, by the chat template |

    Where a task's rows are, is as of `TextData`; a `.txt` is a text. The answers to prompts and
    chats are generated, and held against those that are given, for tasks in `generate`.

    Args:
        tasks: task name → where its rows are.
        tokenizer: folder or hub name of a Hugging Face tokenizer, a `.gguf` file, or
            `package:NAME/FOLDER`.
        generate: tasks whose answers are generated; true: all that have prompts.
        generation: settings of transformers' `generate`: `max_new_tokens` (64), `num_beams`,
            `stop_strings`, … Greedy by default.
        encoder_decoder: the model reads prompts by an encoder (T5, BART).
        batch_size: rows per batch; of multiple choice each is as many as it has choices.
        max_length: tokens of a row, prompt and answer; by default the tokenizer's own, or 1,024.
        packed: texts are joined, and cut into pieces of `max_length`; or each has pieces of its
            own, which are padded.
        last_piece: keep or drop the last piece of a text, which is shorter.
        end: put the token that ends a sequence after answers, choices, and between texts.
        cut: `left` leaves out the beginning of prompts that are too long, which are refused else.
        chat_template: a Jinja template, or its file, in place of the tokenizer's own.
        columns: `prompt`, `choices`, … → what the data call it.
        asked: task whose rows have labels → how they are asked, and the words of its classes, which
            are then generated and held against the labels: `{prompt: 'Is it good? {sentence}',
            answers: [no, yes]}`, `answers: number`, or `glue`, as FusionBench asks GLUE's task of
            that name (`glue:NAME`). `glue` in place of all: every task is so asked.
        val_fraction: share of the training rows kept for validation, in [0, 1).
        limit: at most so many rows per task and split; all by default.
        num_workers: loading processes per dataloader.
        seed: of the draws.
        splits: `train` and `test` → what they are called; see `Splits`.

    Raises:
        DataError: there is no tokenizer; rows are missing, malformed, or longer than `max_length`.
    """

    def __init__(
        self,
        tasks: dict[str, str],
        tokenizer: str,
        generate: bool | list[str] = False,
        generation: dict[str, Any] | None = None,
        encoder_decoder: bool = False,
        batch_size: int = 8,
        max_length: int | None = None,
        packed: bool = True,
        last_piece: LastPiece = "keep",
        end: bool = True,
        cut: Cut | None = None,
        chat_template: str | None = None,
        columns: dict[str, str] | None = None,
        asked: dict[str, Any] | str | None = None,
        val_fraction: float = 0.1,
        limit: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        splits: Splits | None = None,
    ) -> None:
        super().__init__(tasks, batch_size, val_fraction, limit, num_workers, seed)
        self.tokens = LanguageTokens(tokenizer, max_length, end, cut, chat_template)
        self.generation = dict(generation or {})
        self.encoder_decoder = encoder_decoder
        self.packed = packed
        self.last_piece: LastPiece = last_piece
        self.columns = dict(columns or {})
        self.splits = checked_splits(splits, tasks)
        if isinstance(asked, str):
            asked = dict.fromkeys(tasks, asked)
        if unknown := [task for task in asked or {} if task not in tasks]:
            raise DataError(f"asked: there is no task '{unknown[0]}' among {', '.join(tasks)}")
        self.asked = {task: Asked.of(given, task) for task, given in (asked or {}).items()}
        generated = list(tasks) if generate is True else generate or []
        if unknown := [task for task in generated if task not in tasks]:
            raise DataError(f"generate: there is no task '{unknown[0]}' among {', '.join(tasks)}")
        self._generated = frozenset(generated)
        self.kinds = {task: self._kind(task, generate is True) for task in tasks}

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return self.tokens.tokenizer

    def rows(self, task: str, split: Split) -> LanguageRows:
        """One split's rows as they lie there.

        Raises:
            DataError: they can't be read.
        """
        if task in self.asked:
            table = read_table(self.paths[task], split, self.called(task))
            return LanguageRows("completions", self.asked[task].rows(table))
        return read_rows(self.paths[task], split, self.called(task), self.columns)

    def read(self, task: str, split: Split) -> Dataset[dict[str, Any]]:
        """All rows, tokenized once."""
        rows, kind = self.rows(task, split), self.kinds[task]
        if rows.form == "texts":
            return ListedRows(self._pieces(rows))
        asked = questions(rows)
        if isinstance(kind, MultipleChoice):
            return ListedRows([self._choices(each) for each in asked])
        answered = [self._answer(each) for each in asked]
        share = sum(row["bytes"] for row in answered) / len(answered)
        found = [{**row, "bytes": share} for row in answered]
        if isinstance(kind, Generation):
            found = [{**row, **self._prompt(each)} for row, each in zip(found, asked, strict=True)]
        return ListedRows(found)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Pad to the longest of the batch: prompts that are to be answered on the left."""
        pad = pad_token(self.tokenizer)
        if "choices" in rows[0]:
            return _choices_batch(rows, pad)
        batch: dict[str, Any] = {
            **_padded([row["input_ids"] for row in rows], pad),
            "labels": _stacked([row["labels"] for row in rows], IGNORED),
            "bytes": torch.tensor([row["bytes"] for row in rows], dtype=torch.float32),
        }
        if "prompts" in rows[0]:
            left = not self.encoder_decoder
            prompts = _padded([row["prompts"] for row in rows], pad, left)
            batch["prompts"] = prompts["input_ids"]
            batch["prompts_mask"] = prompts["attention_mask"]
            batch["references"] = [row["references"] for row in rows]
        return batch

    def order(self, dataset: Any, rows: list[int]) -> list[int]:
        """By length, so that batches pad little."""
        return sorted(rows, key=lambda row: _length(dataset[row]))

    def _kind(self, task: str, all_generated: bool) -> Task:
        try:
            rows = self.rows(task, "test")
        except MissingSplitError:
            rows = self.rows(task, "train")
        likelihood = TextToText() if self.encoder_decoder else LanguageModeling()
        if rows.form == "texts":
            if self.encoder_decoder or (task in self._generated and not all_generated):
                raise DataError(
                    f"{rows.table.where}: has texts without prompts, which are for language "
                    "modelling by a causal model; give rows of 'prompt' and 'completion'"
                )
            return likelihood
        if task in self.asked:
            return self.asked[task].kind(self.tokenizer, likelihood, self.generation)
        if task in self._generated:
            return Generation(self.tokenizer, likelihood, self.generation)
        if rows.form != "choices":
            return likelihood
        if self.encoder_decoder:
            raise DataError(
                f"{rows.table.where}: choices are scored by causal models; an encoder-decoder "
                f"answers them: `generate: [{task}]`"
            )
        return MultipleChoice(max(len(each.answers) for each in questions(rows)))

    def _pieces(self, rows: LanguageRows) -> list[dict[str, Any]]:
        """A text's pieces, which share its bytes evenly: a score is then a mean over them."""
        found = texts(rows)
        pieces = self.tokens.pieces(found, self.packed, self.last_piece)
        if not pieces:
            raise DataError(
                f"{rows.table.where}: has less than one piece of {self.tokens.max_length} tokens; "
                "`last_piece: keep`, or give a smaller `max_length`"
            )
        share = sum(len(text.encode()) for text in found) / len(pieces)
        return [{"input_ids": piece, "labels": piece, "bytes": share} for piece in pieces]

    def _choices(self, question: Question) -> dict[str, Any]:
        assert isinstance(question.prompt, str)
        said = [
            self.tokens.answered(question.prompt, each, question.at) for each in question.answers
        ]
        sizes = [len(each.encode()) for each in question.answers]
        return {"choices": said, "bytes": sizes, "label": question.choice}

    def _answer(self, question: Question) -> dict[str, Any]:
        """The answer that is learned, after its prompt."""
        answer = question.right[0]
        size = len(answer.encode())
        if self.encoder_decoder:
            if not isinstance(question.prompt, str):
                raise DataError(f"{question.at}: is a chat, which encoder-decoders have no use for")
            source = self.tokens.source(question.prompt, question.at)
            return {"input_ids": source, "labels": self.tokens.target(answer), "bytes": size}
        if isinstance(question.prompt, str):
            tokens, first = self.tokens.answered(question.prompt, answer, question.at)
            said = [place >= first for place in range(len(tokens))]
        else:
            tokens, said = self.tokens.chat(question.prompt, question.at)
            turns = [each for each in question.prompt if each["role"] == "assistant"]
            size = sum(len(each["content"].encode()) for each in turns)
        labels = [token if own else IGNORED for token, own in zip(tokens, said, strict=True)]
        return {"input_ids": tokens, "labels": labels, "bytes": size}

    def _prompt(self, question: Question) -> dict[str, Any]:
        """What is asked, and the texts that would be right."""
        if self.encoder_decoder:
            assert isinstance(question.prompt, str)
            asked = self.tokens.source(question.prompt, question.at)
        else:
            asked = self.tokens.prompt(question, {**GREEDY, **self.generation}["max_new_tokens"])
        return {"prompts": asked, "references": question.right}


def _length(row: Mapping[str, Any]) -> int:
    """Tokens of a row, of choices of the longest."""
    if "choices" in row:
        return max(len(tokens) for tokens, _ in row["choices"])
    return len(row.get("prompts", row["input_ids"]))


def _stacked(rows: Sequence[Sequence[int]], fill: int, left: bool = False) -> Tensor:
    """Rows of tokens, filled up to the longest: int64 `(B, L)`."""
    longest = max(len(row) for row in rows)
    filled = [[fill] * (longest - len(row)) for row in rows]
    pairs = zip(rows, filled, strict=True)
    return torch.tensor([[*more, *row] if left else [*row, *more] for row, more in pairs])


def _padded(rows: Sequence[Sequence[int]], pad: int, left: bool = False) -> dict[str, Tensor]:
    """Rows of tokens, and which are no padding."""
    mask = _stacked([[1] * len(row) for row in rows], 0, left)
    return {"input_ids": _stacked(rows, pad, left), "attention_mask": mask}


def _choices_batch(rows: list[dict[str, Any]], pad: int) -> dict[str, Tensor]:
    """A batch of multiple choice; a row with fewer choices than another gets empty ones."""
    most = max(len(row["choices"]) for row in rows)
    none = ([pad], 1)
    said = [(row["choices"] + [none] * most)[:most] for row in rows]
    sizes = [(row["bytes"] + [1] * most)[:most] for row in rows]
    flat = [choice for row in said for choice in row]
    answers = [[IGNORED] * first + tokens[first:] for tokens, first in flat]
    lengths = [max(len(tokens) - first, 1) for tokens, first in flat]
    shape = (len(rows), most)
    batch = {**_padded([tokens for tokens, _ in flat], pad), "answers": _stacked(answers, IGNORED)}
    return {
        **{name: tokens.reshape(*shape, -1) for name, tokens in batch.items()},
        "tokens": torch.tensor(lengths, dtype=torch.float32).reshape(shape),
        "bytes": torch.tensor(sizes, dtype=torch.float32).clamp(min=1),
        "labels": torch.tensor([row["label"] for row in rows]),
    }
