"""What a PEFT adapter does to its base: LoRA products and (IA)³ scalings, module by module.

An `AdapterLayout` is all that must be known beside the tensors themselves: which modules are
adapted, how, and with which scaling. It folds an adapter's tensors into the base's weights, and
is kept in a bundle's manifest where adapters themselves are what is compressed.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fusionkit.checkpoints.adapters.lowrank import LowRank, first_order

Form = Literal["linear", "transposed", "embedding", "conv"]
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class LoraModule:
    """A LoRA on one module: W + s B A, or its linearization (see `lowrank.first_order`).

    Attributes:
        name: the module's name in the base.
        form: how W lies: `linear` (out, in); `transposed` (in, out), as GPT-2's Conv1D;
            `embedding` (tokens, width); `conv` (out, in, …).
        scale: s, alpha over the rank (or its root).
        bias: the adapter has a bias of its own.
        linearized: the tensors are those of the first-order expansion (L-LoRA, 2310.04742).
    """

    name: str
    form: Form
    scale: float
    bias: bool = False
    linearized: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the adapter's tensors: A, B, and the bias if there is one."""
        if self.form == "embedding":
            return f"{self.name}.lora_embedding_A", f"{self.name}.lora_embedding_B"
        own = (f"{self.name}.lora_A.weight", f"{self.name}.lora_B.weight")
        return (*own, f"{self.name}.lora_B.bias") if self.bias else own

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the base's tensors that the adapter changes."""
        weight = f"{self.name}.weight"
        return (weight, f"{self.name}.bias") if self.bias else (weight,)

    def low_rank(self, tensors: Tensors, initial: Tensors) -> LowRank:
        """The weight's delta as a product, float32.

        Args:
            tensors: the adapter's, by name.
            initial: those that it started from; needed where it is linearized.
        """
        a, b = (tensors[name].to(torch.float32).flatten(1) for name in self.tensors[:2])
        if self.linearized:
            a0, b0 = (initial[name].to(a).flatten(1) for name in self.tensors[:2])
            left, right = first_order(a, b, a0, b0)
        else:
            left, right = b, a.mT
        left = left * self.scale
        return (
            LowRank(right, left)
            if self.form in {"transposed", "embedding"}
            else LowRank(left, right)
        )

    def delta(self, target: str, base: Tensor, tensors: Tensors, initial: Tensors) -> Tensor:
        """The change of one of the targets, float32 `(*base.shape)`."""
        if target == self.targets[0]:
            return self.low_rank(tensors, initial).dense(base.shape)
        return tensors[self.tensors[2]].to(torch.float32) * self.scale


@dataclass(frozen=True)
class Ia3Module:
    """An (IA)³ vector on one module: W and its bias times l along one axis (2205.05638).

    Attributes:
        name: the module's name in the base.
        axis: W's axis that l runs along: of the outputs, or of the inputs (feed-forward).
        bias: the outputs are scaled, and the module has a bias.
    """

    name: str
    axis: int
    bias: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        """The name of the vector."""
        return (f"{self.name}.ia3_l",)

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the base's tensors that the adapter changes."""
        weight = f"{self.name}.weight"
        return (weight, f"{self.name}.bias") if self.bias else (weight,)

    def delta(self, target: str, base: Tensor, tensors: Tensors, initial: Tensors) -> Tensor:
        """The change of one of the targets, float32 `(*base.shape)`: base ⊙ (l − 1)."""
        change = tensors[self.tensors[0]].to(torch.float32).flatten() - 1
        if target == self.targets[0]:
            shape = [1] * base.ndim
            shape[self.axis] = -1
            change = change.view(shape)
        return base.to(torch.float32) * change


Module = LoraModule | Ia3Module


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
        return {"kind": self.kind, "modules": [asdict(module) for module in self.modules]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "AdapterLayout":
        """Read what `to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError: it is not such a layout.
        """
        kinds: dict[str, type[Module]] = {"lora": LoraModule, "ia3": Ia3Module}
        make = kinds[content["kind"]]
        return cls(content["kind"], tuple(make(**module) for module in content["modules"]))
