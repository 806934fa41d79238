"""One live model that becomes any task's, in place."""

from collections import OrderedDict
from collections.abc import Mapping, Set

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fusionkit.checkpoints.checkpoint import Checkpoint
from fusionkit.checkpoints.live_model import on_meta, put
from fusionkit.errors import BundleError, FusionKitError
from fusionkit.reuse.sharded import beside, kept, kept_bytes, whole
from fusionkit.task_vectors.task_source import TaskSource, write_weights, written


class Switcher:
    """Rewrites a model's weights; the base's are kept beside it, so that every switch starts there.

    Args:
        model: the model, with the base's weights.
        cache_bytes: of this size, the weights of the tasks used last are kept, beside the model
            and on its device; a switch to one of them is a copy.
        base: where the weights of a model on the meta device are; it can be switched once it has
            them.

    Attributes:
        base: the base's weights, on the model's device, in their own dtype; sharded, where the
            model is (`sharded.py`).
        cached: the tasks whose weights are kept, the one used last at the end.
    """

    def __init__(
        self, model: nn.Module, cache_bytes: int = 0, base: Checkpoint | None = None
    ) -> None:
        self.model = model
        self.base = base if base is not None and on_meta(model) else beside(model)
        self.cached: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._cached_of: TaskSource | None = None
        self._cached_version: object = None
        self._cache_bytes = cache_bytes
        self._private: frozenset[str] = frozenset()

    def forget(self) -> None:
        """Drop what was kept of tasks: they come from elsewhere now, or in another dtype."""
        self.cached.clear()

    def become(
        self, task: str | None, source: TaskSource | None = None, left_out: Set[str] = frozenset()
    ) -> None:
        """Make the model a task's.

        Args:
            task: one of the source's; None makes it the base.
            source: where its tensors come from.
            left_out: tensors to leave as they are.

        Raises:
            BundleError: the source has no such task, a file of it was changed, or one of its
                tensors has no place in the model, which is then the base.
            FamilyError: the source is a family, and has no such task; the model is then the base.
            FusionKitError: the model is on the meta device.
        """
        # Weights made under inference mode could never be trained again.
        with torch.inference_mode(False), torch.no_grad():
            if on_meta(self.model):
                raise FusionKitError(
                    "the model is on the meta device and can't be switched; first call "
                    "`ReuseModule.shard`, or let a Trainer with ModelParallelStrategy do that"
                )
            try:
                self._become(task, source, left_out)
            except BaseException:
                self._become(None, None, frozenset())  # never a mixture of two tasks
                raise

    def to(self, device: torch.device) -> None:
        """Follow the model, which was moved to a device, or cast."""
        held = kept(self.base)
        if device.type != "meta" and held[next(iter(held))].device != device:
            self.base = self.base.in_memory(device)
        self.forget()

    def _become(self, task: str | None, source: TaskSource | None, left_out: Set[str]) -> None:
        state = _state(self.model)
        private: dict[str, Tensor] = {}
        if task is None or source is None:
            self._place(state, kept(self.base))
        else:
            private = dict(source.private_tensors(task))
            out = {name: tensor for name, tensor in state.items() if name not in left_out}
            self._write(task, source, out, keep=not left_out)
            # A head that the last task had and this one lacks goes back to the base's.
            left = {name: kept(self.base)[name] for name in self._private - private.keys()}
            self._place(state, {**left, **private})
        self._private = frozenset(private)

    def _write(self, task: str, source: TaskSource, out: Mapping[str, Tensor], keep: bool) -> None:
        """Write a task's weights, as they were kept, or anew; then keep them if they fit."""
        if self._cached_of is not source or self._cached_version != source.version:
            self.forget()
            self._cached_of, self._cached_version = source, source.version
        if keep and task in self.cached:
            self.cached.move_to_end(task)
            for name, value in self.cached[task].items():
                out[name].copy_(value)
            return
        with whole(out) as targets:
            write_weights(source, task, self.base, targets)
        names = [name for name in written(source) if name in out] if self._cache_bytes else []
        size = sum(kept_bytes(out[name]) for name in names)
        if not keep or not 0 < size <= self._cache_bytes:
            return
        while self.cached and (len(self.cached) + 1) * size > self._cache_bytes:
            self.cached.popitem(last=False)  # all tasks are of one size
        self.cached[task] = {name: out[name].clone() for name in names}

    def _place(self, state: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Put whole tensors in their places, whatever shapes were there."""
        for name, value in tensors.items():
            self._place_one(state, name, value)

    def _place_one(self, state: dict[str, Tensor], name: str, value: Tensor) -> None:
        if name not in state:
            raise BundleError(
                f"the task's private tensor '{name}' has no place in {type(self.model).__name__}; "
                "build the model with a head of that name"
            )
        old = state[name]
        if old.shape == value.shape:
            put(old, value)
            return
        if isinstance(old, DTensor):
            raise BundleError(
                f"the task's private tensor '{name}' has another shape than the model's, which is "
                "sharded; name it in `private` before the model is sharded, or leave it unsharded"
            )
        path, _, leaf = name.rpartition(".")
        parent = self.model.get_submodule(path)
        fresh = value.to(device=old.device, dtype=old.dtype, copy=True)
        if leaf in parent._parameters:
            fresh = nn.Parameter(fresh, requires_grad=parent._parameters[leaf].requires_grad)  # type: ignore[union-attr]
        setattr(parent, leaf, fresh)
        if isinstance(parent, nn.Linear) and leaf == "weight":
            parent.out_features, parent.in_features = fresh.shape


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The model's own tensors, by every name, detached but not copied."""
    return dict(model.state_dict())
