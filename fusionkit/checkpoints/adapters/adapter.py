"""An adapter, opened: its tensors under the base's names, and what they do to a base.

Read without PEFT itself: names and shapes say what an adapter is, its config how it scales. What
can't be read is refused by name, never read as something else.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fusionkit.checkpoints.adapters.kinds import (
    DoraModule,
    Ia3Module,
    LoraModule,
    Module,
    ReplacingModule,
)
from fusionkit.checkpoints.adapters.layout import AdapterLayout
from fusionkit.checkpoints.adapters.parameters import parameter_modules
from fusionkit.checkpoints.adapters.refusals import MERGE, READ, refuse_config
from fusionkit.checkpoints.adapters.settings import by_pattern, is_feedforward
from fusionkit.checkpoints.checkpoint import Checkpoint
from fusionkit.checkpoints.conversion import renamer
from fusionkit.checkpoints.names import prefix_over
from fusionkit.checkpoints.view import View
from fusionkit.errors import CheckpointError, FamilyError, listing

CONFIG = "adapter_config.json"
LINEARIZED = "LINEARIZED_LORA"

_ADAPTER_TENSOR = re.compile(
    r"(.+)\.(?:lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_[AB]|ia3_l|"
    r"lora_magnitude_vector)"
)
_MAGNITUDES = "lora_magnitude_vector"


class Adapter:
    """An adapter: its config and its tensors, read one at a time.

    Args:
        label: how messages call it.
        config: PEFT's config of it.
        tensors: its tensors, named as the base would name them.
        start: what is on record of where its training started; see `start.start_of`.
        folder: where files that the record names are.
        initial: the tensors as its training started, under the same names, where a file has them.

    Attributes:
        label, config, tensors, start, folder, initial: see above.

    Raises:
        CheckpointError: the adapter is of a kind that is not read.
    """

    def __init__(
        self,
        label: str,
        config: Mapping[str, Any],
        tensors: Checkpoint,
        start: Mapping[str, Any] | None = None,
        folder: Path | None = None,
        initial: Checkpoint | None = None,
    ) -> None:
        self.label, self.config, self.tensors = label, dict(config), tensors
        self.initial = initial
        self.start, self.folder = dict(start or {}), folder
        self._before: dict[str, str] = {}
        refuse_config(self.config, label)
        self._refuse_tensors()

    @property
    def linearized(self) -> bool:
        """Whether the tensors are those of a linearized LoRA."""
        return bool(self.config["peft_type"] == LINEARIZED)

    @property
    def whole(self) -> list[str]:
        """Names of the tensors that replace the base's: heads, biases, …."""
        return [name for name in self.tensors if _adapted(name) is None]

    def named_for(self, base: Checkpoint) -> "Adapter":
        """The same under a base's names, if an earlier transformers had others, or a part of it."""
        known = base.architecture
        adapted = {name: _adapted(name) for name in self.tensors}
        weights = [f"{module}.weight" for module in adapted.values() if module is not None]
        rename = str if known is None or known.skeleton is None else renamer(known.skeleton)
        if not any(name in base or rename(name) in base for name in weights):
            rename = prefix_over(weights, base).__add__
        names = {}
        for name, module in adapted.items():
            old = name if module is None else f"{module}.weight"
            new = rename(old) if old not in base else old
            if new == old or new not in base:
                names[name] = name
            elif module is None:
                names[new] = name
            else:
                new = new.removesuffix(".weight")
                names[new + name.removeprefix(module)] = name
                self._before[new] = module
        self.tensors = View(self.tensors, names)
        self.initial = self.initial and View(self.initial, names)
        return self

    def layout(self, base: Checkpoint) -> AdapterLayout:
        """What the adapter does to a base.

        Raises:
            FamilyError: it is an adapter of another base, by names or shapes.
            CheckpointError: a factor is missing, or has another rank than the config says; or
                it can't be told from the files what it does.
        """
        names = {module: None for name in self.tensors if (module := _adapted(name)) is not None}
        modules = self._of_parameters(names, base)
        foreign = [
            f"'{name}'"
            for name in names
            if name not in modules and _weight_of(name, base) not in base
        ]
        if foreign:
            raise FamilyError(
                f"{self.label}: adapts modules that the base {base.label} lacks:{listing(foreign)}"
                f"\nan adapter of another base? the base's names begin like '{min(base)}'; give "
                "the base's add_prefix or strip_prefix if only that differs"
            )
        make = self._ia3 if self.config["peft_type"] == "IA3" else self._of_lora
        place = {name: number for number, name in enumerate(base)}
        left = [name for name in names if name not in modules]
        for name in sorted(left, key=lambda name: place[_weight_of(name, base)]):
            modules[name] = make(name, base)
        ordered = sorted(modules.values(), key=lambda module: place[module.targets[0]])
        kind: Any = READ[self.config["peft_type"]]
        layout = AdapterLayout(kind, tuple(ordered))
        self._refuse_ambiguous(layout, base)
        return layout

    def _of_parameters(self, names: Iterable[str], base: Checkpoint) -> dict[str, Module]:
        """What it does to parameters, by its factors' names."""
        targets = self.config.get("target_parameters") or []
        found = parameter_modules(names, targets, self.factors, self.scaling, base, self.label)
        start = self._replacing
        if found and (start or self.linearized or self.config.get("use_dora")):
            raise CheckpointError(
                f"{self.label}: init_lora_weights: {start}, a linearization or DoRA on parameters "
                f"('{min(found)}') is not known here; {MERGE}"
            )
        return dict(found)

    @property
    def _replacing(self) -> str:
        """The start that took something out of the base; empty for those that don't."""
        start = str(self.config.get("init_lora_weights", "")).lower()
        return start if start in {"pissa", "olora"} else ""

    def scaling(self, name: str, rank: int) -> tuple[int, float]:
        """A module's rank and scale, as PEFT looks them up.

        Args:
            name: the module's.
            rank: that its factors have.
        """
        config, name = self.config, self._before.get(name, name)
        rank = by_pattern(config.get("rank_pattern"), name, config.get("r", 8), self.label)
        alpha = config.get("lora_alpha", 8)
        alpha = by_pattern(config.get("alpha_pattern"), name, alpha, self.label)
        return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def factors(
        self, name: str, keys: tuple[str, str] = ("lora_A.weight", "lora_B.weight")
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of a module's A and B.

        Raises:
            CheckpointError: one is missing.
        """
        for key, other in zip(keys, reversed(keys), strict=True):
            if f"{name}.{key}" not in self.tensors:
                raise CheckpointError(
                    f"{self.label}: has '{name}.{other}' but no '{name}.{key}'; save the adapter "
                    "again"
                )
        a, b = (self.tensors.specs[f"{name}.{key}"].shape for key in keys)
        return a, b

    def _refuse_ambiguous(self, layout: AdapterLayout, base: Checkpoint) -> None:
        """A square matrix's layout is told by one flag for all: which must hold for the others."""
        flag = "transposed" if self.config.get("fan_in_fan_out") else "linear"
        square, against = [], []
        for module in layout.modules:
            lora = _lora_in(module)
            if lora is None or lora.form not in {"linear", "transposed"}:
                continue
            shape = base.specs[module.targets[0]].shape
            if _kind_of(module.targets[0], base):
                continue  # its class says it
            if shape[0] == shape[1]:
                square.append(f"'{lora.name}'")
            elif lora.form != flag:
                against.append(f"'{lora.name}'")
        if square and against:
            raise CheckpointError(
                f"{self.label}: fan_in_fan_out in {CONFIG} is wrong for {against[0]}, so that it "
                f"can't be told how these square matrices lie:{listing(square)}\nadapt layers of "
                "one kind only, or merge the adapter into its base with PEFT"
            )

    def _of_lora(self, name: str, base: Checkpoint) -> Module:
        lora = self._lora(name, base)
        start = self._replacing
        magnitudes = f"{name}.{_MAGNITUDES}"
        if self.config.get("use_dora"):
            if magnitudes not in self.tensors:
                raise CheckpointError(
                    f"{self.label}: use_dora is set, but '{magnitudes}' is missing; save the "
                    "adapter again"
                )
            self._check_magnitudes(lora, base)
        elif magnitudes in self.tensors:
            raise CheckpointError(
                f"{self.label}: holds '{magnitudes}', but use_dora is not set in {CONFIG}; set it "
                "there if this is a DoRA"
            )
        if not start:
            return DoraModule(lora) if self.config.get("use_dora") else lora
        if self.config.get("use_dora") or lora.form not in {
            "linear",
            *(["transposed"] if start == "pissa" else []),
        }:
            raise CheckpointError(
                f"{self.label}: init_lora_weights: {start} on '{name}' "
                f"({'with DoRA' if self.config.get('use_dora') else lora.form}) is not known "
                f"here; {MERGE}"
            )
        return ReplacingModule(lora, "pissa" if start == "pissa" else "olora")

    def _check_magnitudes(self, lora: LoraModule, base: Checkpoint) -> None:
        axis = 1 if lora.form in {"transposed", "embedding"} else 0
        outputs = self._shape(lora.targets[0], base)[axis]
        shape = self.tensors.specs[f"{lora.name}.{_MAGNITUDES}"].shape
        if math.prod(shape) != outputs:
            raise FamilyError(
                f"{self.label}: '{lora.name}.{_MAGNITUDES}' has shape {list(shape)}, but the "
                f"base's weight has {outputs} outputs; an adapter of another base?"
            )

    def _shape(self, weight: str, base: Checkpoint) -> tuple[int, ...]:
        """Of a weight; the adapter's own, of a module that was resized before it was adapted."""
        return (self.tensors if weight in self.tensors else base).specs[weight].shape

    def _lora(self, name: str, base: Checkpoint) -> LoraModule:
        embedding = f"{name}.lora_embedding_A" in self.tensors
        keys = (
            ("lora_embedding_A", "lora_embedding_B")
            if embedding
            else ("lora_A.weight", "lora_B.weight")
        )
        a, b = self.factors(name, keys)
        weight = self._shape(_weight_of(name, base), base)
        self._refuse_grouped(name, a, b, weight)
        attention = name.removesuffix(".out_proj")
        if attention == name or not self._is_attention(attention, base):
            attention = ""
        rank, scale = self.scaling(attention or name, a[0])
        if a[0] != rank or len(b) < 2 or b[1] != rank:
            raise CheckpointError(
                f"{self.label}: module '{name}' has factors of shapes {list(a)} and {list(b)}, but "
                f"{CONFIG} gives it rank {rank}; mend r or rank_pattern there, or save again"
            )
        bias = f"{name}.lora_B.bias" in self.tensors
        if bias and (attention or self._is_attention(name, base)):
            raise CheckpointError(
                f"{self.label}: has '{name}.lora_B.bias': lora_bias on an attention, of which PEFT "
                f"takes a part alone, is not known here; {MERGE}"
            )
        form = self._form(name, a, b, weight, embedding)
        if form in {"linear", "transposed"} and weight[0] == weight[1]:
            form = _kind_of(_weight_of(name, base), base) or form
        if form == "linear" and self._is_attention(name, base):
            form = "in_proj"
        # PEFT adds an attention's out_proj twice, when it trains and when it merges.
        scale = 2 * scale if attention else scale
        return LoraModule(
            name,
            form,
            scale,
            bias=bias,
            linearized=self.linearized,
        )

    def _is_attention(self, name: str, base: Checkpoint) -> bool:
        """Whether a name is that of an adapted `nn.MultiheadAttention`."""
        return (
            f"{name}.lora_A.weight" in self.tensors
            and _weight_of(name, base) in base
            and _weight_of(name, base).endswith(".in_proj_weight")
        )

    def _refuse_grouped(
        self, name: str, a: tuple[int, ...], b: tuple[int, ...], weight: tuple[int, ...]
    ) -> None:
        grouped = len(a) > 2 and len(weight) == len(a) and weight[1] and a[1] > weight[1]
        if grouped and a[1] % weight[1] == 0 and b[0] == weight[0] and a[2:] == weight[2:]:
            raise FamilyError(
                f"{self.label}: adapts '{name}', a convolution of {a[1] // weight[1]} groups: "
                "PEFT's first factor mixes the groups, so that no grouped convolution has the "
                "sum as its weight, and PEFT can't merge it either; train without this module "
                "among target_modules"
            )

    def _form(
        self,
        name: str,
        a: tuple[int, ...],
        b: tuple[int, ...],
        weight: tuple[int, ...],
        embedding: bool,
    ) -> Any:
        if embedding and (a[1], b[0]) == weight:
            return "embedding"
        if len(a) > 2 and (b[0], *a[1:]) == weight and set(b[2:]) == {1}:
            return "conv"
        lies = {"linear": (b[0], *a[1:]), "transposed": (*a[1:], b[0])}
        fits = [form for form, shape in lies.items() if not embedding and shape == weight]
        if len(fits) == 2:  # square: the config must say
            return "transposed" if self.config.get("fan_in_fan_out") else "linear"
        if not fits:
            raise FamilyError(
                f"{self.label}: the factors of '{name}' have shapes {list(a)} and {list(b)}, which "
                f"don't make the base's weight {list(weight)}; an adapter of another base?"
            )
        return fits[0]

    def _ia3(self, name: str, base: Checkpoint) -> Module:
        vector = self.tensors.specs[f"{name}.ia3_l"].shape
        shape = base.specs[f"{name}.weight"].shape
        inputs = is_feedforward(self.config.get("feedforward_modules"), name, self.label)
        length = math.prod(vector)
        axes = [axis for axis in range(min(len(shape), 2)) if shape[axis] == length]
        if not axes:
            raise FamilyError(
                f"{self.label}: the vector of '{name}' has {length} entries, which is neither axis "
                f"of the base's weight {list(shape)}; an adapter of another base?"
            )
        if len(axes) > 1:  # square: the config must say
            transposed = len(shape) == 2 and bool(self.config.get("fan_in_fan_out"))
            axes = [int(inputs) ^ int(transposed)]
        axis = axes[0]
        return Ia3Module(name, axis, bias=not inputs and f"{name}.bias" in base)

    def _refuse_tensors(self) -> None:
        strange = [
            f"'{name}'"
            for name in self.tensors
            if re.search(r"\.(lora_|ia3_|token_adapter)", name) and _adapted(name) is None
        ]
        if strange:
            raise CheckpointError(
                f"{self.label}: holds tensors of a kind that is not known here:{listing(strange)}\n"
                f"{MERGE}"
            )


def _kind_of(name: str, base: Checkpoint) -> Any:
    """How a matrix lies, where the base's class says it; None where it does not."""
    kind = base.architecture.kinds.get(name) if base.architecture else None
    return kind if kind in {"linear", "transposed"} else None


def _adapted(name: str) -> str | None:
    """The module that an adapter's tensor belongs to; None where it replaces one of the base's."""
    found = _ADAPTER_TENSOR.fullmatch(name)
    return found[1] if found else None


def _weight_of(name: str, base: Checkpoint) -> str:
    """The name of the weight that a module's factors make, whether the base has it or not."""
    weight, attention = f"{name}.weight", f"{name}.in_proj_weight"
    return attention if weight not in base and attention in base else weight


def _lora_in(module: Module) -> LoraModule | None:
    """The product within a module's change, where it is one over the module's weight."""
    if isinstance(module, DoraModule | ReplacingModule):
        return module.lora
    return module if isinstance(module, LoraModule) else None
