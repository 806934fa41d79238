"""What is known of a metric: how it is called, which way is better, and in what bounds it lies.

Every table of scores has these, and verbs that score nothing need no torchmetrics, which takes
seconds to import.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """What a metric says of itself, or what follows for one that is composed of others.

    Attributes:
        name: its class, or a formula of such.
        higher_is_better: which way is better; None where it doesn't say.
        low: the least that it can be; None where it doesn't say.
        high: the most.
    """

    name: str
    higher_is_better: bool | None = None
    low: float | None = None
    high: float | None = None

    @property
    def percent(self) -> bool:
        """Whether it lies in [0, 1], and so may be told in percent."""
        return self.low is not None and self.high is not None and 0 <= self.low <= self.high <= 1

    @property
    def within_one(self) -> bool:
        """Whether it lies in [-1, 1], so that a mean with others that do means something."""
        return self.low is not None and self.high is not None and -1 <= self.low <= self.high <= 1
