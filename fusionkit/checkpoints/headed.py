"""A fine-tuned model whose head is not in its file, but comes from elsewhere."""

from typing import Any


class Headed:
    """A fine-tuned model, and beside it the task's own tensors that its file lacks.

    It is a source as a path is: for `Checkpoint.of`, and among a family's fine-tuned models.

    Args:
        model: the model, or its adapter: anything that `Family` takes.
        head: the tensors that it lacks: anything that `Checkpoint.of` reads.
    """

    def __init__(self, model: Any, head: Any) -> None:
        self.model = model
        self._head = head

    @property
    def head(self) -> Any:
        """The tensors that the model lacks."""
        return self._head

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model!r})"
