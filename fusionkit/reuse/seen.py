"""A live model as a source of tasks sees it: under its names, with its ties."""

from collections.abc import Iterable, Mapping, Set
from typing import TypeVar

from torch import Tensor, nn

from fusionkit.checkpoints.checkpoint import Checkpoint
from fusionkit.checkpoints.in_memory import state_of
from fusionkit.checkpoints.live_model import aliases, untie
from fusionkit.checkpoints.names import matched, prefix_over, replaced, unwrapped
from fusionkit.checkpoints.stacks import joined, rows_of, split_tensors, whole_names
from fusionkit.checkpoints.view import View
from fusionkit.errors import BundleError, listing
from fusionkit.task_vectors.task_source import TaskSource
from fusionkit.tasks.split_model import SplitModel

Said = TypeVar("Said")


class Seen:
    """A model's tensors under the names that a source of tasks has for them.

    Args:
        model: the model.
        source: the source.
        private: names of the tasks' own tensors, as the source has them.

    Attributes:
        apart: name → name, of tensors that are one to the source, and two in the model.
    """

    def __init__(self, model: nn.Module, source: TaskSource, private: frozenset[str]) -> None:
        self._model, self._stacks = model, source.stacks
        rows = rows_of(source.stacks)
        own = {rows[name][0] if name in rows else name for name in source.roles} | private
        state = state_of(model)
        after = replaced(state, source.rename, type(model).__name__)
        self._names = {name: after[there] for name, there in _found(after, own).items()}
        tied = {(a, b) for a, b in aliases(model).items()}
        here = {there: name for name, there in self._names.items()}
        pairs = {(here[a], here[b]) for a, b in _unwrapped_pairs(model, tied)}
        self._refuse_homeless(source)
        broken = sorted(alias for alias, name in pairs if alias in own and name in own)
        untie(model, [self._names[alias] for alias in broken])
        self.apart = {
            alias: name
            for alias, name in source.tied.items()
            if (alias, name) not in pairs and (name, alias) not in pairs
        }

    @property
    def state(self) -> dict[str, Tensor]:
        """The model's own tensors, stacks whole; to be written into."""
        return self.named(state_of(self._model))

    def named(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the model's state (`state_of`), by the source's names."""
        return {name: state[there] for name, there in self._names.items()}

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The same, stacks split into their matrices."""
        return split_tensors(self.state, self._stacks)

    def base(self, base: Checkpoint) -> Checkpoint:
        """The base's weights, which are kept under the model's names."""
        if all(name == there for name, there in self._names.items()):
            return base
        return View(base, {n: there for n, there in self._names.items() if there in base})

    def live(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by the source's names → by the model's own, stacks whole; differentiable."""
        actual = unwrapped(self._model.state_dict())
        whole = joined(tensors, self._stacks)
        copies = {alias: whole[name] for alias, name in self.apart.items() if name in whole}
        return {
            actual[self._names[name]]: tensor
            for name, tensor in {**whole, **copies}.items()
            if name in self._names
        }

    def places(self, of: Mapping[str, Said]) -> dict[str, Said]:
        """Something by a tensor's name → by the model's own, for all that it has of the tensor."""
        copies = {alias: of[name] for alias, name in self.apart.items() if name in of}
        return {self._names[n]: each for n, each in {**of, **copies}.items() if n in self._names}

    def in_layers(self, names: Iterable[str]) -> set[str]:
        """Those of the source's names that a language model does not need after its layers.

        All of them, of any other model; see `SplitModel`.
        """
        split = SplitModel.of(self._model)
        after = split.outside if split else set()
        needed = {name for name, there in self._names.items() if there in after}
        needed |= {name for alias, name in self.apart.items() if alias in needed}
        return set(names) - needed

    def live_name(self, name: str) -> str:
        """What the model calls a tensor; as the source does, if it has no such tensor."""
        return self._names.get(name, name)

    def _refuse_homeless(self, source: TaskSource) -> None:
        """Refuse a model that has no place for what tasks change: it is another one."""
        names = whole_names((n for n, r in source.roles.items() if r == "delta"), source.stacks)
        adapters = set(source.space.layout.tensors) if source.space else set()
        lacking = [f"'{n}'" for n in names if n not in self._names and n not in adapters]
        if lacking:
            raise BundleError(
                f"{source.label}: tasks change tensors that have no place in "
                f"{type(self._model).__name__}, whose names begin like '{min(self._names)}':"
                f"{listing(lacking)}\nbuild the model that the bundle was made for; if it is the "
                "same one under other names, compress again with `rename`"
            )


def _found(names: Mapping[str, str], own: Set[str]) -> dict[str, str]:
    """A source's names → a model's, which may have the source's model as a part of it."""
    found = matched(names, own)
    if 2 * len(found.keys() & own) > len(own) or not (prefix := prefix_over(sorted(own), names)):
        return found
    return {name.removeprefix(prefix): name for name in names}


def _unwrapped_pairs(model: nn.Module, pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Pairs of a model's own names, as `state_of` has them."""
    bare = {there: name for name, there in unwrapped(model.state_dict()).items()}
    return {(bare.get(a, a), bare.get(b, b)) for a, b in pairs}
