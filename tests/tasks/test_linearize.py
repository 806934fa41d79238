"""L-LoRA's expansion: its closed form, its definition, and what Taylor says of it."""

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor, nn

from fusionkit.checkpoints.adapters.lowrank import first_order
from fusionkit.errors import FusionKitError
from fusionkit.tasks.linearize import LinearizedLinear, linearize

METHODS = ["closed_form", "jvp"]
STARTS = [True, False]  # PEFT's init_lora_weights: B0 = 0, or random


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 4, bias=False)).double()


def adapted(zero: bool = True, net: nn.Module | None = None, **config: Any) -> Any:
    """A PEFT model in float64; the same weights and start every time."""
    torch.manual_seed(0)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["0", "2"], **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_config = LoraConfig(init_lora_weights=zero, **settings)
        return get_peft_model(net or mlp(), peft_config).double()  # type: ignore[arg-type]


def adapter(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if "lora_" in n or "ia3_" in n}


def move(model: nn.Module, step: float = 0.3, seed: int = 1) -> None:
    """Move the adapter's parameters, always in the same direction."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter(model).values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(step * noise.to(parameter))


def inputs(rows: int = 5) -> Tensor:
    return torch.randn(rows, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("zero", STARTS)
def test_closed_form_and_jvp_are_equal_in_value_and_gradient(zero: bool) -> None:
    results = []
    for method in METHODS:
        model = adapted(zero)
        linearize(model, method)  # type: ignore[arg-type]
        move(model)
        for parameter in adapter(model).values():
            parameter.requires_grad_(True)
        x = inputs().requires_grad_()
        y = model(x)
        y.square().sum().backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in adapter(model).values()]
        results.append([y.detach(), x.grad, *grads])
    for closed, definition in zip(*results, strict=True):
        torch.testing.assert_close(closed, definition, rtol=1e-10, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    rank=st.integers(1, 5),
    alpha=st.integers(1, 9),
    sizes=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    zero=st.booleans(),
    rslora=st.booleans(),
    bias=st.booleans(),
)
def test_one_layer_equals_its_formula(
    rank: int, alpha: int, sizes: tuple[int, int], zero: bool, rslora: bool, bias: bool
) -> None:
    """W x + s [B0 A0 + (B − B0) A0 + B0 (A − A0)] x, written out."""
    net = nn.Sequential(nn.Linear(*sizes, bias=bias)).double()
    model = adapted(zero, net, r=rank, lora_alpha=alpha, target_modules=["0"], use_rslora=rslora)
    a0, b0 = (p.detach().clone() for p in adapter(model).values())
    linearize(model)
    move(model)
    a, b = adapter(model).values()
    scale = alpha / (rank**0.5 if rslora else rank)
    x = torch.randn(3, sizes[0], dtype=torch.float64)
    delta = scale * (b0 @ a0 + (b - b0) @ a0 + b0 @ (a - a0))
    base = model.base_model.model[0].base_layer
    torch.testing.assert_close(model(x), base(x) + x @ delta.mT, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("zero", STARTS)
def test_at_its_start_it_is_the_lora(zero: bool) -> None:
    """Value and gradient at φ0 are those of PEFT's own layer."""
    results = []
    for linear in (False, True):
        model = adapted(zero)
        if linear:
            linearize(model)
        for parameter in adapter(model).values():
            parameter.requires_grad_(True)
        y = model(inputs())
        y.square().sum().backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in adapter(model).values()]
        results.append([y.detach(), *grads])
    for plain, linearized in zip(*results, strict=True):
        torch.testing.assert_close(linearized, plain, rtol=1e-10, atol=1e-12)


def test_a_layer_is_affine_in_its_parameters_and_close_to_second_order() -> None:
    net = nn.Sequential(nn.Linear(7, 4)).double()
    x = inputs()
    start = adapted(False, copy.deepcopy(net), target_modules=["0"])(x)
    gaps, changes = [], []
    for step in (0.1, 0.05):
        plain = adapted(False, copy.deepcopy(net), target_modules=["0"])
        linear = adapted(False, copy.deepcopy(net), target_modules=["0"])
        linearize(linear)
        move(plain, step)
        move(linear, step)
        changes.append(linear(x) - start)
        gaps.append((plain(x) - linear(x)).norm())
    torch.testing.assert_close(changes[0], 2 * changes[1])
    assert float(gaps[0] / gaps[1]) == pytest.approx(4, rel=1e-6)


def test_only_adapters_are_linearized() -> None:
    """With a nonlinearity between, the network as a whole is not affine in φ."""
    x = inputs()
    start = adapted(False)(x)
    changes = []
    for step in (0.2, 0.1):
        model = adapted(False)
        assert linearize(model) == ["base_model.model.0", "base_model.model.2"]
        move(model, step)
        changes.append(model(x) - start)
    assert (changes[0] - 2 * changes[1]).norm() > 1e-3 * changes[0].norm()


def test_gradients_agree_with_finite_differences() -> None:
    model = adapted(False)
    linearize(model)
    move(model)
    parameters = adapter(model)
    x = inputs(2)

    def output(*values: Tensor) -> Tensor:
        named = dict(zip(parameters, values, strict=True))
        result: Tensor = torch.func.functional_call(model, named, (x,))
        return result

    values = [p.detach().clone().requires_grad_() for p in parameters.values()]
    assert torch.autograd.gradcheck(output, values)


def test_from_zero_a_is_frozen_and_jvp_gives_it_no_gradient() -> None:
    closed, definition = adapted(), adapted()
    linearize(closed)
    linearize(definition, "jvp")
    assert all(p.requires_grad == ("lora_B" in n) for n, p in adapter(closed).items())
    move(definition)
    definition(inputs()).square().sum().backward()
    for name, parameter in adapter(definition).items():
        assert bool(parameter.grad.any()) == ("lora_B" in name)  # type: ignore[union-attr]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("zero", STARTS)
def test_folding_is_exact(zero: bool, method: Any) -> None:
    model = adapted(zero)
    linearize(model, method)
    move(model)
    x = inputs()
    y = model(x)
    layer = model.base_model.model[0]
    rank = int(torch.linalg.matrix_rank(layer.get_delta_weight("default")))
    assert rank == (3 if zero else 6)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), mlp_of(model)(x))
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), y, rtol=1e-10, atol=1e-12)


def mlp_of(model: Any) -> nn.Module:
    """The base, out of a PEFT model."""
    layers = [copy.deepcopy(getattr(m, "base_layer", m)) for m in model.base_model.model]
    return nn.Sequential(*layers)


def test_layers_without_a_closed_form() -> None:
    """An embedding and a convolution: affine in their parameters, and folded exactly."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.conv = nn.Embedding(11, 6), nn.Conv2d(1, 3, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.conv(self.embed(tokens)[:, None])  # type: ignore[no-any-return]

    tokens = torch.arange(8).view(2, 4)
    torch.manual_seed(0)
    net = Net().double()
    config = {"target_modules": ["embed", "conv"], "r": 2}
    model = adapted(False, net, **config)
    assert len(linearize(model)) == 2
    move(model)
    y = model(tokens)
    torch.testing.assert_close(model.merge_and_unload()(tokens), y, rtol=1e-10, atol=1e-12)


def test_ia3_is_linear_already() -> None:
    torch.manual_seed(0)
    config = IA3Config(target_modules=["0", "2"], feedforward_modules=["2"])
    plain = get_peft_model(mlp(), config).double()  # type: ignore[arg-type]
    linear = copy.deepcopy(plain)
    linearize(linear)
    move(plain)
    move(linear)
    torch.testing.assert_close(linear(inputs()), plain(inputs()))


def test_first_order_has_the_least_rank() -> None:
    a, a0, b, b0 = torch.randn(2, 6), torch.randn(2, 6), torch.randn(5, 2), torch.randn(5, 2)
    full = first_order(a, b, a0, b0)
    assert full.left.shape == (5, 4)
    torch.testing.assert_close(full.left @ full.right.mT, b @ a0 + b0 @ (a - a0))
    short = first_order(a, b, a0, torch.zeros(5, 2))
    assert short.left.shape == (5, 2)
    torch.testing.assert_close(short.left @ short.right.mT, b @ a0)


@pytest.mark.parametrize("zero", STARTS)
def test_a_state_dict_carries_the_start_along(zero: bool) -> None:
    model = adapted(zero)
    names = set(model.state_dict())
    linearize(model)
    move(model)
    added = set(model.state_dict()) - names
    assert names <= set(model.state_dict())
    assert len(added) == (2 if zero else 4)
    assert all(".initial_lora_" in name for name in added)
    other = adapted(zero)
    move(other, seed=5)
    if zero:
        for name, parameter in adapter(other).items():
            if "lora_B" in name:
                nn.init.zeros_(parameter)
    linearize(other)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(inputs()), model(inputs()))


def test_dropout_as_peft_draws_it() -> None:
    """B moves, A does not: the linearized layer is the LoRA, masks and all."""
    outputs = []
    for linear in (False, True):
        model = adapted(lora_dropout=0.5).train()
        if linear:
            linearize(model)
        with torch.no_grad():
            for name, parameter in adapter(model).items():
                if "lora_B" in name:
                    parameter.fill_(0.1)
        torch.manual_seed(4)
        outputs.append(model(inputs()))
    torch.testing.assert_close(outputs[0], outputs[1])


def test_mixed_precision() -> None:
    model = adapted(False).float()
    linearize(model)
    move(model)
    x = inputs().float()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        y.float().square().sum().backward()
    torch.testing.assert_close(y.float(), model(x), rtol=0.05, atol=0.05)
    assert all(p.grad is not None for p in adapter(model).values())


class TestRefusals:
    def test_no_adapters(self) -> None:
        with pytest.raises(FusionKitError, match="has no adapters to linearize"):
            linearize(mlp())

    def test_twice(self) -> None:
        model = adapted()
        linearize(model)
        with pytest.raises(FusionKitError, match=r"model\.0' is linearized already"):
            linearize(model)

    @pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}])
    def test_variants(self, config: dict[str, Any]) -> None:
        model = adapted(target_modules=["0"], **config)
        with pytest.raises(FusionKitError, match=r"0'.*a variant.*use a plain LoRA"):
            linearize(model)
        assert not any(isinstance(module, LinearizedLinear) for module in model.modules())

    def test_two_active_adapters(self) -> None:
        model = adapted()
        model.add_adapter("other", LoraConfig(r=2, target_modules=["0", "2"]))
        model.base_model.set_adapter(["default", "other"])
        with pytest.raises(FusionKitError, match="2 active adapters"):
            linearize(model)
