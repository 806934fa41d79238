"""What a PEFT adapter does to its base: LoRA products, (IA)³ scalings, …, module by module.

An `AdapterLayout` is all that must be known beside the tensors themselves: which modules are
adapted, how, and with which scaling. It folds an adapter's tensors into the base's weights, and
is kept in a bundle's manifest where adapters themselves are what is compressed.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import msgspec

from fusionkit.checkpoints.adapters.kinds import (
    DoraModule,
    Ia3Module,
    LoraModule,
    Module,
    ParameterModule,
    ReplacingModule,
)

_NAMED: dict[str, type[Module]] = {
    "dora": DoraModule,
    "parameter": ParameterModule,
    "replacing": ReplacingModule,
}
"""Kinds of modules that are named in JSON, beside the one that all of a layout's else are of."""


@dataclass(frozen=True)
class AdapterLayout:
    """The adapted modules, in the model's order.

    Attributes:
        kind: `lora` or `ia3`.
        modules: what is done to each.
    """

    kind: Literal["lora", "ia3"]
    modules: tuple[Module, ...]

    @property
    def tensors(self) -> list[str]:
        """Names of the adapter's own tensors."""
        return [name for module in self.modules for name in module.tensors]

    @property
    def by_target(self) -> dict[str, Module]:
        """Name of a tensor of the base → the module that changes it."""
        return {target: module for module in self.modules for target in module.targets}

    @property
    def linearized(self) -> bool:
        """Whether any of the modules is linearized."""
        return any(isinstance(module, LoraModule) and module.linearized for module in self.modules)

    def to_json(self) -> dict[str, Any]:
        """The layout as JSON; `from_json` reads it back."""
        return {"kind": self.kind, "modules": [_to_json(module) for module in self.modules]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "AdapterLayout":
        """Read what `to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError: it is not such a layout.
        """
        kinds: dict[str, type[Module]] = {"lora": LoraModule, "ia3": Ia3Module}
        usual = kinds[content["kind"]]
        return cls(content["kind"], tuple(_from_json(each, usual) for each in content["modules"]))


def _to_json(module: Module) -> dict[str, Any]:
    named = next((name for name, kind in _NAMED.items() if type(module) is kind), None)
    return {**({"type": named} if named else {}), **asdict(module)}


def _from_json(content: Mapping[str, Any], usual: type[Module]) -> Module:
    own = dict(content)
    make = _NAMED[own.pop("type")] if "type" in own else usual
    if unknown := own.keys() - {field.name for field in fields(make)}:
        raise ValueError(f"a module has no {', '.join(sorted(unknown))}")
    return msgspec.convert(own, make)
