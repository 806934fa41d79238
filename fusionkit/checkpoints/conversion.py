"""How transformers' classes read files: which names become which, and what is joined or cut.

transformers 5 gives many models other names than their files have, and joins tensors (a file's
experts, one by one, into one stack) as it loads them. Here its own mapping and its own operations
are applied: to names at once, to values tensor by tensor, as they are asked for. Where it has no
such mapping (before version 5, or another library), files are read as they are.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fusionkit.errors import CheckpointError

Read = Callable[[str], Tensor]
"""Reads a tensor by its name."""

Make = Callable[[Read], dict[str, Tensor]]
"""Reads tensors of a class, and makes a file's of them, by name."""

Specs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Name → shape and dtype."""


@dataclass(frozen=True)
class Conversion:
    """Tensors that transformers' operations make of others.

    Attributes:
        first: the name that the operations start from.
        sources: pattern → names of the tensors that it stands for, in order.
        specs: shapes and dtypes of these.
        converter: transformers' own; every reading works on a copy.
        model: the class's module, which some operations ask.
    """

    first: str
    sources: Mapping[str, Sequence[str]]
    specs: Specs
    converter: Any
    model: nn.Module

    def run(self, read: Read, only: int | None = None) -> dict[str, Tensor]:
        """Make the tensors, by name.

        Args:
            read: reads the sources.
            only: take of every pattern the one source at this place.
        """
        converter = deepcopy(self.converter)
        for pattern, names in self.sources.items():
            for name in names if only is None else [names[only]]:
                converter.add_tensor(self.first, name, pattern, _later(read, name))
        with torch.no_grad():
            made = converter.convert(self.first, model=self.model, config=self.model.config)
        return {name: v[0] if isinstance(v, list) else v for name, v in made.items()}

    def blank(self, name: str) -> Tensor:
        """A source without its values."""
        shape, dtype = self.specs[name]
        return torch.empty(shape, dtype=dtype, device="meta")

    def by_rows(self, name: str, shape: Sequence[int]) -> bool:
        """Whether each entry along a tensor's first axis is made of the sources at its place."""
        if any(len(names) != shape[0] for names in self.sources.values()):
            return False
        with suppress(Exception):  # of operations that mix what is at different places
            return self.run(self.blank, 0)[name].shape == (1, *shape[1:])
        return False


@dataclass(frozen=True)
class Reading:
    """How a class reads a file.

    Attributes:
        names: name in the class → name in the file, of what is taken as it is.
        made: name in the class → what it is made by.
        specs: shapes and dtypes of what is made.
        unread: names in the file of what the class has no place for.
    """

    names: Mapping[str, str]
    made: Mapping[str, Conversion]
    specs: Specs
    unread: frozenset[str]


def reading_of(model: nn.Module, specs: Specs, label: str) -> Reading:
    """How transformers would read a file into a model of its, if it had these tensors.

    Args:
        model: one of transformers' models; on any device.
        specs: shape and dtype by name in the file.
        label: how messages call the file.

    Raises:
        CheckpointError: the file has tensors that the class can't be made of.
    """
    names: dict[str, str] = {}
    unread: set[str] = set()
    sources: dict[str, dict[str, list[str]]] = {}
    own = model.state_dict()
    renamings, converters = _mapping(model)
    patterns = {pattern: each for each in converters for pattern in each.source_patterns}
    for name in sorted(specs, key=_natural):
        renamed, pattern = _renamed(name, renamings, converters, model, own)
        if renamed not in own and pattern is None:
            unread.add(name)
        elif pattern is None:
            names.setdefault(renamed, name)
        elif renamed in own:
            sources.setdefault(renamed, {}).setdefault(pattern, []).append(name)
        else:
            unread.add(name)
    made: dict[str, Conversion] = {}
    made_specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for first, by_pattern in sources.items():
        if first in names:
            raise CheckpointError(
                f"{label}: '{names[first]}' and '{next(iter(by_pattern.values()))[0]}' are both "
                f"'{first}' of {type(model).__name__}; keep one of them in the file"
            )
        converter = patterns[next(iter(by_pattern))]
        conversion = Conversion(first, by_pattern, specs, converter, model)
        try:
            blanks = conversion.run(conversion.blank)
        except Exception as error:  # transformers' operations raise what they like
            lacking = [each for each in converter.source_patterns if each not in by_pattern]
            also = f", and lacks '{lacking[0]}'" if lacking else ""
            raise CheckpointError(
                f"{label}: '{next(iter(by_pattern.values()))[0]}' can't be read into '{first}' of "
                f"{type(model).__name__}: the file is not whole{also}; save or fetch it again"
            ) from error
        for name, blank in blanks.items():
            made[name] = conversion
            made_specs[name] = tuple(blank.shape), blank.dtype
    return Reading(names, made, made_specs, frozenset(unread))


def saved(model: nn.Module, names: Iterable[str], specs: Specs) -> Iterator[tuple[list[str], Make]]:
    """How transformers would save a model: groups of its tensors, and what each becomes in a file.

    Args:
        model: one of transformers' models; on any device.
        names: the tensors to be saved, by name in the class; tied ones once.
        specs: their shapes and dtypes.

    Yields:
        names of the tensors that a group needs, and what reads them and makes the file's tensors.
    """
    renamings, converters = _reverse_mapping(model)
    patterns = {pattern: each for each in converters for pattern in each.source_patterns}
    groups: dict[str, dict[str, list[str]]] = {}

    def alone(name: str) -> Make:
        return lambda read: {_apply(name, renamings): read(name)}

    def together(conversion: Conversion) -> Make:
        return lambda read: {_apply(n, renamings): t for n, t in conversion.run(read).items()}

    for name in sorted(names, key=_natural):
        first, pattern = _apply_one(name, converters)
        if pattern is None:
            yield [name], alone(name)
        else:
            groups.setdefault(first, {}).setdefault(pattern, []).append(name)
    for first, by_pattern in groups.items():
        converter = patterns[next(iter(by_pattern))]
        group = [name for each in by_pattern.values() for name in each]
        yield group, together(Conversion(first, by_pattern, specs, converter, model))


def renamer(model: nn.Module) -> Callable[[str], str]:
    """What transformers calls a tensor of a file, where that is a matter of names alone.

    Args:
        model: one of transformers' models; on any device.
    """
    (renamings, converters), own = _mapping(model), model.state_dict()
    return lambda name: _renamed(name, renamings, converters, model, own)[0]


def _mapping(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """Renamings and converters of a class; none before transformers 5."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
    except ImportError:
        return [], []
    found = get_model_conversion_mapping(cast(Any, model))
    renamings = [each for each in found if isinstance(each, WeightRenaming)]
    return renamings, [each for each in found if isinstance(each, WeightConverter)]


def _reverse_mapping(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """The same the other way: the last comes first, and old names are not brought back."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming
    except ImportError:
        return [], []
    found = get_model_conversion_mapping(cast(Any, model), add_legacy=False)
    # Whether there was a prefix, nobody knows any more: none is put there.
    kept = [each for each in found[::-1] if not isinstance(each, PrefixChange)]
    turned = [each.reverse_transform() for each in kept]
    renamings = [each for each in turned if isinstance(each, WeightRenaming)]
    return renamings, [each for each in turned if isinstance(each, WeightConverter)]


def _renamed(
    name: str,
    renamings: Sequence[Any],
    converters: Sequence[Any],
    model: nn.Module,
    own: Mapping[str, Tensor],
) -> tuple[str, str | None]:
    """A file's name in the class, and the pattern of the conversion that it is a source of."""
    found, pattern = _apply_one(_apply(name, renamings), converters)
    found = _with_prefix(found, str(getattr(model, "base_model_prefix", "")), own)
    if found not in own and name in own:
        return name, None
    return found, pattern


def _with_prefix(name: str, prefix: str, own: Mapping[str, Tensor]) -> str:
    """A name with the class's base prefix put in front, or taken off, where it has it so."""
    if not prefix:
        return name
    bare = re.sub(f"^{prefix}.", "", name, count=1)
    if name.startswith(prefix) and bare in own:
        return bare
    return f"{prefix}.{name}" if f"{prefix}.{name}" in own else name


def _apply(name: str, renamings: Sequence[Any]) -> str:
    """All renamings, one after another."""
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def _apply_one(name: str, converters: Sequence[Any]) -> tuple[str, str | None]:
    """The first converter that the name is a source of, and by which pattern."""
    for converter in converters:
        found, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return found, pattern
    return name, None


def _later(read: Read, name: str) -> Callable[[], Tensor]:
    return lambda: read(name)


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Numbers among the parts of a name in their own order, as experts are."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
