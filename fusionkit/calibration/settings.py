"""How a task's few numbers are learned: the settings of calibration."""

from dataclasses import dataclass
from typing import Literal

from fusionkit.errors import FusionKitError


@dataclass(frozen=True)
class Calibration:
    """How a task's scalars are learned; how long, on what device, … is the Trainer's.

    Learned are DBMS's shift and scale, or the parts that another codec says can be (`learned`).
    An epoch takes each task's rows once and ends in one step of its scalars, or one evaluation
    of the search: every loss is the whole objective, at one point. DBMS's codes are made anew at
    the shift reached before each epoch. The best seen is what is kept.

    Args:
        objective: match the fine-tuned model's `outputs` (its class probabilities: the KL
            divergence) or `features` (what its head gets: a row's squared error over its square),
            neither of which needs labels; or the task's own loss on `labels`.
        method: `gradient`: Rprop, since the gradients have no noise; or, of DBMS, `search`:
            CMA-ES, which needs forward passes only.
        rows: calibration rows per task, of the training rows.
        seed: draws the rows, and the search.
        learning_rate: the first step, or the search's first spread; in units of DBMS's scale, of
            a shift as long as the task vector, of a tenth of a learned part.
        patience: epochs without a better loss after which a task is done.

    Raises:
        FusionKitError: a number is out of range.
    """

    objective: Literal["outputs", "features", "labels"] = "outputs"
    method: Literal["gradient", "search"] = "gradient"
    rows: int = 64
    seed: int = 0
    learning_rate: float = 0.3
    patience: int = 6

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("patience", 1), ("learning_rate", 0)):
            value = getattr(self, name)
            if value < least or (name == "learning_rate" and value == 0):
                raise FusionKitError(
                    f"expected the calibration's {name} to be "
                    f"{'above 0' if name == 'learning_rate' else 'at least 1'}, got {value}"
                )
