"""Generation: what a language model answers to a prompt, held against texts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Generator, Tensor
from torchmetrics import Metric

from fusionkit.errors import DataError, FusionKitError
from fusionkit.tasks import batches
from fusionkit.tasks.language_modeling import LanguageModeling
from fusionkit.tasks.task import Task
from fusionkit.tasks.text_metrics import ExactMatch, Rouge, TextMetric, WordF1

GREEDY: Mapping[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "max_new_tokens": 64,
    "temperature": None,
    "top_p": None,
    "top_k": None,
}
"""Settings of `generate` where others are not given."""

_FLAT = {f"torchmetrics.text.{name}" for name in ("cer", "edit", "mer", "wer", "wil", "wip")}
"""Modules of torchmetrics whose metrics take one reference a text, and no list."""


@dataclass(frozen=True)
class Generation(Task):
    """What a model answers, token after token: exact match; F1, ROUGE, BLEU, chrF by name.

    Losses and divergences are those of the reference answers' tokens, as `likelihood` has them.
    Batches are what that needs, and beside it: `prompts` and `prompts_mask`, int64 `(B, P)`,
    padded on the left; `references`, of each row the texts that would be right.

    Args:
        tokenizer: decodes what was generated.
        likelihood: the kind by which answers that are given are scored.
        settings: of transformers' `generate`; greedy, up to 64 new tokens, by default.
    """

    tokenizer: Any = field(repr=False, compare=False)
    likelihood: LanguageModeling = field(default_factory=LanguageModeling)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def predict(self, model: Callable[..., Any], batch: Any) -> Tensor:
        """Logits of the reference answers' tokens."""
        return self.likelihood.predict(model, batch)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Cross-entropy of the reference answers' tokens."""
        return self.likelihood.loss(outputs, batch)

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """KL(teacher ‖ student) at the reference answers' tokens."""
        return self.likelihood.divergence(student, teacher)

    def loss_of(self, model: Callable[..., Any], batch: Any) -> Tensor:
        """As `loss`."""
        return self.likelihood.loss_of(model, batch)

    def kept(self, model: Callable[..., Any], batch: Any) -> Tensor:
        """What `distance` needs of a teacher."""
        return self.likelihood.kept(model, batch)

    def distance(
        self, student: Callable[..., Any], batch: Any, kept: Tensor, teacher: Callable[..., Any]
    ) -> Tensor:
        """As `divergence`."""
        return self.likelihood.distance(student, batch, kept, teacher)

    def drawn(self, model: Callable[..., Any], batch: Any) -> Callable[[Generator], Tensor]:
        """Of the reference answers' tokens."""
        return self.likelihood.drawn(model, batch)

    def answers(self, model: Any, batch: Any, outputs: Tensor | None = None) -> Tensor:
        """What the model generates: tokens, int64 `(B, T)`, padded after its end.

        Raises:
            FusionKitError: the model can't generate.
            DataError: prompts and answers are longer than the model's context.
        """
        if not callable(getattr(model, "generate", None)) or not model.can_generate():
            raise FusionKitError(
                f"{type(model).__name__} can't generate: it is no causal and no encoder-decoder "
                "language model; build it by fusionkit.tasks.models.causal_lm, or seq2seq_lm"
            )
        asked = self.prompts(batch)
        settings = {**GREEDY, **self.settings}
        read = 0 if model.config.is_encoder_decoder else asked["input_ids"].shape[1]
        context = getattr(model.config, "max_position_embeddings", None)
        if context is not None and read + settings["max_new_tokens"] > context:
            raise DataError(
                f"a prompt of {read} tokens and {settings['max_new_tokens']} new ones are more "
                f"than the model's context, {context}; give a smaller `max_length`, and `cut: left`"
            )
        if "stop_strings" in settings:
            settings["tokenizer"] = self.tokenizer
        own = getattr(model, "generation_config", None)
        end = getattr(own, "eos_token_id", None) or self.tokenizer.eos_token_id
        made: Tensor = model.generate(
            **asked,
            **{"eos_token_id": end, "pad_token_id": pad_token(self.tokenizer), **settings},
        )
        return made[:, read:]

    def prompts(self, batch: Any) -> dict[str, Tensor]:
        """What `generate` is given of a batch: `input_ids`, `(B, P)`, and what goes with them."""
        return {"input_ids": batch["prompts"], "attention_mask": batch["prompts_mask"]}

    def texts(self, outputs: Tensor) -> list[str]:
        """Generated tokens as texts, without what surrounds them."""
        decoded = self.tokenizer.batch_decode(outputs, skip_special_tokens=True)
        return [text.strip() for text in decoded]

    def metric(self) -> Metric:
        """Exact match."""
        return ExactMatch()

    @property
    def metrics(self) -> Mapping[str, type[Metric]]:
        """Those that are means over rows."""
        return {each.__name__: each for each in (ExactMatch, WordF1, Rouge)}

    def update(self, metric: Metric, outputs: Tensor, batch: Any) -> None:
        """With texts, and a list of references for each."""
        references: Sequence[Any] = batch["references"]
        if any(each.__module__ in _FLAT for each in type(metric).__mro__):
            references = [first for first, *_ in references]
        metric.update(self.texts(outputs), references)

    def row_scores(self, metric: Metric, outputs: Tensor, batch: Any) -> Tensor | None:
        """Of exact match, F1 and ROUGE: a row's own."""
        if not isinstance(metric, TextMetric):
            return None
        return metric.rows(self.texts(outputs), batch["references"]).to(outputs.device)

    def predictions(self, outputs: Tensor, batch: Any) -> list[dict[str, Any]]:
        """The text that was generated, and the first that would be right."""
        pairs = zip(self.texts(outputs), batch["references"], strict=True)
        return [{"prediction": said, "target": right[0]} for said, right in pairs]

    def count(self, batch: Any) -> int:
        """How many prompts there are."""
        return len(batch["prompts"])

    def first(self, batch: Any, rows: int) -> Any:
        """A batch's first rows, and their references."""
        found = batches.first(batch, rows, self.count(batch))
        return {**found, "references": batch["references"][:rows]}


def pad_token(tokenizer: Any) -> int:
    """What fills rows up: the tokenizer's own, else its end, else token 0."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in known if token is not None), 0)
