"""What is known of a model's class: the one place that is asked, instead of tensors' names.

An `Architecture` is read off a module: a live one, or one built without weights from the folder
that a checkpoint lies in (`from_config`). It says what holds each tensor, which names share one,
which tensors are buffers, stacks of experts or rows of a vocabulary, and which tensors of old
files no one reads any more.
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

Kind = Literal["linear", "transposed", "embedding", "convolution", "attention", "experts"]
"""What holds a matrix: `linear` (out, in); `transposed` (in, out), as GPT-2's Conv1D; `embedding`
(tokens, width); `convolution` (out, in, …); `attention`, the joint projection of a
MultiheadAttention; `experts`, a stack of matrices (E, …)."""

_EXPERTS = re.compile(r"(^|[._])experts?([._]|$)", re.IGNORECASE)
_LEGACY = (
    r"(^|\.)inv_freq$",
    r"(^|\.)position_ids$",
    r"(^|\.)(attn|attention)\.(masked_)?bias$",
)
"""Buffers that old classes saved: rotary frequencies, positions, GPT-2's causal masks. What a
class has itself is never among them."""


@dataclass(frozen=True)
class Architecture:
    """What is known of a model's class.

    Attributes:
        name: the class, and the library that has it: `transformers 5.24.0: LlamaForCausalLM`.
        shapes: a tensor's name, as the class has it → its shape.
        tied: name → the name whose tensor it shares.
        kinds: a matrix's name → what holds it.
        buffers: names of the buffers among the tensors.
        vocabulary: names of the tensors whose first axis is the vocabulary.
        head: names of the tensors outside of the class's base model (`base_model_prefix`); empty
            where it has none.
        unsaved: names of tensors that the class never saves, as it makes them itself.
        unread: patterns (regular expressions) of tensors in files that the class does not read.
        record: what the class can be built from again, as JSON; empty of any other module.
        skeleton: the class's module on the meta device, whose conversions tell how it reads
            files; None where it reads them as they are.
        module: the module that all this was read off, live or on the meta device; None where it
            has other names.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()
    vocabulary: frozenset[str] = frozenset()
    head: frozenset[str] = frozenset()
    unsaved: frozenset[str] = frozenset()
    unread: tuple[str, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    skeleton: nn.Module | None = field(default=None, compare=False, repr=False)
    module: nn.Module | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, model: nn.Module, record: Mapping[str, Any] | None = None) -> "Architecture":
        """Read it off a module, whatever its device.

        Args:
            model: the module.
            record: what it can be built from again.
        """
        state: dict[str, Tensor] = model.state_dict(keep_vars=True)
        buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
        return cls(
            name=_name(model),
            shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
            tied=_tied(model, state),
            kinds=_kinds(model, state),
            buffers=frozenset(buffers & state.keys()),
            vocabulary=_vocabulary(model),
            head=_head(model, state),
            unsaved=unsaved(model) & state.keys(),
            unread=_unread(model, buffers),
            record=record or {},
            skeleton=model if is_transformers(model) else None,
            module=model,
        )

    @property
    def stacks(self) -> dict[str, int]:
        """Name of a stack of experts → how many there are."""
        return {
            name: self.shapes[name][0] for name, kind in self.kinds.items() if kind == "experts"
        }

    def reads(self, name: str) -> bool:
        """Whether the class, or anything that is known, reads a tensor of this name."""
        return name in self.shapes or not any(re.search(each, name) for each in self.unread)

    def renamed(self, names: Mapping[str, str]) -> "Architecture":
        """The same under other names.

        Args:
            names: name here → its name now, of all tensors that are seen.
        """
        here = {now: name for name, now in names.items()}
        seen = {here[now]: now for now in self.shapes if now in here}
        tied = {
            here[name]: here[to] for name, to in self.tied.items() if name in here and to in here
        }
        return replace(
            self,
            shapes={name: self.shapes[now] for name, now in seen.items()},
            tied=tied,
            kinds={name: self.kinds[now] for name, now in seen.items() if now in self.kinds},
            buffers=frozenset(name for name, now in seen.items() if now in self.buffers),
            vocabulary=frozenset(name for name, now in seen.items() if now in self.vocabulary),
            head=frozenset(name for name, now in seen.items() if now in self.head),
            unsaved=frozenset(name for name, now in seen.items() if now in self.unsaved),
            skeleton=None,
            module=None,
        )


def is_transformers(model: nn.Module) -> bool:
    """Whether a module is one of transformers' models; nothing is imported to know."""
    module = sys.modules.get("transformers.modeling_utils")
    return module is not None and isinstance(model, module.PreTrainedModel)


def unsaved(model: nn.Module) -> frozenset[str]:
    """Names of a model's tensors that its class never saves, as it makes them itself."""
    return frozenset(getattr(model, "_keys_to_ignore_on_save", None) or ())


def is_stack(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a stack of experts' matrices, by its name and shape alone."""
    return len(shape) == 3 and _EXPERTS.search(name) is not None


def _name(model: nn.Module) -> str:
    library = type(model).__module__.partition(".")[0]
    version = getattr(sys.modules.get(library), "__version__", None)
    return f"{library} {version}: {type(model).__name__}" if version else type(model).__name__


def _tied(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names that share a parameter; the class's own word on which of them is the first."""
    first: dict[int, str] = {}
    known = {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}
    tied = {name: target for name, target in known.items() if target != name}
    declared = getattr(model, "all_tied_weights_keys", None)
    pairs: Mapping[str, str] = declared if isinstance(declared, Mapping) else {}
    for name, target in pairs.items():
        if name in state and target in state and name not in tied and tied.get(target) != name:
            tied[name] = tied.get(target, target)
    return tied


def _kinds(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Kind]:
    kinds: dict[str, Kind] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf in module._parameters:
            name = f"{path}.{leaf}" if path else leaf
            kind = _kind(module, name, state[name].ndim) if name in state else None
            if kind:
                kinds[name] = kind
    return kinds


_KINDS: tuple[tuple[tuple[type[nn.Module], ...], Kind], ...] = (
    ((nn.Embedding,), "embedding"),
    ((nn.MultiheadAttention,), "attention"),
    ((nn.modules.conv._ConvNd,), "convolution"),
    ((nn.Linear,), "linear"),
)


def _kind(module: nn.Module, name: str, axes: int) -> Kind | None:
    if axes < 2:
        return None
    for classes, kind in _KINDS:
        if isinstance(module, classes):
            return kind
    if type(module).__name__ == "Conv1D" and axes == 2:  # transformers' own, of GPT-2
        return "transposed"
    stacked = _EXPERTS.search(name) or "Expert" in type(module).__name__
    return "experts" if axes == 3 and stacked else None


def _vocabulary(model: nn.Module) -> frozenset[str]:
    """Tensors of the input and output embeddings, and all that share them."""
    found = set()
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, get, lambda: None)()
        except (AttributeError, NotImplementedError, TypeError):
            continue  # of classes without any
        if isinstance(module, nn.Embedding | nn.Linear):
            found |= {id(tensor) for tensor in module._parameters.values() if tensor is not None}
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    return frozenset(name for name, tensor in state.items() if id(tensor) in found)


def _head(model: nn.Module, state: Mapping[str, Tensor]) -> frozenset[str]:
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or not isinstance(getattr(model, str(prefix), None), nn.Module):
        return frozenset()
    return frozenset(name for name in state if not name.startswith(f"{prefix}."))


def _unread(model: nn.Module, buffers: set[str]) -> tuple[str, ...]:
    """Patterns of what old files hold beside the class's own tensors."""
    declared = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    # Buffers that the class has, and no file need hold: saved by classes before it.
    leaves = {name.rpartition(".")[2] for name in buffers - model.state_dict().keys()}
    return (*sorted(declared), *_LEGACY, *(rf"(^|\.){re.escape(leaf)}$" for leaf in sorted(leaves)))
