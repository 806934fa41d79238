"""What torchmetrics says of a metric, as `Facts`; of a sum or quotient, what follows."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.metric import CompositionalMetric

from fusionkit.tasks.facts import Facts

_OPERATORS: dict[Any, tuple[str, Callable[[float, float], float]]] = {
    torch.add: ("+", lambda a, b: a + b),
    torch.sub: ("-", lambda a, b: a - b),
    torch.mul: ("*", lambda a, b: a * b),
    torch.true_divide: ("/", lambda a, b: a / b if b else math.nan),
}


def facts_of(metric: Metric) -> Facts:
    """What is known of a metric; a sum, difference, product or quotient is worked out.

    Args:
        metric: torchmetrics' `higher_is_better`, `plot_lower_bound` and `plot_upper_bound` say it;
            or one's own `facts`.
    """
    if isinstance(own := getattr(metric, "facts", None), Facts):
        return own
    if isinstance(metric, CompositionalMetric):
        return _composed(metric)
    bounds = metric.plot_lower_bound, metric.plot_upper_bound
    return Facts(type(metric).__name__, metric.higher_is_better, *bounds)


def _composed(metric: CompositionalMetric) -> Facts:
    first, second = _operand(metric.metric_a), _operand(metric.metric_b)
    if metric.op not in _OPERATORS or first is None or second is None:
        return Facts(f"{getattr(metric.op, '__name__', 'function')} of metrics")
    sign, apply = _OPERATORS[metric.op]
    name = f"{_bracketed(first, sign)} {sign} {_bracketed(second, sign)}"
    ways = [_way(metric.metric_a), _way(metric.metric_b)]
    higher = _direction(sign, ways, first, second)
    ends = [first.low, first.high, second.low, second.high]
    if any(end is None for end in ends) or (sign == "/" and _holds_zero(second)):
        return Facts(name, higher)
    corners = [apply(a, b) for a in ends[:2] for b in ends[2:]]  # type: ignore[arg-type]
    return Facts(name, higher, min(corners), max(corners))


def _operand(part: Any) -> Facts | None:
    """A metric's facts, or a number's: that it is what it is."""
    if isinstance(part, Metric):
        return facts_of(part)
    if isinstance(part, int | float) or (isinstance(part, Tensor) and part.numel() == 1):
        value = float(part)
        return Facts(f"{value:g}", None, value, value)
    return None


def _way(part: Any) -> int | None:
    """1 where more of a part is better, -1 where less is; 0 of a number; None if not known."""
    if not isinstance(part, Metric):
        return 0
    better = facts_of(part).higher_is_better
    return None if better is None else 1 if better else -1


def _direction(sign: str, ways: Sequence[int | None], first: Facts, second: Facts) -> bool | None:
    """Which way is better for what two parts make."""
    a, b = ways
    if a is None or b is None:
        return None
    if sign in "+-":
        found = {a, -b if sign == "-" else b} - {0}
    elif b == 0:
        found = {a * int(math.copysign(1, second.low or 0.0))}
    elif a == 0 and sign == "*":
        found = {b * int(math.copysign(1, first.low or 0.0))}
    else:
        return None
    return found.pop() > 0 if len(found) == 1 else None


def _holds_zero(facts: Facts) -> bool:
    return facts.low is not None and facts.high is not None and facts.low <= 0 <= facts.high


def _bracketed(facts: Facts, sign: str) -> str:
    """A part's name, in brackets where it would be read otherwise."""
    return f"({facts.name})" if " " in facts.name and sign != "+" else facts.name
