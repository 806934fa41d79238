"""A PEFT adapter merged into its base, read lazily like any other checkpoint."""

from copy import copy

import torch
from torch import Tensor

from fusionkit.checkpoints.adapters.adapter import Adapter
from fusionkit.checkpoints.adapters.kinds import LoraModule, Module, ParameterModule
from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.checkpoints.adapters.start import start_of
from fusionkit.checkpoints.checkpoint import Checkpoint, Pieces
from fusionkit.checkpoints.rounding import check_rounding


class MergedAdapter(Checkpoint):
    """A base with an adapter merged into it, tensor by tensor as they are asked for.

    Equal to PEFT's `merge_and_unload()` to float32 rounding.

    Args:
        base: the base model.
        adapter: the adapter.

    Attributes:
        below: the base.
        adapter: the adapter.
        layout: what the adapter does to the base.

    Raises:
        CheckpointError: a factor is missing, or it can't be told what the adapter does.
        FamilyError: it is an adapter of another base.
    """

    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        self.below, self.adapter = base, adapter
        self.layout = adapter.layout(base)
        self._own = tensors = adapter.tensors
        self._whole = frozenset(adapter.whole)
        self.label, self.files, self.nbytes = adapter.label, tensors.files, tensors.nbytes
        self.strip_prefix, self.add_prefix = base.strip_prefix, base.add_prefix
        self.buffers, self.serial = base.buffers, base.serial
        self.architecture, self.unread = base.architecture, base.unread
        self.specs = {**base.specs, **{name: tensors.specs[name] for name in self._whole}}
        self._start: dict[str, Tensor] | None = None
        self._modules = {name: (module, name) for name, module in self.layout.by_target.items()}
        self._touched = {*self._modules, *self._whole}
        # PEFT puts its factors beside one of two tied weights, which then are two.
        self.aliases = {
            name: to
            for name, to in base.aliases.items()
            if name not in self._touched and to not in self._touched
        }

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor; one that the adapter changes or replaces, in the dtype that it had."""
        base = (self._own if name in self._whole else self.below)[name]
        if name not in self._modules:
            return base
        module, target = self._modules[name]
        delta = module.delta(target, base, *self._tensors(module))
        return self._sum(name, base, delta)

    def pieces(self, name: str) -> Pieces:
        """Read one tensor piece by piece; what the adapter changes or replaces is made whole."""
        return super().pieces(name) if name in self._touched else self.below.pieces(name)

    def row(self, name: str, index: int) -> Tensor:
        """Read one entry along a tensor's first axis; an expert's is made alone."""
        if name not in self._touched:
            return self.below.row(name, index)
        if product := self.row_low_rank(name, index):
            base = self.below.row(name, index)
            return self._sum(name, base, product.dense(base.shape))
        return self[name][index]

    def row_pieces(self, name: str, index: int) -> Pieces:
        """Read the same piece by piece."""
        if name in self._touched:
            return self.row(name, index).reshape(-1).__getitem__
        return self.below.row_pieces(name, index)

    def prefetch(self, name: str) -> None:
        """Have a tensor of the base read ahead."""
        if name in self.below:
            self.below.prefetch(name)

    def prefetch_row(self, name: str, index: int) -> None:
        """Have one entry of a tensor of the base read ahead."""
        if name in self.below:
            self.below.prefetch_row(name, index)

    @property
    def stored(self) -> Checkpoint:
        """The adapter's own tensors."""
        return self._own

    def touches(self, name: str) -> bool:
        """Whether the adapter changes or replaces a tensor."""
        return name in self._touched

    def in_memory(self, device: torch.device | None = None) -> Checkpoint:
        """A copy of the base and of the adapter's tensors; merged as they are asked for, too."""
        other = copy(self)
        other.below, other._own = self.below.in_memory(device), self._own.in_memory(device)
        if self.layout.linearized:
            other._start = {n: t.to(device or t.device) for n, t in self._initial().items()}
        other.files, other.nbytes = (), other._own.nbytes
        return other

    def delta(self, name: str) -> Tensor | None:
        """The change of a tensor, float32 `(*shape)`; None where the base's was replaced first."""
        shape = torch.Size(self.specs[name].shape)
        if name not in self._touched:
            return torch.zeros(shape)
        if name not in self._modules or name in self._whole:
            return None
        if product := self.low_rank(name):
            return product.dense(shape)  # the base's need not be read
        module, target = self._modules[name]
        return module.delta(target, self.below[name], *self._tensors(module))

    def row_delta(self, name: str, index: int) -> Tensor | None:
        """The change of one entry along the first axis, float32 `(*shape[1:])`."""
        if name not in self._touched:
            return torch.zeros(self.specs[name].shape[1:])
        if product := self.row_low_rank(name, index):
            return product.dense(torch.Size(self.specs[name].shape[1:]))
        return super().row_delta(name, index)

    def low_rank(self, name: str) -> LowRank | None:
        """The change of a weight as a product; None where it is not one."""
        module, target = self._modules.get(name, (None, ""))
        if name in self._whole:
            return None
        if isinstance(module, ParameterModule) and len(self.specs[name].shape) == 2:
            return module.low_rank(self._tensors(module)[0], 1, 0)
        if not isinstance(module, LoraModule) or target != module.targets[0]:
            return None
        return module.low_rank(*self._tensors(module))

    def row_low_rank(self, name: str, index: int) -> LowRank | None:
        """The change of one expert's matrix as a product; None where it is not one."""
        module, _ = self._modules.get(name, (None, ""))
        if not isinstance(module, ParameterModule) or name in self._whole:
            return None
        return module.low_rank(self._tensors(module)[0], self.specs[name].shape[0], index)

    def _sum(self, name: str, base: Tensor, delta: Tensor) -> Tensor:
        """θ₀ + τ, rounded to the base's dtype."""
        merged = torch.add(base.to(torch.float32), delta)
        what = f"{self.label}: tensor '{name}', merged,"
        check_rounding(merged, base.dtype, what, "give the base in")
        return merged.to(base.dtype)

    def _tensors(self, module: Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        own = {name: self._own[name] for name in module.tensors}
        if not self.layout.linearized:
            return own, {}
        return own, self._initial()

    def _initial(self) -> dict[str, Tensor]:
        """Where a linearized adapter started; read, or drawn, once."""
        if self._start is None:
            self._start = start_of(self.adapter, self.layout)[1]
        return self._start
