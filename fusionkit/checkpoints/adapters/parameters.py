"""LoRA on parameters (`target_parameters`): which factors belong to which parameter.

PEFT nests the wrappers of several parameters of one module, and the names of their factors say
how deep they lie (`experts.base_layer.lora_A.weight`), not of which parameter they are: shapes do.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import permutations

from fusionkit.checkpoints.adapters.kinds import ParameterModule
from fusionkit.checkpoints.adapters.refusals import MERGE
from fusionkit.checkpoints.checkpoint import Checkpoint
from fusionkit.errors import CheckpointError, FamilyError

_NEST = ".base_layer"
_MOST = 6
"""Parameters of one module: factors are held against them in every order."""

Factors = Callable[[str], tuple[tuple[int, ...], tuple[int, ...]]]
Scaling = Callable[[str, int], tuple[int, float]]


def parameter_modules(
    names: Iterable[str],
    targets: Sequence[str],
    factors: Factors,
    scaling: Scaling,
    base: Checkpoint,
    label: str,
) -> dict[str, ParameterModule]:
    """What an adapter does to parameters.

    Args:
        names: of all that it has factors for, without `.lora_A.weight`.
        targets: its `target_parameters`.
        factors: the shapes of A and B, by such a name.
        scaling: rank and scale, by a parameter's name and a rank.
        base: the base.
        label: how messages call the adapter.

    Returns:
        name → its parameter's change; of those alone that are parameters'.

    Raises:
        FamilyError: factors fit no parameter of the base.
        CheckpointError: they fit several, or a matrix either way round.
    """
    inside: dict[str, list[str]] = {}
    for parameter in base:
        if any(parameter == each or parameter.endswith(f".{each}") for each in targets):
            inside.setdefault(parameter.rpartition(".")[0], []).append(parameter)
    groups: dict[str, list[str]] = {}
    for name in names:
        module = name
        while module.endswith(_NEST):
            module = module.removesuffix(_NEST)
        if module in inside:
            groups.setdefault(module, []).append(name)
    found: dict[str, ParameterModule] = {}
    for module, nested in groups.items():
        if len(inside[module]) > _MOST:
            raise CheckpointError(
                f"{label}: '{module}' has {len(inside[module])} parameters that are among its "
                f"target_parameters, and may have {_MOST}; {MERGE}"
            )
        fits = [
            [_fits(name, parameter, factors(name), scaling, base) for parameter in inside[module]]
            for name in nested
        ]
        ways = [
            way
            for order in permutations(range(len(inside[module])), len(nested))
            if all(way := [fits[at][place] for at, place in enumerate(order)])
        ]
        shapes = "; ".join(f"'{name}': {_shown(factors(name))}" for name in nested)
        if not ways:
            raise FamilyError(
                f"{label}: its factors for '{module}' ({shapes}) fit none of "
                f"{_those(inside[module], base)}; an adapter of another base?"
            )
        if len(ways) > 1 or any(len(each) > 1 for each in ways[0]):
            raise CheckpointError(
                f"{label}: its factors for '{module}' ({shapes}) fit {_those(inside[module], base)}"
                f" in several ways, and the files don't say which; {MERGE}"
            )
        found.update({name: each[0] for name, each in zip(nested, ways[0], strict=True)})
    return found


def _fits(
    name: str,
    parameter: str,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    scaling: Scaling,
    base: Checkpoint,
) -> list[ParameterModule]:
    """How factors can be those of a parameter: not, in one way, or with its axes either way."""
    (a, b), shape = shapes, base.specs[parameter].shape
    experts = shape[0] if len(shape) == 3 else 1
    if len(a) != 2 or len(b) != 2 or len(shape) not in {2, 3} or a[0] != b[1] or a[0] % experts:
        return []
    rank, scale = scaling(parameter, a[0] // experts)
    if rank * experts != a[0]:
        return []
    ways = {False: (b[0], a[1]), True: (a[1], b[0])}
    return [
        ParameterModule(name, parameter, scale, transposed)
        for transposed, lies in ways.items()
        if lies == shape[-2:] and not (transposed and len(shape) == 2)
    ]


def _shown(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> str:
    return f"A {list(shapes[0])}, B {list(shapes[1])}"


def _those(parameters: list[str], base: Checkpoint) -> str:
    return ", ".join(f"'{each}' {list(base.specs[each].shape)}" for each in parameters)
