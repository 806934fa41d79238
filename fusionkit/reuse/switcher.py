"""One live model that becomes any task's, in place."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Set

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fusionkit.checkpoints.checkpoint import Checkpoint
from fusionkit.checkpoints.in_memory import state_of
from fusionkit.checkpoints.live_model import on_meta, put
from fusionkit.checkpoints.rounding import check_rounding
from fusionkit.checkpoints.stacks import split_tensors, whole_names
from fusionkit.checkpoints.vocabulary import grown
from fusionkit.errors import BundleError, FusionKitError
from fusionkit.reuse.resizing import put_anew, resize
from fusionkit.reuse.seen import Seen
from fusionkit.reuse.sharded import beside, kept, kept_bytes, whole
from fusionkit.task_vectors.task_source import TaskSource, write_added, write_weights, written


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
        self._resized: frozenset[str] = frozenset()
        self._seen: tuple[tuple[TaskSource, object, frozenset[str]], Seen] | None = None

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
                tensors has no place in the model, or is too large for the model's dtype; the
                model is then the base.
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

    def seen(self, source: TaskSource, private: Iterable[str] = ()) -> Seen:
        """The model as a source sees it; ties that it does not have are undone.

        Args:
            source: the source.
            private: names of tensors that are a task's own.
        """
        key = source, source.version, frozenset(private)
        if self._seen is None or self._seen[0] != key:
            self._seen = key, Seen(self.model, source, key[2])
        return self._seen[1]

    def _become(self, task: str | None, source: TaskSource | None, left_out: Set[str]) -> None:
        private: dict[str, Tensor] = {}
        if task is None or source is None:
            self._resize({})
            self._place(state_of(self.model), kept(self.base))
        else:
            own = dict(source.private_tensors(task))
            seen = self.seen(source, own)
            self._resize(seen.places(source.added(task)))
            state = state_of(self.model)
            self._write(task, source, seen, seen.named(state), left_out)
            private = {seen.live_name(name): value for name, value in own.items()}
            for name in private.keys() & state.keys():
                what = f"{source.label}: task '{task}': tensor '{name}'"
                check_rounding(private[name], state[name].dtype, what)
            # A head that the last task had and this one lacks goes back to the base's.
            left = {name: kept(self.base)[name] for name in self._private - private.keys()}
            self._place(state, {**left, **private})
        self._private = frozenset(private)

    def _resize(self, added: Mapping[str, int]) -> None:
        """Have room for the rows that a task adds; those of the last one go.

        Args:
            added: the model's own name of a tensor → how many.
        """
        rows = {**dict.fromkeys(self._resized, 0), **added}
        self._resized = frozenset(rows)  # if it can't be done, too
        shapes = {name: grown(self.base.specs[name].shape, n) for name, n in rows.items()}
        resize(self.model, shapes)
        self._resized = frozenset(added)

    def _write(
        self,
        task: str,
        source: TaskSource,
        seen: Seen,
        state: Mapping[str, Tensor],
        left_out: Set[str],
    ) -> None:
        """Write a task's weights, as they were kept, or anew; then keep them if they fit."""
        if self._cached_of is not source or self._cached_version != source.version:
            self.forget()
            self._cached_of, self._cached_version = source, source.version
        out = state
        if left_out:
            split = split_tensors(state, source.stacks)
            out = {name: tensor for name, tensor in split.items() if name not in left_out}
        elif task in self.cached:
            self.cached.move_to_end(task)
            for name, value in self.cached[task].items():
                out[name].copy_(value)
            return
        with whole(out) as targets:
            write_weights(source, task, seen.base(self.base), targets, seen.apart)
            write_added(source, task, targets, seen.apart)
        if not left_out and self._cache_bytes:
            own = [*whole_names(written(source), source.stacks), *source.added(task)]
            names = dict.fromkeys([*own, *seen.apart])
            self._keep(task, {name: out[name] for name in names if name in out})

    def _keep(self, task: str, tensors: Mapping[str, Tensor]) -> None:
        size = sum(kept_bytes(tensor) for tensor in tensors.values())
        if not 0 < size <= self._cache_bytes:
            return
        sizes = [sum(map(kept_bytes, each.values())) for each in self.cached.values()]
        while self.cached and sum(sizes) + size > self._cache_bytes:
            self.cached.popitem(last=False)
            del sizes[0]
        self.cached[task] = {name: tensor.clone() for name, tensor in tensors.items()}

    def _place(self, state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Put whole tensors in their places, whatever shapes were there."""
        for name, value in tensors.items():
            self._place_one(state, name, value)

    def _place_one(self, state: Mapping[str, Tensor], name: str, value: Tensor) -> None:
        if name not in state:
            raise BundleError(
                f"the task's private tensor '{name}' has no place in {type(self.model).__name__}; "
                "build the model with a tensor of that name, or put it into `ignore` if no one "
                "needs it"
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
        put_anew(self.model, [name], value.to(device=old.device, dtype=old.dtype, copy=True))
