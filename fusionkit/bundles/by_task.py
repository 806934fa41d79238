"""A bundle as a mapping: task name → its whole model, made tensor by tensor as it is asked for."""

from collections.abc import Iterator, KeysView
from typing import cast

from fusionkit.bundles.weights import TaskWeights, Whole


class ByTask:
    """What has tasks, as a mapping of them.

    It is none by type: two bundles are the same if they are one object, and what takes a mapping
    takes a state dict.
    """

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        raise NotImplementedError

    def __len__(self) -> int:
        """How many tasks there are."""
        return len(self.tasks)

    def __iter__(self) -> Iterator[str]:
        """The tasks' names."""
        return iter(self.tasks)

    def __contains__(self, task: object) -> bool:
        """Whether there is a task of this name."""
        return task in self.tasks

    def __getitem__(self, task: str) -> TaskWeights:
        """A task's whole model, as a mapping: `bundle["dogs"]["head.weight"]` decodes one tensor.

        Raises:
            BundleError: there is no such task, or the base can't be found.
            WrongBaseError: the base at hand is another model.
        """
        return TaskWeights(cast(Whole, self), task)

    def keys(self) -> KeysView[str]:
        """The tasks' names; `dict(bundle)` has every task's model, none of them decoded."""
        return dict.fromkeys(self.tasks).keys()
