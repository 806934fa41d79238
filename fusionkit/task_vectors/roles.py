"""What each tensor of a base is to a family: its role, its ties, the stack of experts it is in.

- *delta*: a floating-point weight; its task vectors are what codecs compress.
- *exact*: an integer tensor or a buffer (BatchNorm statistics); comes back exactly, stored
  whole for the tasks in which it differs from the base.
- *frozen*: equal to the base in every task, as declared, or as no adapter touches it and no
  fine-tuned class has it; may be absent, costs no bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from fusionkit.checkpoints.adapters.modules import AdapterSpace
from fusionkit.checkpoints.architecture import is_stack
from fusionkit.checkpoints.checkpoint import Checkpoint, matches, same_values
from fusionkit.checkpoints.stacks import rows_of

Role = Literal["delta", "exact", "frozen"]

BUFFERS = ("*running_mean", "*running_var", "*num_batches_tracked")


def stacks_of(
    base: Checkpoint, finetuned: Sequence[Checkpoint], is_private: Callable[[str], bool]
) -> dict[str, int]:
    """The base's stacks of experts, by its class, or by name and shape where it has none.

    Args:
        base: the base.
        finetuned: the fine-tuned models; a stack has one shape in all that have it.
        is_private: whether a tensor is each task's own, and so stays whole.

    Returns:
        name of a stack → how many matrices it has.
    """
    known = base.architecture.stacks if base.architecture else None
    return {
        name: spec.shape[0]
        for name, spec in base.specs.items()
        if (is_stack(name, spec.shape) if known is None else name in known)
        if spec.numel and spec.dtype.is_floating_point and not is_private(name)
        if all(each.specs[name].shape == spec.shape for each in finetuned if name in each)
    }


def ties_of(
    base: Checkpoint, finetuned: Sequence[Checkpoint], is_private: Callable[[str], bool]
) -> dict[str, str]:
    """The base's ties that every task keeps: none of whose names is private, or apart.

    Args:
        base: the base.
        finetuned: the fine-tuned models.
        is_private: whether a tensor is each task's own.

    Returns:
        name → name of the tensor that it shares.
    """
    return {
        alias: name
        for alias, name in base.aliases.items()
        if not is_private(alias) and not is_private(name)
        if not any(_apart(tuned, alias, name) for tuned in finetuned)
    }


def touches(checkpoint: Checkpoint, name: str, space: AdapterSpace | None) -> bool:
    """Whether a checkpoint has a tensor of its own; of adapters' own, those that are there."""
    return checkpoint.touches(name) and (space is None or name in checkpoint)


class Roles:
    """The rules by which a tensor of the base gets its role.

    Args:
        base: the base, stacks split.
        finetuned: the fine-tuned models, stacks split.
        frozen: patterns of the tensors that are declared frozen; a stack is as a whole.
        stacks: name of a stack → how many matrices it has.
        space: how adapters' own tensors make the base's weights; None where they are merged.
    """

    def __init__(
        self,
        base: Checkpoint,
        finetuned: Sequence[Checkpoint],
        frozen: Sequence[str],
        stacks: Mapping[str, int],
        space: AdapterSpace | None,
    ) -> None:
        self._base, self._finetuned, self._frozen, self._space = base, finetuned, frozen, space
        self._stack_of = {row: stack for row, (stack, _) in rows_of(stacks).items()}
        known = base.architecture
        self._buffers = base.buffers | (known.buffers if known else frozenset())

    def of(self, name: str) -> Role:
        """A tensor's role."""
        if self._space and name in self._space.still:
            return "frozen"
        whole = self._stack_of.get(name, name)
        if matches(whole, self._frozen) or self._is_no_ones(whole):
            return "frozen"
        if not any(touches(each, name, self._space) for each in self._finetuned):
            return "frozen"
        is_buffer = name in self._buffers or matches(name, BUFFERS)
        floats = self._base.specs[name].dtype.is_floating_point
        return "delta" if floats and not is_buffer else "exact"

    def _is_no_ones(self, name: str) -> bool:
        """Whether it is the head of the base's class, and all fine-tuned ones are other classes."""
        own = self._base.architecture
        return (
            own is not None
            and name in own.head
            and all(
                each.architecture is not None
                and each.architecture.name != own.name
                and name not in each.architecture.shapes
                and name not in each
                for each in self._finetuned
            )
        )


def _apart(tuned: Checkpoint, alias: str, name: str) -> bool:
    """Whether a checkpoint holds two names apart that are one tensor in the base."""
    if alias not in tuned or name not in tuned:
        return False
    return not same_values(tuned, alias, tuned, name)
