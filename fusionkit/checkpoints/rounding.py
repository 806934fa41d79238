"""Values rounded to a dtype of smaller range, float16 say: none may become infinite unseen."""

import torch
from torch import Tensor

from fusionkit.errors import BundleError

_WIDE = 1e38
"""What the largest value of bfloat16, float32 and float64 is above."""
_MEND = "have the model, or the file, in"


def narrows(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether a dtype has far less range than another: float16, or float8, than bfloat16, say."""
    if not (source.is_floating_point and target.is_floating_point):
        return False
    largest = torch.finfo(target).max
    return largest < _WIDE and largest < torch.finfo(source).max


def lost(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest magnitude among finite values that are not finite in a dtype.

    Args:
        values: of any floating dtype.
        dtype: another, that it `narrows` to.

    Returns:
        float32 `()` on the values' device; 0 where none is lost.
    """
    if values.device.type == "cpu" and values.numel():  # elsewhere looking at it would be waiting
        low, high = torch.aminmax(values)
        if max(-float(low), float(high)) <= torch.finfo(dtype).max:
            return torch.zeros(())
    values = values.to(torch.float32)
    bad = values.isfinite() & ~values.to(dtype).to(torch.float32).isfinite()
    return torch.where(bad, values.abs(), 0).reshape(-1).amax() if bad.numel() else values.sum()


def wider(magnitude: float) -> str:
    """Which dtypes hold a value that float16 does not, for messages."""
    return "bf16 or fp32" if magnitude <= torch.finfo(torch.bfloat16).max else "fp32"


def check_rounding(values: Tensor, dtype: torch.dtype, what: str, mend: str = _MEND) -> None:
    """Check that values that are finite still are in another dtype.

    Args:
        values: of any dtype.
        dtype: the other.
        what: how the message calls them.
        mend: what to do, up to the dtypes that hold them.

    Raises:
        BundleError: one would become infinite.
    """
    if narrows(values.dtype, dtype) and (magnitude := float(lost(values, dtype))):
        raise _too_large(what, magnitude, dtype, mend)


def rounded(
    values: Tensor, dtype: torch.dtype, what: str, mend: str = _MEND, copy: bool = True
) -> Tensor:
    """Values in another dtype; arguments and errors as of `check_rounding`.

    What is returned is the caller's own, unless `copy` is false, as the values are that already.
    """
    check_rounding(values, dtype, what, mend)
    return values.to(dtype, copy=copy)


def _sums_up(values: Tensor) -> bool:
    """Whether a sum already says that all is finite: one cheap pass, where looking at it is."""
    known = values.device.type == "cpu" and values.dtype == torch.float16
    return known and bool(torch.isfinite(values.sum()))


class Rounding:
    """Writes values into tensors of any dtype, and tells at the end which of them got lost.

    At the end, since on a GPU to look is to wait until all is done that was asked for.
    """

    def __init__(self) -> None:
        self._lost: list[tuple[str, torch.dtype, Tensor]] = []

    def write(self, name: str, target: Tensor, values: Tensor) -> None:
        """Write one tensor's values, rounded to the dtype of their place."""
        target.copy_(values)
        if narrows(values.dtype, target.dtype) and not _sums_up(target):
            self._lost.append((name, target.dtype, lost(values, target.dtype)))

    def check(self, what: str) -> None:
        """Check that all that was finite still is.

        Args:
            what: how the message calls what was written.

        Raises:
            BundleError: it is not.
        """
        magnitudes = torch.stack([m.cpu() for _, _, m in self._lost]) if self._lost else None
        if magnitudes is None or not magnitudes.any():
            return
        place = int(magnitudes.argmax())
        name, dtype, _ = self._lost[place]
        raise _too_large(f"{what}: tensor '{name}'", float(magnitudes[place]), dtype)


def _too_large(what: str, magnitude: float, dtype: torch.dtype, mend: str = _MEND) -> BundleError:
    return BundleError(
        f"{what} reaches {magnitude:.6g}, which would be infinite in "
        f"{str(dtype).removeprefix('torch.')}; {mend} {wider(magnitude)}"
    )
