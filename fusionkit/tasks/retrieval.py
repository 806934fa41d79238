"""Image-text retrieval: an image's captions found among all, and a caption's image."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from fusionkit.tasks.task import Task

Direction = Literal["image_to_text", "text_to_image", "both"]
IMAGES = ("pixel_values", "image")
"""What dual encoders call images; whatever else a batch has is of texts."""
CAPTIONS = "captions"
"""A batch's own: how many captions each image has, int64 `(B,)`."""
KS = (1, 5, 10)
_BLOCK = 1 << 24
"""Similarities that are had at once."""


class CrossModalRecall(Metric):
    """Recall at k: the share of the queries of which something right is among the k nearest.

    An image's query is right by any of its captions, as CLIP's and CoCa's authors count it; what is
    as near as the right one counts as nearer. torchmetrics' own needs all pairs of queries and
    answers at once, as lists; this keeps features.

    Args:
        k: how many are looked at; of several, the mean.
        direction: from images to captions, or back; the mean of `both`.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    images: list[Tensor]
    texts: list[Tensor]
    counts: list[Tensor]

    def __init__(self, k: int | Sequence[int] = KS, direction: Direction = "both") -> None:
        super().__init__()
        self.k = (k,) if isinstance(k, int) else tuple(k)
        if not self.k or min(self.k) < 1:
            raise ValueError(f"expected `k` to be 1 or more, got {k}")
        if direction not in ("image_to_text", "text_to_image", "both"):
            raise ValueError(
                f"`direction` is image_to_text, text_to_image or both, got {direction}"
            )
        self.direction = direction
        for name in ("images", "texts", "counts"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, images: Tensor, texts: Tensor, counts: Tensor) -> None:
        """Take in images and their captions.

        Args:
            images: features `(B, D)`, of length 1.
            texts: features `(N, D)` of all their captions, in the images' order.
            counts: how many captions each image has, int64 `(B,)`.
        """
        self.images.append(images)
        self.texts.append(texts)
        self.counts.append(counts)

    def compute(self) -> Tensor:
        """The mean over `k`, and over directions: float32, no axes."""
        images, texts, counts = (_joined(each) for each in (self.images, self.texts, self.counts))
        owners = torch.arange(len(images), device=counts.device).repeat_interleave(counts)
        found = []
        if self.direction != "text_to_image":
            found.append(_nearer(images, texts, owners, by_image=True))
        if self.direction != "image_to_text":
            found.append(_nearer(images, texts, owners, by_image=False))
        shares = [(ranks < k).to(torch.float32).mean() for ranks in found for k in self.k]
        return torch.stack(shares).mean()


def _joined(state: Any) -> Tensor:
    """What was taken in; one tensor already, where processes have been brought together."""
    return state if isinstance(state, Tensor) else torch.cat(state)


def _nearer(images: Tensor, texts: Tensor, owners: Tensor, by_image: bool) -> Tensor:
    """How many wrong answers are at least as near to each query as its nearest right one.

    Args:
        images: `(I, D)`.
        texts: `(N, D)`.
        owners: the image of each text, `(N,)`.
        by_image: queries are images, answers texts; or the other way.
    """
    queries, answers = (images, texts) if by_image else (texts, images)
    numbers = torch.arange(len(images), device=owners.device)
    ours, theirs = (numbers, owners) if by_image else (owners, numbers)
    size, found = max(_BLOCK // len(answers), 1), []
    for start in range(0, len(queries), size):
        near = queries[start : start + size].to(torch.float32) @ answers.to(torch.float32).T
        right = ours[start : start + size, None] == theirs
        best = near.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        found.append(((near >= best) & ~right).sum(1))
    return torch.cat(found)


@dataclass(frozen=True)
class ImageTextRetrieval(Task):
    """Images and captions that belong together: recall at 1, 5 and 10, both ways.

    Batches are a dual encoder's arguments (images `(B, C, H, W)`, tokens of all their captions
    `(N, L)`) and `captions`, how many each image has, int64 `(B,)`. Outputs are features of length
    1: `(B, 1 + most captions, D)`, the image's first, and 0 where an image has fewer captions. The
    loss is CLIP's, contrastive within the batch; a student is compared to its teacher by the
    squared distance of features.

    Args:
        scale: what cosines are multiplied by in the loss: CLIP's, once it is trained.
    """

    scale: float = 100.0

    def predict(self, model: Callable[..., Any], batch: Any) -> Tensor:
        """Call a model of transformers or open_clip."""
        said = model(**{name: value for name, value in batch.items() if name != CAPTIONS})
        images, texts = (nn.functional.normalize(each, dim=-1) for each in _features(said))
        counts: Tensor = batch[CAPTIONS]
        shape = (len(counts), int(counts.max()), images.shape[-1])
        padded = texts.new_zeros(shape)
        padded[_there(counts)] = texts
        return torch.cat([images[:, None], padded], 1)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Cross-entropy of each image's captions among the batch's, and of each caption's image."""
        images, texts, counts = _parts(outputs, batch)
        owners = torch.arange(len(images), device=texts.device).repeat_interleave(counts)
        logits = self.scale * texts.to(torch.float32) @ images.to(torch.float32).T
        to_image = nn.functional.cross_entropy(logits, owners)
        own = logits.log_softmax(0)[torch.arange(len(texts), device=texts.device), owners]
        weights = 1 / counts[owners] / len(images)
        return (to_image - (own * weights).sum()) / 2

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean squared distance of features."""
        apart = (student.to(torch.float32) - teacher.to(torch.float32)).square().sum()
        return apart / (teacher != 0).any(-1).sum().clamp(min=1)

    def metric(self) -> Metric:
        """The mean of recall at 1, 5 and 10, both ways."""
        return CrossModalRecall()

    def others(self) -> Mapping[str, Metric]:
        """Each of them."""
        ways: tuple[Direction, ...] = ("image_to_text", "text_to_image")
        return {f"{way}@{k}": CrossModalRecall(k, way) for way in ways for k in KS}

    @property
    def metrics(self) -> Mapping[str, type[Metric]]:
        """The same by name."""
        return {CrossModalRecall.__name__: CrossModalRecall}

    def update(self, metric: Metric, outputs: Tensor, batch: Any) -> None:
        """With features of images and of captions, and counts."""
        metric.update(*_parts(outputs, batch))

    def predictions(self, outputs: Tensor, batch: Any) -> list[dict[str, Any]]:
        """How similar an image and its captions are: cosines."""
        found = (outputs[:, 1:] @ outputs[:, 0, :, None])[..., 0].to(torch.float32)
        pairs = zip(found.tolist(), batch[CAPTIONS].tolist(), strict=True)
        return [{"similarities": row[:count]} for row, count in pairs]

    def count(self, batch: Any) -> int:
        """How many images there are."""
        return len(batch[CAPTIONS])

    def first(self, batch: Any, rows: int) -> Any:
        """A batch's first images, and their captions."""
        texts = int(batch[CAPTIONS][:rows].sum())
        ends = dict.fromkeys((*IMAGES, CAPTIONS), rows)
        return {name: value[: ends.get(name, texts)] for name, value in batch.items()}


def _features(said: Any) -> tuple[Tensor, Tensor]:
    """Features of images and of texts, in what a dual encoder says."""
    if hasattr(said, "image_embeds"):
        return said.image_embeds, said.text_embeds
    if isinstance(said, Mapping):
        return said["image_features"], said["text_features"]
    return said[0], said[1]


def _there(counts: Tensor) -> Tensor:
    """Which captions there are, of as many as one image has at most: bool `(B, most)`."""
    return torch.arange(int(counts.max()), device=counts.device) < counts[:, None]


def _parts(outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Features of images and of their captions, and how many each has."""
    counts: Tensor = batch[CAPTIONS].to(outputs.device)
    return outputs[:, 0], outputs[:, 1 : 1 + int(counts.max())][_there(counts)], counts
