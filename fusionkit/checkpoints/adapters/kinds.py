"""What an adapter does to one module: LoRA, DoRA, LoRA on experts, changed starts, and (IA)³.

Each kind knows the adapter's tensors, the base's tensors that they change, and the change itself,
equal to what PEFT merges, to rounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fusionkit.checkpoints.adapters.lowrank import LowRank, first_order
from fusionkit.errors import CheckpointError

Form = Literal["linear", "transposed", "embedding", "conv", "in_proj"]
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class LoraModule:
    """A LoRA on one module: W + s B A, or its linearization (see `lowrank.first_order`).

    Attributes:
        name: the module's name in the base.
        form: how W lies: `linear` (out, in); `transposed` (in, out), as GPT-2's Conv1D;
            `embedding` (tokens, width); `conv` (out, in, …); `in_proj` (3 width, width), which
            `nn.MultiheadAttention` has for queries, keys and values together.
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
        weight = f"{self.name}.{'in_proj_weight' if self.form == 'in_proj' else 'weight'}"
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


@dataclass(frozen=True)
class DoraModule:
    """A DoRA on one module: m (W + s B A) / ‖W + s B A‖, a norm per output (2402.09353).

    An embedding's norms run over its tokens, as PEFT has them.

    Attributes:
        lora: the product within.
    """

    lora: LoraModule

    @property
    def name(self) -> str:
        """The module's name in the base."""
        return self.lora.name

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the adapter's tensors: A, B and m."""
        return (*self.lora.tensors, f"{self.name}.lora_magnitude_vector")

    @property
    def targets(self) -> tuple[str, ...]:
        """The name of the weight."""
        return self.lora.targets

    def delta(self, target: str, base: Tensor, tensors: Tensors, initial: Tensors) -> Tensor:
        """The weight's change, float32 `(*base.shape)`."""
        base = base.to(torch.float32)
        moved = base + self.lora.delta(target, base, tensors, initial)
        axis = 1 if self.lora.form in {"transposed", "embedding"} else 0
        others = [other for other in range(base.ndim) if other != axis]
        norms = torch.linalg.vector_norm(moved, dim=others, keepdim=True)
        magnitudes = tensors[self.tensors[-1]].to(moved).view_as(norms)
        change: Tensor = moved * (magnitudes / norms) - base
        return change


@dataclass(frozen=True)
class ReplacingModule:
    """A LoRA whose start took something out of the base's weight: W − s B₀ A₀ + s B A.

    B₀ A₀ is made again from W, as PEFT makes it when it loads such an adapter.

    Attributes:
        lora: the product that was put in its place.
        start: `pissa`, the first singular directions of W (2404.02948); or `olora`, the first
            rows and columns of its QR decomposition (2406.01775).
    """

    lora: LoraModule
    start: Literal["pissa", "olora"]

    @property
    def name(self) -> str:
        """The module's name in the base."""
        return self.lora.name

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the adapter's tensors."""
        return self.lora.tensors

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the base's tensors that the adapter changes."""
        return self.lora.targets

    def delta(self, target: str, base: Tensor, tensors: Tensors, initial: Tensors) -> Tensor:
        """The change of one of the targets, float32 `(*base.shape)`; decomposes the weight.

        Raises:
            CheckpointError: the singular directions are not told apart by their values.
        """
        change = self.lora.delta(target, base, tensors, initial)
        if target != self.targets[0]:
            return change
        weight = base.to(torch.float32)
        left = (weight - self._taken(weight, tensors)).to(base.dtype).to(torch.float32)
        return left - weight + change

    def _taken(self, weight: Tensor, tensors: Tensors) -> Tensor:
        rank = tensors[self.tensors[0]].shape[0]
        if self.start == "olora":
            q, r = torch.linalg.qr(weight)
            taken: Tensor = self.lora.scale * (q[:, :rank] @ r[:rank])
            return taken
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        close = 1e-6 * s[0]
        if rank < len(s) and s[rank - 1] > close and s[rank - 1] - s[rank] <= close:
            raise CheckpointError(
                f"'{self.targets[0]}' has singular values {rank} and {rank + 1} that are equal, "
                "so that what its PiSSA adapter took out of it can't be made again; merge the "
                "adapter into its base where it was trained, and give the merged model"
            )
        product: Tensor = (u[:, :rank] * s[:rank]) @ v[:rank]
        return product


@dataclass(frozen=True)
class ParameterModule:
    """A LoRA on one parameter (`target_parameters`), of 2 axes or a stack of experts of 3.

    Expert e has factors of its own: A's rows e r … (e + 1) r, and B's columns e, e + E, ….

    Attributes:
        name: of the factors, without `.lora_A.weight`.
        parameter: the name of the base's tensor.
        scale: s.
        transposed: the experts' weights lie as (E, in, out), not (E, out, in).
    """

    name: str
    parameter: str
    scale: float
    transposed: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of A, `(E r, in)`, and B, `(out, E r)`."""
        return f"{self.name}.lora_A.weight", f"{self.name}.lora_B.weight"

    @property
    def targets(self) -> tuple[str, ...]:
        """The name of the base's tensor."""
        return (self.parameter,)

    def low_rank(self, tensors: Tensors, experts: int, index: int) -> LowRank:
        """The change of one expert's matrix as a product, float32.

        Args:
            tensors: the adapter's, by name.
            experts: how many there are; 1 of a parameter of 2 axes.
            index: which.
        """
        a, b = (tensors[name].to(torch.float32) for name in self.tensors)
        rank = len(a) // experts
        left, right = self.scale * b[:, index::experts], a[index * rank :][:rank].mT
        return LowRank(right, left) if self.transposed else LowRank(left, right)

    def delta(self, target: str, base: Tensor, tensors: Tensors, initial: Tensors) -> Tensor:
        """The parameter's change, float32 `(*base.shape)`."""
        if base.ndim == 2:
            return self.low_rank(tensors, 1, 0).dense(base.shape)
        shape, experts = base.shape[1:], len(base)
        return torch.stack(
            [self.low_rank(tensors, experts, i).dense(shape) for i in range(experts)]
        )


Module = LoraModule | DoraModule | ReplacingModule | ParameterModule | Ia3Module
"""What can be folded into a base's weights."""
