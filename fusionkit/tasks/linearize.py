"""Partial linearization of adapters: L-LoRA (Tang et al., 2310.04742).

Each adapted layer, as a function of its adapter's parameters φ at fixed input, becomes its
first-order Taylor expansion at their initial point φ₀ (eq. 4):

    f_lin(x; φ) = f(x; φ₀) + ∂f/∂φ(x; φ₀) · (φ − φ₀)

The rest of the network stays as it is. A LoRA layer has it in closed form, with s its scaling:

    f_lin(x) = W x + s [B A₀ + B₀ (A − A₀)] x

which costs no more than the LoRA where B₀ = 0, PEFT's usual start: then A has no influence, and is
frozen. `torch.func.jvp` is the definition, and serves the layers without a closed form. Folding
into the weights is exact for every LoRA layer, since the expansion is linear in the input, too.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from peft.tuners import ia3, lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call, jvp

from fusionkit.checkpoints.adapters.lowrank import first_order
from fusionkit.errors import FusionKitError

_PREFIX = "initial_"


class _Linearized(nn.Module):
    """A PEFT layer expanded around what its parameters were; its initial point is in buffers.

    A buffer is left out where the parameter started at 0.
    """

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's own parameters, by name within the layer."""
        return {
            name: p for name, p in self.named_parameters() if name.startswith(("lora_", "ia3_"))
        }

    def initial(self, name: str) -> Tensor | None:
        """What a parameter started at; None for 0."""
        found: Tensor | None = getattr(self, _buffer(name), None)
        return found

    def start_here(self) -> None:
        """Take the parameters as they are for the initial point."""
        for name, parameter in self.adapter_parameters().items():
            if parameter.any():
                self.register_buffer(_buffer(name), parameter.detach().clone())

    def freeze_idle(self) -> None:
        """Freeze a factor whose partner starts at 0: it has no influence on a linearized LoRA."""
        parameters = self.adapter_parameters()
        for name, parameter in parameters.items():
            for one, other in (("_A.", "_B."), ("_B.", "_A.")):
                partner = name.replace(one, other)
                if one in name and partner in parameters and self.initial(partner) is None:
                    parameter.requires_grad_(False)

    def _expanded(self, function: nn.Module, *inputs: Any) -> Tensor:
        """The expansion of `function(layer)`, at the layer's initial point."""
        now = {f"layer.{name}": p for name, p in self.adapter_parameters().items()}
        start = {}
        for name, parameter in now.items():
            initial = self.initial(name.removeprefix("layer."))
            start[name] = torch.zeros_like(parameter) if initial is None else initial
        moved = {name: parameter - start[name] for name, parameter in now.items()}

        def plain(parameters: dict[str, Tensor]) -> Any:
            return functional_call(function, parameters, inputs)

        at_start, change, *_ = jvp(plain, (start,), (moved,))
        expanded: Tensor = at_start + change
        return expanded


class _Jvp(_Linearized):
    """Expanded by `torch.func.jvp`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        plain: Any = super().forward
        layer: Any = self
        if layer.disable_adapters or layer.merged:
            return plain(x, *args, **kwargs)
        return self._expanded(_Plain(self, "forward"), x)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What folding adds to the weight."""
        with torch.no_grad():
            return self._expanded(_Plain(self, "get_delta_weight"), adapter)


class _Plain(nn.Module):
    """A method of a layer as PEFT has it, to be called with other parameters."""

    def __init__(self, layer: _Linearized, method: str) -> None:
        super().__init__()
        self.layer, self.method = layer, method

    def forward(self, *inputs: Any) -> Any:
        """Call it."""
        return getattr(super(_Jvp, self.layer), self.method)(*inputs)


class LinearizedLinear(_Linearized, lora.Linear):
    """A LoRA of a linear layer, linearized in closed form."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """W x + s [B A₀ + B₀ (A − A₀)] x: `(…, in)` → `(…, out)`."""
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                a, b, a0, b0 = self._factors(adapter)
                down, up = a0, b
                if b0 is not None:
                    down, up = torch.cat([a0, a - a0]), torch.cat([b, b0], 1)
                inner = self.lora_dropout[adapter](self._cast_input_dtype(x, b.dtype))
                low = nn.functional.linear(nn.functional.linear(inner, down), up)
                result = (result + low * self.scaling[adapter]).to(result.dtype)
        return result

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What folding adds to the weight, in its layout."""
        a, b, a0, b0 = self._factors(adapter)
        left, right = first_order(a, b, a0, torch.zeros_like(b) if b0 is None else b0)
        wide = torch.promote_types(b.dtype, torch.float32)
        delta = (left.to(wide) @ right.to(wide).mT * self.scaling[adapter]).to(b.dtype)
        folded: Tensor = delta.mT if self.fan_in_fan_out else delta
        return folded

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        a: Any = self.lora_A[adapter].weight
        b: Any = self.lora_B[adapter].weight
        a0 = self.initial(f"lora_A.{adapter}.weight")
        b0 = self.initial(f"lora_B.{adapter}.weight")
        return a, b, torch.zeros_like(a) if a0 is None else a0, b0


class JvpLinear(_Jvp, lora.Linear):
    """A LoRA of a linear layer, by the definition."""


class JvpEmbedding(_Jvp, lora.Embedding):
    """A LoRA of an embedding."""


class JvpConv2d(_Jvp, lora.Conv2d):
    """A LoRA of a convolution."""


class JvpIa3Linear(_Jvp, ia3.Linear):
    """(IA)³ on a linear layer; linear in its vector already, so that nothing changes."""


class JvpIa3Conv2d(_Jvp, ia3.Conv2d):
    """(IA)³ on a convolution; linear in its vector already, so that nothing changes."""


_JVP: dict[type, type[_Linearized]] = {
    lora.Linear: JvpLinear,
    lora.Embedding: JvpEmbedding,
    lora.Conv2d: JvpConv2d,
    ia3.Linear: JvpIa3Linear,
    ia3.Conv2d: JvpIa3Conv2d,
}
_CLOSED_FORM: dict[type, type[_Linearized]] = {**_JVP, lora.Linear: LinearizedLinear}


def linearize(model: nn.Module, method: Literal["closed_form", "jvp"] = "closed_form") -> list[str]:
    """Linearize a model's adapters around their current parameters, in place.

    Parameters keep their names, so that PEFT saves them as ever; the initial point is in
    persistent buffers (`….initial_lora_A_default_weight`), so that checkpoints resume exactly.

    Args:
        model: has PEFT's LoRA or (IA)³ layers in it (`get_peft_model`).
        method: `closed_form` where there is one (linear layers); `jvp` everywhere. They compute
            the same function.

    Returns:
        the linearized modules' names, in the model's order.

    Raises:
        FusionKitError: the model has no adapters, several at once, or one of a kind that can't
            be linearized; or it is linearized already.
    """
    classes = _CLOSED_FORM if method == "closed_form" else _JVP
    layers = list(_adapter_layers(model))
    if not layers:
        raise FusionKitError(
            f"{type(model).__name__} has no adapters to linearize; put them in with PEFT first"
        )
    for name, layer in layers:
        if isinstance(layer, _Linearized):
            raise FusionKitError(f"'{name}' is linearized already; start from a fresh model")
        special = bool(getattr(layer, "lora_variant", None)) or any(
            getattr(layer, "lora_bias", {}).values()
        )
        if type(layer) not in classes or special:
            raise FusionKitError(
                f"'{name}' ({type(layer).__module__}.{type(layer).__name__}"
                f"{', a variant of LoRA or one with a bias' if special else ''}) can't be "
                "linearized; use a plain LoRA or (IA)³"
            )
        if len(layer.active_adapters) != 1:
            raise FusionKitError(
                f"'{name}' has {len(layer.active_adapters)} active adapters; linearize one"
            )
    for _, layer in layers:
        layer.__class__ = classes[type(layer)]
        layer.start_here()
        if method == "closed_form":
            layer.freeze_idle()
    return [name for name, _ in layers]


def _adapter_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def _buffer(name: str) -> str:
    return _PREFIX + name.replace(".", "_")
