"""Questions about images, answered in words by a vision-language model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fusionkit.tasks.generation import Generation
from fusionkit.tasks.language_modeling import LanguageModeling


@dataclass(frozen=True)
class AnswersToImages(LanguageModeling):
    """The tokens of an answer, after a prompt with an image.

    Batches are those of `VisualQuestions`.
    """

    def inputs(self, batch: Any) -> dict[str, Tensor]:
        """All that the processor made."""
        return dict(batch["answered"])

    def check(self, model: Callable[..., Any], batch: Any) -> None:
        """Nothing: such models have a context for each of their parts."""

    def count(self, batch: Any) -> int:
        """How many rows there are."""
        return len(batch["labels"])


@dataclass(frozen=True)
class VisualQuestions(Generation):
    """What a vision-language model answers to a question about an image: exact match; F1, ….

    Losses and divergences are those of the reference answers' tokens. Batches are mappings:
    `asked`, what the processor makes of prompts and images, the tokens `(B, P)` padded on the left;
    `answered`, the same with the first answer behind it, `(B, L)` padded on the right; `labels`
    `(B, L)`, `IGNORED` but for the answer; `bytes` `(B,)`; `references`, of each row the texts that
    would be right; `rows`, what all that is made of.

    Args:
        tokenizer: as of `Generation`.
        likelihood: as of `Generation`.
        settings: as of `Generation`.
        collate: makes a batch of rows.
    """

    likelihood: LanguageModeling = field(default_factory=AnswersToImages)
    collate: Callable[[list[Any]], Mapping[str, Any]] | None = field(
        default=None, repr=False, compare=False
    )

    def prompts(self, batch: Any) -> dict[str, Tensor]:
        """All that the processor made of them."""
        return dict(batch["asked"])

    def count(self, batch: Any) -> int:
        """How many questions there are."""
        return len(batch["labels"])

    def first(self, batch: Any, rows: int) -> Any:
        """A batch's first rows, made anew: images are cut into parts that no axis tells apart."""
        if rows >= self.count(batch):
            return batch
        assert self.collate is not None
        return _moved(self.collate(batch["rows"][:rows]), batch["labels"].device)


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return {k: _moved(v, device) for k, v in value.items()} if isinstance(value, dict) else value
