"""What goes into a PEFT adapter: factors, modules that are saved whole, and the config of both."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fusionkit.checkpoints.adapters.kinds import Form, LoraModule
from fusionkit.checkpoints.adapters.lowrank import LowRank

Shape = tuple[int, ...]
_SERVED = re.compile(
    r"(?!.*(vision|visual|image|audio|speech)).*\."
    r"(q_proj|k_proj|v_proj|o_proj|qkv_proj|gate_proj|up_proj|down_proj|gate_up_proj)"
)
"""Modules that vLLM adapts: linear layers of a language model's attention and MLP."""


@dataclass(frozen=True)
class Factors:
    """A matrix's delta as a LoRA.

    Attributes:
        form: how the weight lies.
        a: A, as PEFT has it.
        b: B.
    """

    form: Form
    a: Tensor
    b: Tensor

    @classmethod
    def of(cls, form: Form, product: LowRank, shape: Shape) -> "Factors":
        """Factors of a product, their scales evened out (for fp16)."""
        left, right = balanced(product)
        if form in {"transposed", "embedding"}:
            left, right = right, left
        a, b = right.mT, left
        if form == "conv":
            a, b = a.reshape(-1, *shape[1:]), b.reshape(*b.shape, *[1] * (len(shape) - 2))
        return cls(form, a, b)

    @property
    def rank(self) -> int:
        """Number of directions."""
        return self.a.shape[0]


@dataclass
class Adapter:
    """Names as the base has them.

    Attributes:
        shapes: all tensors of the model → shape.
        tied: name → name of the tensor that it shares.
        factors: weight → its LoRA.
        stacks: stack of experts → the products of its matrices; None: of one that stays.
        own: tensors of another kind of adapter, (IA)³, by name.
        whole: tensors that are saved as they are.
        left_out: tensors that differ from the base's, and are not in the adapter.
        cut: weights whose delta was cut to a rank.
    """

    shapes: Mapping[str, Shape]
    tied: Mapping[str, str]
    factors: dict[str, Factors] = field(default_factory=dict)
    stacks: dict[str, list[LowRank | None]] = field(default_factory=dict)
    own: dict[str, Tensor] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)
    left_out: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)

    @property
    def ranks(self) -> dict[str, int]:
        """Adapted module, or stack → rank."""
        stacks = {name: stack_rank(products) for name, products in self.stacks.items()}
        return {**{module_of(n): each.rank for n, each in self.factors.items()}, **stacks}

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing in it that adapts."""
        return not (self.factors or self.stacks or self.own)

    def is_served(self, name: str) -> bool:
        """Whether vLLM takes the factors of a weight."""
        found = self.factors.get(name)
        linear = found is not None and found.form == "linear"
        return linear and _SERVED.fullmatch(f".{module_of(name)}") is not None

    def leave_out(self, names: Iterable[str]) -> None:
        """Take tensors out, with all that are tied to them."""
        out = set(names)
        groups = {self.tied.get(name, name) for name in out}
        for name in {*self.factors, *self.stacks, *self.whole}:
            if name in out or (self.tied.get(name, name) in groups and self._is_tied(name)):
                self._drop(name)
                self.left_out.add(name)

    def save_whole(self, names: Iterable[str]) -> None:
        """Save tensors as they are, instead of their factors."""
        for name in names:
            self._drop(name)
            self.whole.add(name)

    def tie(self, model: nn.Module | None) -> None:
        """Save a moved tensor's other names whole, so that all of its modules have it.

        Of tied weights at most one may be adapted by factors: PEFT's `merge_and_unload` adds each
        module's product to the one tensor that they share.

        Args:
            model: the base's module, which says what names are of one module alone.
        """
        for alias, name in self.tied.items():
            moved = name in self.factors or name in self.whole
            if moved and not _same_module(model, alias, name):
                self.save_whole([alias])

    def complete(self) -> list[str]:
        """Save all of each module of which a tensor is saved, as PEFT saves modules.

        Returns:
            tensors that are saved, but are in no module that can be.
        """
        homeless: set[str] = set()
        while True:
            saved = self._saved(homeless)
            more = {name for name in self.shapes if any(_is_within(name, m) for m in saved)}
            more |= {  # PEFT goes by how names end, or what is among them
                name
                for name in self.shapes
                if any(module_of(name).endswith(module) for module in saved)
                or (name in self.factors and any(_excludes(m, module_of(name)) for m in saved))
            }
            if more <= self.whole - homeless and not (more & self.factors.keys()):
                return sorted(homeless)
            self.save_whole(more)

    @property
    def modules_to_save(self) -> list[str]:
        """The outermost modules that are saved whole."""
        saved = self._saved(set())
        return sorted(m for m in saved if not any(m.startswith(f"{o}.") for o in saved))

    @property
    def biases(self) -> list[str]:
        """Tensors of adapted modules that are saved beside their factors."""
        adapted = {module_of(name) for name in self.factors}
        return sorted(name for name in self.whole if module_of(name) in adapted)

    def key_of(self, name: str) -> str:
        """What PEFT calls a tensor that is saved whole, in its file."""
        module, _, leaf = name.rpartition(".")
        adapted = any(module_of(other) == module for other in self.factors)
        return f"{module}.base_layer.{leaf}" if adapted else name

    def config(self) -> dict[str, Any]:
        """A LoraConfig: alpha = rank everywhere, so that the scaling is 1."""
        names = sorted(module_of(name) for name in self.factors)
        ranks = self.ranks
        rank = max(ranks.values(), default=1)
        others = {_pattern(n, list(ranks)): r for n, r in ranks.items() if r != rank}
        modules = {module_of(name) for name in self.shapes}
        ambiguous = any(m.endswith(f".{name}") for name in names for m in modules - set(names))
        return {
            "peft_type": "LORA",
            "target_modules": "|".join(map(re.escape, names)) if ambiguous else names,
            "target_parameters": sorted(self.stacks) or None,
            "modules_to_save": self.modules_to_save or None,
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": others,
            "alpha_pattern": others,
            "bias": "all" if self.biases else "none",
            "fan_in_fan_out": any(each.form == "transposed" for each in self.factors.values()),
        }

    def _saved(self, homeless: set[str]) -> set[str]:
        """Modules of the tensors that are saved; those without one are added to `homeless`."""
        adapted = {module_of(name) for name in self.factors}
        found = set()
        total = sum(map(_entries, self.shapes.values()))
        for name in self.whole:
            module = module_of(name)
            if module in adapted:
                continue
            within = [other for other in self.shapes if _is_within(other, module)]
            crowded = any(module_of(other) != module for other in within)
            size = sum(_entries(self.shapes[other]) for other in within)
            if not module or (crowded and 2 * size > total):
                homeless.add(name)
            else:
                found.add(module)
        return found

    def _is_tied(self, name: str) -> bool:
        return name in self.tied or name in self.tied.values()

    def _drop(self, name: str) -> None:
        self.factors.pop(name, None)
        self.stacks.pop(name, None)
        self.whole.discard(name)


def balanced(factors: LowRank) -> LowRank:
    """The same product, each direction's scale split evenly over both factors (for fp16)."""
    left, right = (part.norm(dim=0) for part in factors)
    root = torch.where((left > 0) & (right > 0), (right / left).sqrt(), 1.0)
    return LowRank(factors.left * root, factors.right / root)


def full_rank(delta: Tensor) -> LowRank:
    """A matrix as a product with the identity: exact."""
    rows, columns = delta.shape
    if columns <= rows:
        return LowRank(delta, torch.eye(columns))
    return LowRank(torch.eye(rows), delta.mT)


def stack_rank(products: Iterable[LowRank | None]) -> int:
    """The largest rank among a stack's matrices."""
    return max((each.left.shape[1] for each in products if each is not None), default=0)


def stacked(products: list[LowRank | None], shape: Shape, swapped: bool) -> tuple[Tensor, Tensor]:
    """A stack's factors as PEFT's `ParamWrapper` has them.

    δ[e] = B[:, :, e] A[e] with A `(E, r, in)`, flattened to (E·r, in), and B `(out, r, E)`,
    flattened to (out, r·E).

    Args:
        products: of each matrix (rows, columns).
        shape: of the stack, (E, rows, columns).
        swapped: PEFT takes the matrices for (out, in); else for (in, out).
    """
    count, rows, columns = shape
    rank = stack_rank(products)
    left, right = torch.zeros(count, rows, rank), torch.zeros(count, columns, rank)
    for index, product in enumerate(products):
        if product is not None:
            even = balanced(product)
            left[index, :, : even.left.shape[1]] = even.left
            right[index, :, : even.right.shape[1]] = even.right
    if not swapped:
        left, right = right, left
    return right.mT.reshape(count * rank, -1), left.permute(1, 2, 0).reshape(left.shape[1], -1)


def lora_keys(key: str, form: Form) -> tuple[str, ...]:
    """What PEFT calls the factors of a layer, A first."""
    return LoraModule(key, form, 1.0).tensors


def module_of(name: str) -> str:
    """The module that a tensor is of."""
    return name.rpartition(".")[0]


def _is_within(name: str, module: str) -> bool:
    return name.startswith(f"{module}.") if module else True


def _excludes(saved: str, module: str) -> bool:
    return re.match(rf"(^|.*\.){saved}($|\..*)", module) is not None


def _same_module(model: nn.Module | None, name: str, other: str) -> bool:
    if model is None:
        return False
    one, two = (model.get_submodule(module_of(each)) for each in (name, other))
    return one is two


def _pattern(name: str, names: list[str]) -> str:
    """A name as PEFT's patterns match it; from the start where others end like it."""
    escaped = re.escape(name).replace(r"\_", "_")
    return f"^{escaped}" if any(n.endswith("." + name) for n in names) else escaped


def _entries(shape: Shape) -> int:
    return torch.Size(shape).numel()
