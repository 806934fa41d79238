"""What language models are scored by, beside torchmetrics' own."""

import math
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

Size = Literal["bytes", "tokens"]
"""What a choice's log-likelihood is divided by."""


class TokenMetric(Metric):
    """Base of metrics of tokens that are predicted one by one: sums over all of them."""

    is_differentiable = False
    full_state_update = False
    nats: Tensor
    right: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("nats", "right", "tokens", "bytes"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, said: Tensor, sizes: Tensor) -> None:
        """Take in rows.

        Args:
            said: `(B, 3)`: a row's nats, how many of its tokens are the most likely ones, and how
                many there are.
            sizes: `(B,)`, the rows' share of the text's bytes.
        """
        nats, right, tokens = said.to(torch.float64).sum(0)
        self.nats += nats
        self.right += right
        self.tokens += tokens
        self.bytes += sizes.to(torch.float64).sum()

    def rows(self, said: Tensor, sizes: Tensor) -> Tensor | None:
        """Each row's own score, `(B,)`; None where the metric is no mean of such."""
        return None


class BitsPerByte(TokenMetric):
    """What the tokens take, by the model's probabilities, in bits for each byte of the text.

    It compares models of different tokenizers.
    """

    higher_is_better = False
    plot_lower_bound = 0.0

    def compute(self) -> Tensor:
        """Nats over ln 2, over bytes."""
        return self.nats / math.log(2) / self.bytes

    def rows(self, said: Tensor, sizes: Tensor) -> Tensor:
        """A row's bits over its bytes."""
        return said[:, 0] / math.log(2) / sizes


class Perplexity(TokenMetric):
    """The exponential of the mean of the tokens' nats."""

    higher_is_better = False
    plot_lower_bound = 1.0

    def compute(self) -> Tensor:
        """exp(nats / tokens)."""
        return (self.nats / self.tokens).exp()


class TokenAccuracy(TokenMetric):
    """The share of the tokens that the model finds the most likely ones."""

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def compute(self) -> Tensor:
        """Right ones over all."""
        return self.right / self.tokens

    def rows(self, said: Tensor, sizes: Tensor) -> Tensor:
        """A row's share."""
        return said[:, 1] / said[:, 2]


class NormalizedAccuracy(Metric):
    """The share of the rows whose right choice has the largest log-likelihood for its length.

    Args:
        by: the length: `bytes` of the choice, or its `tokens`.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    right: Tensor
    total: Tensor

    def __init__(self, by: Size = "bytes") -> None:
        super().__init__()
        if by not in ("bytes", "tokens"):
            raise ValueError(f"expected `by` to be bytes or tokens, got '{by}'")
        self.by = by
        for name in ("right", "total"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, said: Tensor, sizes: Tensor, labels: Tensor) -> None:
        """Take in rows.

        Args:
            said: log-likelihoods, `(B, choices)`.
            sizes: lengths, `(B, choices)`.
            labels: which choice is right, `(B,)`.
        """
        self.right += self.rows(said, sizes, labels).sum().to(torch.int64)
        self.total += len(labels)

    def rows(self, said: Tensor, sizes: Tensor, labels: Tensor) -> Tensor:
        """1 where a row is right, else 0: `(B,)` float32."""
        right: Tensor = (said / sizes).argmax(-1) == labels
        return right.to(torch.float32)

    def compute(self) -> Tensor:
        """Right rows over all."""
        return self.right / self.total
