"""Which task a row is of, by what it resembles: its nearest neighbours among a few of each task's.

Rows are compared by the base model's own features, which no task changes: a task that is
compressed anew, or calibrated, leaves a router as it is. Of the layers, those about two thirds deep
tell tasks apart best: the last ones say what a text is about, and less how it is written.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fusionkit.bundles.bundle import Bundle
from fusionkit.checkpoints.architecture import is_transformers
from fusionkit.checkpoints.json_text import parsed_json
from fusionkit.checkpoints.safetensors_file import SafetensorsFile, read_metadata
from fusionkit.errors import BundleError, CheckpointError, DataError, FusionKitError, of_extra

ROUTER = "router.safetensors"
"""The file beside a bundle's own."""
NEIGHBOURS = 10
_DEPTH = 2 / 3
_IGNORED = -100
_FORMAT = "fusionkit-router-1"


@dataclass(frozen=True)
class Picked:
    """The task that a row is taken for.

    Attributes:
        task: its name.
        probability: the share that it has of the neighbours, the nearer counting more; on the zoo
            of text classifiers it is about as often right.
    """

    task: str
    probability: float


class Router:
    """Rows of each task, by their features.

    Args:
        features: `(N, D)`, of length 1 each.
        tasks: the task that each is of.
        base: the fingerprint of the base that made the features.
        neighbours: how many are asked.
    """

    def __init__(
        self, features: Tensor, tasks: Sequence[str], base: str, neighbours: int = NEIGHBOURS
    ) -> None:
        self.features, self.of, self.base = features.float(), list(tasks), base
        self.neighbours = min(neighbours, len(self.of))
        self._centre = self.features.mean(0)
        self._rows = self._seen(self.features)
        made = of_extra("sklearn.neighbors", "serve", "a router")
        self._known = made.KNeighborsClassifier(
            self.neighbours, weights=_nearness, metric="cosine", algorithm="brute"
        ).fit(self._rows.numpy(), self.of)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that it knows."""
        return tuple(dict.fromkeys(self.of))

    def pick(self, features: Tensor) -> list[Picked]:
        """The task of each row.

        Args:
            features: `(B, D)`.
        """
        names = self._known.classes_
        return [
            Picked(str(names[row.argmax()]), float(row.max())) for row in self._shares(features)
        ]

    def pick_one(self, features: Tensor) -> Picked:
        """The task of rows that are of one.

        Args:
            features: `(B, D)`.
        """
        shares = self._shares(features).mean(0)
        return Picked(str(self._known.classes_[shares.argmax()]), float(shares.max()))

    def found_again(self) -> dict[str, float]:
        """Of each task's rows, the share that is taken for the task's by all other rows."""
        alike = self._rows @ self._rows.T
        alike.fill_diagonal_(-torch.inf)
        values, places = alike.topk(min(self.neighbours, len(self.of) - 1))
        numbers = {task: number for number, task in enumerate(self.tasks)}
        owner = torch.tensor([numbers[task] for task in self.of])
        near = torch.from_numpy(_nearness((1 - values).numpy())).float()
        votes = torch.zeros(len(owner), len(numbers)).scatter_add_(1, owner[places], near)
        right = (votes.argmax(1) == owner).float()
        return {task: float(right[owner == number].mean()) for task, number in numbers.items()}

    def _shares(self, features: Tensor) -> Any:
        """Of each row, the share that each class has of its neighbours."""
        return self._known.predict_proba(self._seen(features).numpy())

    def _seen(self, features: Tensor) -> Tensor:
        """Features apart from what all rows have in common, of length 1."""
        return _unit(features.float() - self._centre)

    def only(self, tasks: Iterable[str]) -> "Router | None":
        """The same for some tasks; None where none of them is known."""
        wanted = set(tasks)
        kept = [place for place, task in enumerate(self.of) if task in wanted]
        if len(kept) == len(self.of):
            return self
        of = [self.of[place] for place in kept]
        return Router(self.features[kept], of, self.base, self.neighbours) if kept else None

    def save(self, path: Path) -> None:
        """Write it to a file, in float16."""
        numbers = {task: number for number, task in enumerate(self.tasks)}
        parts = {
            "features": self.features.half().contiguous(),
            "tasks": torch.tensor([numbers[task] for task in self.of], dtype=torch.int32),
        }
        about = {
            "format": _FORMAT,
            "tasks": json.dumps(self.tasks),
            "base": self.base,
            "neighbours": str(self.neighbours),
        }
        save_file(parts, path, metadata=about)

    @classmethod
    def load(cls, bundle: Bundle) -> "Router":
        """A bundle's router, for the tasks that the bundle has.

        Raises:
            BundleError: it has none, or one of another base, or of none of its tasks; or the file
                is damaged.
        """
        path = bundle.path / ROUTER
        mend = f"make it: fusionkit route {bundle.path} --data DATA"
        if not path.is_file():
            raise BundleError(f"{bundle.path} has no router ({ROUTER}); {mend}")
        try:
            file, about = SafetensorsFile(path, str(path)), read_metadata(path)
            features, numbers = file["features"], file["tasks"]
            names = dict(enumerate(parsed_json(about["tasks"])))
            of = [names[number] for number in numbers.tolist()]
            if about["format"] != _FORMAT or features.ndim != 2 or len(of) != len(features):
                raise ValueError("of another form")  # noqa: TRY301
            whole = cls(features, of, about["base"], int(about["neighbours"]))
        except (CheckpointError, KeyError, ValueError, TypeError) as error:
            raise BundleError(f"{path}: is no router ({error}); {mend}") from error
        if whole.base != bundle.manifest.base.fingerprint:
            raise BundleError(f"{path}: was made with another base than the bundle's; {mend}")
        found = whole.only(bundle.tasks)
        if found is None:
            raise BundleError(f"{path}: knows none of the bundle's tasks; {mend}")
        return found


def features_of(model: nn.Module, batch: Any) -> Tensor:
    """A base model's features of rows: the mean of what a layer says of their tokens, or places.

    Args:
        model: the base, of transformers or timm.
        batch: what it takes, as a datamodule or a tokenizer makes it. Of rows with labels for each
            token, the tokens without one count, which are the prompt's.

    Returns:
        `(B, D)` float32, of length 1.

    Raises:
        FusionKitError: the model is of another library.
        DataError: the batch has no inputs of the model.
    """
    with torch.inference_mode():
        if is_transformers(model):
            found = _of_transformers(model, batch)
        elif hasattr(model, "forward_features"):
            pixels = batch[0] if isinstance(batch, list | tuple) else batch.get("", batch)
            timm: Any = model
            found = timm.forward_head(timm.forward_features(pixels), pre_logits=True)
        else:
            raise FusionKitError(
                f"a router takes features of models of transformers or timm, not of "
                f"{type(model).__name__}"
            )
    return _unit(found.float().cpu())


def router_over(
    model: nn.Module, batches: Mapping[str, Iterable[Any]], base: str, rows: int
) -> Router:
    """A router over a few rows of each task.

    Args:
        model: the base.
        batches: task → its rows.
        base: its fingerprint.
        rows: of each task, at most.
    """
    features, of = [], []
    for task, own in batches.items():
        left = rows
        for batch in own:
            found = features_of(model, batch)[:left]
            features.append(found)
            of += [task] * len(found)
            left -= len(found)
            if left <= 0:
                break
    return Router(torch.cat(features), of, base)


def _of_transformers(model: Any, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        batch = {model.main_input_name: batch[0]}
    inner = model.base_model
    taken = signature(inner.forward).parameters
    given = {n: each for n, each in batch.items() if n in taken and isinstance(each, Tensor)}
    if model.main_input_name not in given:
        raise DataError(
            f"expected rows with '{model.main_input_name}' for {type(model).__name__}, got "
            f"{', '.join(map(str, batch))}; a router takes texts, prompts and images"
        )
    device = next(model.parameters()).device
    given = {name: value.to(device) for name, value in given.items()}
    said = inner(**given, output_hidden_states=True)
    layers: Sequence[Tensor] = getattr(said, "hidden_states", None) or [said.last_hidden_state]
    states = layers[round(_DEPTH * (len(layers) - 1))]
    if states.ndim == 4:  # (B, D, height, width)
        return states.mean((2, 3))
    mask = given.get("attention_mask")
    if mask is None or mask.shape != states.shape[:2]:
        return states.mean(1)
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.shape == mask.shape:
        prompts = mask * (labels.to(device) == _IGNORED)
        mask = torch.where(prompts.any(1, keepdim=True), prompts, mask)
    weights = mask.to(states.dtype)[..., None]
    mean: Tensor = (states * weights).sum(1) / weights.sum(1)
    return mean


def _unit(features: Tensor) -> Tensor:
    lengths: Tensor = features.norm(dim=1, keepdim=True)
    return features / lengths.clamp(min=1e-12)


def _nearness(distances: Any) -> Any:
    """What neighbours count: e to the power of 5 times the cosine less 5."""
    import numpy as np

    return np.exp(-5.0 * np.asarray(distances))
