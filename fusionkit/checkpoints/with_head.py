"""A model with the tensors of its head, which are kept apart from it, beside its own."""

from torch import Tensor

from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.checkpoints.checkpoint import Checkpoint, Pieces
from fusionkit.checkpoints.view import View
from fusionkit.errors import CheckpointError


class WithHead(View):
    """A model, and beside its tensors those of its head; made of a `Headed`.

    Args:
        model: the model.
        head: the other tensors.

    Raises:
        CheckpointError: the model has a tensor of the head already.
    """

    def __init__(self, model: Checkpoint, head: Checkpoint) -> None:
        super().__init__(model)
        if twice := [name for name in head if name in model and model.touches(name)]:
            raise CheckpointError(
                f"{head.label}: '{twice[0]}' is to be the head of {model.label}, which has a "
                "tensor of that name itself; give the model without a head, or leave the head out"
            )
        self._head = head
        self.specs = {**self.specs, **head.specs}
        self.aliases = {**self.aliases, **head.aliases}
        self.nbytes += head.nbytes
        self.live |= head.live
        # A head that is in memory can't be known again by any file.
        self.files = (*model.files, *head.files) if head.files else ()

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor of either."""
        return self._head[name] if name in self._head else super().__getitem__(name)

    def pieces(self, name: str) -> Pieces:
        """Read one tensor piece by piece, as its own place does."""
        return self._head.pieces(name) if name in self._head else super().pieces(name)

    def prefetch(self, name: str) -> None:
        """Have a tensor read ahead, as its own place does."""
        if name not in self._head:
            super().prefetch(name)

    def touches(self, name: str) -> bool:
        """As the model says; a head is the task's own."""
        return name in self._head or super().touches(name)

    def delta(self, name: str) -> Tensor | None:
        """As the model says; of a head, nobody does."""
        return None if name in self._head else super().delta(name)

    def low_rank(self, name: str) -> LowRank | None:
        """As the model says; of a head, nobody does."""
        return None if name in self._head else super().low_rank(name)
