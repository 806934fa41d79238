"""What generated texts are scored by, row by row, beside torchmetrics' own (SacreBLEU, chrF, …)."""

import re
import string
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class TextMetric(Metric):
    """Base of metrics that are the mean of the rows' own scores, in [0, 1].

    A row's is the best over its references.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    sum: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @abstractmethod
    def score(self, text: str, reference: str) -> float:
        """How good a text is, held against a reference."""

    def rows(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> Tensor:
        """Each row's own score, `(B,)` float32."""
        pairs = zip(texts, references, strict=True)
        return torch.tensor([max(self.score(text, one) for one in ones) for text, ones in pairs])

    def update(self, preds: Sequence[str], target: Sequence[Sequence[str]]) -> None:
        """Take in texts, and the references of each."""
        self.sum += self.rows(preds, target).to(self.sum).sum()
        self.total += len(preds)

    def compute(self) -> Tensor:
        """The mean."""
        return self.sum / self.total


class ExactMatch(TextMetric):
    """The share of the texts that are their reference, white space around them apart.

    Args:
        normalize: compare without case, punctuation and articles, as SQuAD does.
    """

    def __init__(self, normalize: bool = False) -> None:
        super().__init__()
        self.normalize = normalize

    def score(self, text: str, reference: str) -> float:
        """1 or 0."""
        if self.normalize:
            return float(normalized(text) == normalized(reference))
        return float(text.strip() == reference.strip())


class WordF1(TextMetric):
    """The harmonic mean of precision and recall of the words, as SQuAD counts them."""

    def score(self, text: str, reference: str) -> float:
        """2 · common / (words of either)."""
        said, wanted = normalized(text).split(), normalized(reference).split()
        if not said or not wanted:
            return float(said == wanted)
        common = (Counter(said) & Counter(wanted)).total()
        return 2 * common / (len(said) + len(wanted))


class Rouge(TextMetric):
    """The F-measure of ROUGE, as torchmetrics takes it.

    Args:
        of: `rouge1`, `rouge2`, …, `rougeL` or `rougeLsum`; the last needs `nltk`.
        stem: compare words' stems, by `nltk`.
    """

    def __init__(self, of: str = "rougeL", stem: bool = False) -> None:
        from torchmetrics.text import ROUGEScore

        super().__init__()
        self.of = of
        self._rouge = ROUGEScore(use_stemmer=stem, rouge_keys=of)

    def score(self, text: str, reference: str) -> float:
        """The F-measure of one row."""
        self._rouge.reset()
        self._rouge.update(text, reference)
        value = float(self._rouge.compute()[f"{self.of}_fmeasure"])
        self._rouge.reset()
        return value


def normalized(text: str) -> str:
    """A text as SQuAD compares it: lower case, no punctuation, no articles, single spaces."""
    bare = _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION))
    return " ".join(bare.split())
