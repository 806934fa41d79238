"""What stands in for a module while a batch of many tasks runs, and guards its tensors.

Meanwhile the module's tensors are held: whoever reads them past the layer would get the base's, and
is told so.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fusionkit.errors import FusionKitError
from fusionkit.reuse.operands import Operand
from fusionkit.reuse.row_tasks import RowTasks


class Running(Protocol):
    """The batch that runs: whose rows are which, and what their tasks change."""

    def rows_of_call(self) -> RowTasks:
        """Whose rows are which in the call that runs."""
        ...

    def operand(self, task: str | None, name: str) -> Operand | None:
        """What a task has of one of the model's tensors; None: the base's."""
        ...

    def tensor(self, task: str | None, name: str, base: Tensor) -> Tensor:
        """A task's tensor itself, formed of the base's if need be."""
        ...

    def within(self, rows: RowTasks) -> AbstractContextManager[None]:
        """A context in which the batch is some of its rows, all of one task."""
        ...


class Leaf(NamedTuple):
    """A tensor that a module has.

    Attributes:
        module: the module.
        path: its name in the model.
        name: what the tensor is called there.
        tensor: the tensor.
    """

    module: nn.Module
    path: str
    name: str
    tensor: Tensor

    @property
    def full(self) -> str:
        """The model's name of it."""
        return f"{self.path}.{self.name}" if self.path else self.name

    def now(self) -> Tensor:
        """What is in its place now."""
        tensors = (
            self.module._parameters
            if self.name in self.module._parameters
            else self.module._buffers
        )
        found = tensors[self.name]
        assert found is not None
        return found

    def put(self, tensor: Tensor) -> None:
        """Put a tensor in its place."""
        if isinstance(self.module, nn.RNNBase):  # it lists its weights beside
            setattr(self.module, self.name, tensor)
        elif self.name in self.module._parameters:
            self.module._parameters[self.name] = tensor  # type: ignore[assignment]
        else:
            self.module._buffers[self.name] = tensor


class Layer:
    """Stands in for one module while a batch of many tasks runs.

    Args:
        module: the module.
        path: its name in the model.

    Attributes:
        leaves: the tensors that tasks may change, and no other layer has.
    """

    def __init__(self, module: nn.Module, path: str) -> None:
        self.module, self.path = module, path or type(module).__name__
        self.leaves: list[Leaf] = []
        self._held: list[Tensor] = []
        self._guards: list[tuple[Tensor, Tensor]] = []  # of each tensor, made once
        self._before: Any = None
        self._forward: Callable[..., Any] = module.forward

    def enter(self, running: Running) -> None:
        """Stand in for the module."""
        self._before = self.module.__dict__.get("forward")
        self._forward = self.module.forward
        self._held = [leaf.now() for leaf in self.leaves]
        before = self._guards
        if len(before) != len(self._held) or any(
            tensor is not own for tensor, (own, _) in zip(self._held, before, strict=True)
        ):
            self._guards = [
                (tensor, held(tensor, leaf.full))
                for leaf, tensor in zip(self.leaves, self._held, strict=True)
            ]
        for leaf, (_, guard) in zip(self.leaves, self._guards, strict=True):
            leaf.put(guard)
        self.module.__dict__["forward"] = lambda *args, **kwargs: self(running, *args, **kwargs)

    def leave(self) -> None:
        """Leave the module as it was."""
        if self._before is None:
            self.module.__dict__.pop("forward", None)
        else:
            self.module.__dict__["forward"] = self._before
        for leaf, tensor in zip(self.leaves, self._held, strict=True):
            leaf.put(tensor)
        self._held = []

    def __call__(self, running: Running, *args: Any, **kwargs: Any) -> Any:
        """What the module returns, each row's by its own task."""
        raise NotImplementedError

    def tensor(self, running: Running, task: str | None, name: str) -> Tensor | None:
        """A task's tensor by the leaf's name, or the base's; None where there is none."""
        base = self.base(name)
        for leaf in self.leaves:
            if leaf.name == name and base is not None:
                return running.tensor(task, leaf.full, base)
        return base

    def operand(self, running: Running, task: str | None, name: str) -> Operand | None:
        """What a task has of a tensor by the leaf's name; None: the base's."""
        found = (running.operand(task, leaf.full) for leaf in self.leaves if leaf.name == name)
        return next(found, None)

    def base(self, name: str) -> Tensor | None:
        """The base's tensor of that name, or the module's own that no task changes."""
        for leaf, tensor in zip(self.leaves, self._held, strict=True):
            if leaf.name == name:
                return tensor
        found: Tensor | None = getattr(self.module, name)
        return found

    def by_rows(self, tensor: Tensor, rows: RowTasks) -> Tensor:
        """A tensor `(rows · k, …)`, in the rows' order, or `(1, …)`, every row's: `(rows, k, …)`.

        Raises:
            FusionKitError: it is neither.
        """
        count = len(rows)
        if tensor.ndim and len(tensor) == 1:
            return tensor[None].expand(count, *tensor.shape)
        if not tensor.ndim or len(tensor) % count:
            raise self.refused(tensor, rows)
        return tensor.reshape(count, -1, *tensor.shape[1:])

    def refused(self, tensor: Tensor, rows: RowTasks) -> FusionKitError:
        """That a tensor's rows are not known."""
        return FusionKitError(
            f"'{self.path}' is given a tensor of shape {list(tensor.shape)} in a batch of "
            f"{len(rows)} rows; a batch of many tasks needs the rows, or a multiple of them in "
            "their order, as the first axis; run the tasks one by one (ReuseModule.switch)"
        )


class Held(nn.Parameter):
    """A tensor that stands where a layer's own is, while the layer stands in for its module.

    What it is (dtype, shape, device) may be asked; what it holds, not: it would be the base's.
    """

    full: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what may be asked, and refuse all else."""
        if func is Tensor.detach:  # for a state dict, whose values are held as well
            return args[0]
        if func in _ASKED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        name = next(each.full for each in _flat(args, kwargs) if isinstance(each, cls))
        raise FusionKitError(
            f"'{name}', which tasks of this batch change, is read past its own layer "
            f"({getattr(func, '__name__', func)}); a batch of many tasks can't be run by this "
            "model; run the tasks one by one (ReuseModule.switch)"
        )


def held(tensor: Tensor, full: str) -> Tensor:
    """What stands in a tensor's place meanwhile."""
    with torch.inference_mode(False), torch.no_grad():
        found = torch.Tensor._make_subclass(Held, tensor.detach(), False)
    found.full = full
    return found


def _flat(args: Any, kwargs: Any) -> Iterator[Any]:
    for each in (*args, *(kwargs or {}).values()):
        yield from each if isinstance(each, list | tuple) else [each]


_ASKED = {
    getattr(Tensor, name).__get__
    for name in (
        "dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_cuda", "is_meta",
        "is_leaf", "is_sparse", "is_quantized", "grad", "grad_fn",
    )
} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex,
    Tensor.element_size, Tensor.get_device, Tensor.__len__, Tensor.nelement,
}  # fmt: skip
