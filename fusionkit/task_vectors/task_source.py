"""Where tasks' weights come from, tensor by tensor, and the one loop that writes them.

A bundle, a family and a fusion are task sources alike: each knows what every tensor of the base
is to a task (`roles` says which roles there are), and gives one tensor at a time.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from fusionkit.checkpoints.adapters.kinds import Module
from fusionkit.checkpoints.adapters.modules import AdapterSpace
from fusionkit.checkpoints.rounding import Rounding
from fusionkit.checkpoints.stacks import split_tensors
from fusionkit.checkpoints.vocabulary import beyond, common, extended
from fusionkit.errors import BundleError
from fusionkit.task_vectors.roles import Role


class TaskSource(Protocol):
    """Gives tasks' tensors: a `Bundle`, a `Family` as it is, or a `Fused` one."""

    @property
    def label(self) -> str:
        """How messages call it."""
        ...

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        ...

    @property
    def roles(self) -> Mapping[str, Role]:
        """Name of a tensor of the base, or of adapters' own → its role; private ones not in it."""
        ...

    @property
    def stacks(self) -> Mapping[str, int]:
        """Name of a stack of experts → how many matrices it is split into, each with a role."""
        ...

    @property
    def tied(self) -> Mapping[str, str]:
        """Name → name of the tensor that it shares in every task; without a role of its own."""
        ...

    @property
    def rename(self) -> Mapping[str, str]:
        """How a model's own names become these; see `Family`."""
        ...

    @property
    def space(self) -> AdapterSpace | None:
        """How adapters' own tensors make the base's weights; None where weights are reused."""
        ...

    @property
    def initial(self) -> Mapping[str, Tensor]:
        """The tensors that adapters started from, by name; empty where weights are reused."""
        ...

    @property
    def version(self) -> object:
        """Equal as long as every task's tensors are the same."""
        ...

    def tensor(
        self, task: str, name: str, base: Tensor, out: Tensor | None = None
    ) -> Tensor | None:
        """One of a task's tensors of role *delta*.

        Args:
            task: one of `tasks`.
            name: the tensor's name.
            base: the base's, `(*shape)`, in its own dtype; not to be changed.
            out: float32 `(*shape)`, on the base's device; the result may be formed in it, which
                spares memory and a copy.

        Returns:
            `(*shape)` on the base's device: the tensor in its own dtype, or a sum in float32,
            which whoever writes it rounds; None where it is the base's.
        """
        ...

    def exact(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """A task's tensors of role *exact* that differ from the base's, in their own dtype."""
        ...

    def private_tensors(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """A task's private tensors, in their own dtype."""
        ...

    def added(self, task: str) -> Mapping[str, int]:
        """Name of a tensor that a task added rows of a vocabulary to → how many."""
        ...

    def added_rows(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """Those rows, by tensor, in their own dtype."""
        ...


def written(source: TaskSource) -> list[str]:
    """Names of the tensors that `write_weights` writes, in the base's order."""
    own = set(source.space.layout.tensors) if source.space else set()
    adapted = source.space.layout.by_target if source.space else {}
    return [
        name
        for name, role in source.roles.items()
        if name not in own and (role != "frozen" or name in adapted)
    ]


def write_weights(
    source: TaskSource,
    task: str,
    base: Mapping[str, Tensor],
    out: Mapping[str, Tensor],
    apart: Mapping[str, str] | None = None,
) -> None:
    """Write a task's weights into `out`, all but private and frozen ones; adapters folded in.

    Of a tensor of `out` that has more rows than the base's, the first ones; `write_added` does the
    others.

    Sums are formed in float32 and rounded once, to `out`'s dtype. Always from the base, never
    from what `out` holds: the result does not depend on what was there. A tensor of `out` is
    written before another is asked for.

    Args:
        source: gives the tensors.
        task: one of its tasks.
        base: the base's tensors by name.
        out: tensors to write into, by name; on any device. Those that it lacks are left out.
        apart: name → name, of `tied` ones that `out` holds apart: both are written.

    Raises:
        BundleError: `out` lacks a tensor that an adapter changes, or an exact one that differs
            from the base's, or would hold an infinity where the task has a finite value; or the
            source has no such task, or is damaged.
    """
    rounding = Rounding()
    base, out = split_tensors(base, source.stacks), split_tensors(out, source.stacks)
    exact = set()
    for name, value in source.exact(task):
        rounding.write(name, common(_place(out, source, task, name), value.shape), value)
        exact.add(name)
    adapted = source.space.layout.by_target if source.space else {}
    copies: dict[str, list[str]] = {}
    for alias, name in (apart or {}).items():
        copies.setdefault(name, []).append(alias)
    for name in written(source):
        if name in exact or name in adapted:
            continue
        for place in (name, *copies.get(name, ())):
            if place not in out:
                continue
            target = out[place]
            start = base[name].to(target.device)
            target = common(target, start.shape)
            room = target if target.dtype == torch.float32 else None
            value = own_tensor(source, task, name, start, room)
            if value is not target:
                rounding.write(name, target, value)
    initial = source.initial
    for module in source.space.layout.modules if source.space else ():
        _fold(source, task, module, initial, base, out, rounding)
    rounding.check(f"{source.label}: task '{task}'")


def write_added(
    source: TaskSource,
    task: str,
    out: Mapping[str, Tensor],
    apart: Mapping[str, str] | None = None,
) -> None:
    """Write the rows that a task added to the vocabulary into `out`; arguments as above.

    Args:
        source: gives the rows.
        task: one of its tasks.
        out: tensors of the task's own size by name. Those that it lacks are left out.
        apart: name → name, of `tied` ones that `out` holds apart: both are written.
    """
    rounding = Rounding()
    for name, rows in source.added_rows(task):
        for place in (name, *(alias for alias, to in (apart or {}).items() if to == name)):
            if place in out:
                rounding.write(place, beyond(out[place], source.added(task)[name]), rows)
    rounding.check(f"{source.label}: task '{task}'")


def with_added(source: TaskSource, task: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A task's tensors of the base's size, with the rows that it added; differentiable."""
    whole = dict(tensors)
    for name, rows in source.added_rows(task) if source.added(task) else ():
        if name in whole:
            whole[name] = extended(whole[name], rows)
    return whole


def own_tensor(
    source: TaskSource, task: str, name: str, base: Tensor, out: Tensor | None = None
) -> Tensor:
    """A task's tensor, or the base's where it is that; arguments as for `TaskSource.tensor`."""
    own = source.tensor(task, name, base, out) if source.roles[name] == "delta" else None
    return base if own is None else own


def folded_tensor(
    source: TaskSource, task: str, name: str, base: Tensor, initial: Mapping[str, Tensor]
) -> Tensor:
    """A task's weight, an adapter of its own folded in; the base's where it is that.

    Args:
        source: gives the tensors.
        task: one of its tasks.
        name: the tensor's name.
        base: the base's tensor.
        initial: `source.initial`.

    Returns:
        `(*shape)` on the base's device, not rounded; see `TaskSource.tensor`.
    """
    weight = own_tensor(source, task, name, base)
    module = source.space.layout.by_target.get(name) if source.space else None
    if module is None:
        return weight
    start, own = _adapter(source, task, module, initial, base.device)
    return torch.add(weight.to(torch.float32), module.delta(name, weight, own, start))


def _fold(
    source: TaskSource,
    task: str,
    module: Module,
    initial: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    out: Mapping[str, Tensor],
    rounding: Rounding,
) -> None:
    """Write the weights of one module with an adapter folded in; exact, also if linearized."""
    start: dict[str, Tensor] = {}
    own: dict[str, Tensor] = {}
    for name in module.targets:
        target = _place(out, source, task, name)
        if not own:
            start, own = _adapter(source, task, module, initial, target.device)
        weight = own_tensor(source, task, name, base[name].to(target.device))
        delta = module.delta(name, weight, own, start)
        rounding.write(name, target, torch.add(weight.to(torch.float32), delta))


def _adapter(
    source: TaskSource,
    task: str,
    module: Module,
    initial: Mapping[str, Tensor],
    device: torch.device,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A module's adapter: as it started, and as it is."""
    start = {name: initial[name].to(device) for name in module.tensors}
    return start, {name: own_tensor(source, task, name, value) for name, value in start.items()}


def _place(out: Mapping[str, Tensor], source: TaskSource, task: str, name: str) -> Tensor:
    """Where to write what may not be left out.

    Raises:
        BundleError: there is no such place.
    """
    if name not in out:
        raise BundleError(
            f"{source.label}: task '{task}' changes '{name}', which has no place in the model; "
            "build the model with a tensor of that name (a buffer must be persistent), or put it "
            "into `ignore` if no one needs it"
        )
    return out[name]
