"""A gradient-free search over one task's shift and scale, by CMA-ES, one evaluation at a time."""

from collections.abc import Sequence

from fusionkit.codecs.dbms import Scalars

_POPULATION = 4
_START: Scalars = (0.5, 1.5)


class PairSearch:
    """Asks for pairs of scalars to evaluate; the first evaluation, α = 0 and β = 1, comes unasked.

    Args:
        seed: of the draws.
        spread: standard deviation of the first draws, in the scalars' units.

    Attributes:
        told: every pair that was evaluated, and its loss; what a search can be replayed from.
    """

    def __init__(self, seed: int, spread: float) -> None:
        import cma
        import numpy as np

        self.told: list[tuple[Scalars, float]] = []
        options = {
            "popsize": _POPULATION,
            "seed": np.nan,  # would be set for all of NumPy
            "randn": np.random.RandomState(seed + 1).randn,
            "verbose": -9,
        }
        self._strategy = cma.CMAEvolutionStrategy(list(_START), spread, options)
        self._asked: list[Sequence[float]] = []
        self._values: list[float] = []

    def ask(self) -> Scalars:
        """The next pair to evaluate."""
        if not self._asked:
            self._asked = list(self._strategy.ask())
        shift, scale = self._asked[len(self._values)]
        return float(shift), float(scale)

    def tell(self, pair: Scalars, value: float) -> None:
        """The loss at the pair asked for; one that is not finite is only very bad."""
        self.told.append((pair, value))
        if not self._asked:
            return
        self._values.append(value if abs(value) < 1e30 else 1e30)
        if len(self._values) == len(self._asked):
            self._strategy.tell(self._asked, self._values)
            self._asked, self._values = [], []

    def replay(self, told: Sequence[tuple[Scalars, float]]) -> None:
        """Come to where a search was that was told the same."""
        for place, (pair, value) in enumerate(told):
            if place > 0:
                self.ask()
            self.tell(pair, value)
