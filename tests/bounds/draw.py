"""Draws small families whose values reach the limits of their dtypes, for Hypothesis."""

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

State = dict[str, Tensor]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHAPES = ((), (1,), (7,), (130,), (300,), (0,), (3, 0), (1, 9), (9, 1), (2, 2), (16, 16), (5, 48),
          (64, 3), (31, 17), (6, 4, 3), (4, 3, 3, 3))  # fmt: skip
SMALL = SHAPES[:10]
"""Of families of many tasks."""
STACK = (3, 8, 6)
"""Of experts."""
TASKS = (1, 1, 2, 2, 3, 3, 5, 5, 20, 200)
SCALES = (1e-45, 1e-40, 1e-38, 1e-30, 1e-12, 1e-6, 0.01, 1.0, 1e3, 6e4, 1e10, 1e20, 1e30)
AT_LIMITS = (0.0, -0.0, 65504.0, -65504.0, 65519.0, 6e-8, 2.0**-14, 1.2e-38, 1e-40, 1.4e-45, 1e30,
             -1e30, 3.3e38, -3.4e38)  # fmt: skip
KINDS = ("normal", "normal", "heavy", "low rank", "constant", "sparse", "zero")


class Drawn:
    """A family, as `fusionkit.compress` takes it.

    Attributes:
        base: the base's tensors.
        finetuned: task → its tensors.
        bad: task and tensor that hold a NaN or an infinity, if any do.
    """

    def __init__(self, base: State, finetuned: dict[str, State]) -> None:
        self.base, self.finetuned = base, finetuned
        self.bad: tuple[str, str] | None = None

    @property
    def largest(self) -> float:
        """The largest magnitude of any value, or difference of two."""
        states = [self.base, *self.finetuned.values()]
        values = [t.to(torch.float64).abs().max() for s in states for t in s.values() if t.numel()]
        return 2 * max((float(value) for value in values), default=0.0)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{n} {tuple(t.shape)} {t.dtype}" for n, t in self.base.items())
        return f"<{len(self.finetuned)} tasks of {shapes}; up to {self.largest / 2:.3g}>"


@st.composite
def families(draw: st.DrawFn) -> Drawn:
    """Any of these shapes, dtypes, numbers of tasks and magnitudes."""
    dtype = draw(st.sampled_from(DTYPES))
    own = draw(st.one_of(st.just(dtype), st.just(dtype), st.sampled_from(DTYPES)))
    tasks = draw(st.sampled_from(TASKS))
    few = tasks > 5
    shapes = draw(st.lists(st.sampled_from(SMALL if few else SHAPES), min_size=1, max_size=3))
    named = {f"layer.{place}.weight": shape for place, shape in enumerate(shapes)}
    if not few and draw(st.integers(0, 5)) == 0:
        named["layer.experts.w"] = STACK
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from(SCALES))
    moved = scale * draw(st.sampled_from((1e-3, 0.1, 0.1, 1.0, 30.0)))
    limits = draw(st.lists(st.sampled_from(AT_LIMITS), max_size=3))
    base = {n: _cast(scale * _values(random, shape, "normal"), dtype) for n, shape in named.items()}
    kinds = {name: draw(st.sampled_from(KINDS)) for name in named}
    finetuned = {}
    for task in range(tasks):
        state = {}
        for name, tensor in base.items():
            delta = moved * _values(random, tuple(tensor.shape), kinds[name])
            values = tensor.to(torch.float64) + delta
            for value in limits if tensor.numel() else ():
                values.view(-1)[random.integers(tensor.numel())] = value
            state[name] = _cast(values, own)
            if kinds[name] == "zero" and not limits:
                state[name] = tensor.clone()
        finetuned[f"t{task}"] = state
    drawn = Drawn(base, finetuned)
    places = [name for name, tensor in base.items() if tensor.numel()]
    if places and draw(st.integers(0, 15)) == 0:
        task, name = f"t{random.integers(tasks)}", places[random.integers(len(places))]
        value = draw(st.sampled_from((float("nan"), float("inf"), -float("inf"))))
        finetuned[task][name].view(-1)[random.integers(base[name].numel())] = value
        drawn.bad = task, name
    return drawn


def _cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded; what the dtype can't hold is its largest value."""
    most = torch.finfo(dtype).max
    return values.clamp(-most, most).to(dtype).clone()


def _values(random: np.random.Generator, shape: tuple[int, ...], kind: str) -> Tensor:
    """float64."""
    if kind == "zero":
        return torch.zeros(shape, dtype=torch.float64)
    if kind == "constant":
        return torch.full(shape, random.standard_normal(), dtype=torch.float64)
    if kind == "low rank" and len(shape) > 1 and 0 not in shape:
        left, right = random.standard_normal((shape[0], 2)), random.standard_normal((2, shape[1]))
        product = np.einsum("ar,rb->ab", left, right).reshape(shape[:2] + (1,) * (len(shape) - 2))
        return torch.from_numpy(np.broadcast_to(product, shape).copy())
    values = np.asarray(random.standard_normal(shape))
    if kind == "heavy":
        values = values**3
    if kind == "sparse":
        values = values * (random.random(shape) < 0.1)
    return torch.from_numpy(np.array(values))
