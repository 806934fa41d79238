"""A gradient-free search over one task's shift and scale, one evaluation at a time."""

from collections.abc import Sequence
from typing import Any

from fusionkit.codecs.dbms import PLAIN, Scalars
from fusionkit.errors import of_extra

PROBES: tuple[Scalars, ...] = (
    PLAIN,
    (0.5, 1.0),
    (1.0, 1.0),
    (2.0, 1.0),
    (0.25, 2.0),
    (1.0, 2.0),
    (2.0, 2.0),
)
"""Evaluated first, by any method: the loss has several valleys, and the best one is seldom the
nearest. The first is the wrapped codec alone."""

_POPULATION = 4


class PairSearch:
    """Asks for pairs of scalars to evaluate: the probes, then CMA-ES's around the best of them.

    Args:
        seed: of the draws.
        spread: standard deviation of the first draws, in the scalars' units.

    Attributes:
        told: every pair that was evaluated, and its loss; what a search can be replayed from.
    """

    def __init__(self, seed: int, spread: float) -> None:
        self.told: list[tuple[Scalars, float]] = []
        self._seed, self._spread = seed, spread
        self._asked: list[Sequence[float]] = []
        self._values: list[float] = []

    @property
    def best(self) -> Scalars:
        """The pair with the least loss so far."""
        return min(self.told, key=lambda told: _finite(told[1]))[0]

    def ask(self) -> Scalars:
        """The next pair to evaluate."""
        if len(self.told) < len(PROBES):
            return PROBES[len(self.told)]
        if len(self.told) == len(PROBES):
            self._strategy = self._start()
        if not self._asked:
            self._asked = list(self._strategy.ask())
        shift, scale = self._asked[len(self._values)]
        return float(shift), float(scale)

    def tell(self, pair: Scalars, value: float) -> None:
        """The loss at the pair asked for; one that is not finite is only very bad."""
        self.told.append((pair, value))
        if len(self.told) <= len(PROBES):
            return
        self._values.append(_finite(value))
        if len(self._values) == len(self._asked):
            self._strategy.tell(self._asked, self._values)
            self._asked, self._values = [], []

    def replay(self, told: Sequence[tuple[Scalars, float]]) -> None:
        """Come to where a search was that was told the same."""
        for pair, value in told:
            self.ask()
            self.tell(pair, value)

    def _start(self) -> Any:
        import numpy as np

        cma = of_extra("cma", "search", "calibration by search")
        options = {
            "popsize": _POPULATION,
            "seed": np.nan,  # would be set for all of NumPy
            "randn": np.random.RandomState(self._seed + 1).randn,
            "verbose": -9,
        }
        return cma.CMAEvolutionStrategy(list(self.best), self._spread, options)


def _finite(value: float) -> float:
    return value if abs(value) < 1e30 else 1e30
