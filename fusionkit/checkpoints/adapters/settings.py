"""What is read of PEFT's config of an adapter: the types of its settings, patterns of modules."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from fusionkit.checkpoints.patterns import check_pattern
from fusionkit.errors import CheckpointError

_Rank = Annotated[int, Meta(gt=0, lt=1 << 31)]
_Alpha = Annotated[float, Meta(ge=-1e30, le=1e30)]
_MOST = 1 << 14


class _Settings(Struct, frozen=True):
    """The settings that are used, of whatever others there are."""

    r: _Rank = 8
    lora_alpha: _Alpha = 8
    rank_pattern: Annotated[dict[str, _Rank], Meta(max_length=_MOST)] | None = None
    alpha_pattern: Annotated[dict[str, _Alpha], Meta(max_length=_MOST)] | None = None
    target_parameters: list[str] | None = None
    feedforward_modules: str | list[str] | None = None
    use_dora: bool | None = None
    use_rslora: bool | None = None
    fan_in_fan_out: bool | None = None
    init_lora_weights: bool | str | None = None


def check_settings(config: Mapping[str, Any], label: str) -> None:
    """Check the types and ranges of the settings that are used.

    Args:
        config: PEFT's config.
        label: how messages call the adapter.

    Raises:
        CheckpointError: one is another.
    """
    try:
        msgspec.convert(dict(config), _Settings)
    except msgspec.ValidationError as error:
        raise CheckpointError(
            f"{label}: its config is malformed ({error}); save the adapter again"
        ) from error


def by_pattern(patterns: Mapping[str, Any] | None, name: str, otherwise: Any, label: str) -> Any:
    """A module's setting, as PEFT looks it up: the first pattern that its name ends with.

    Raises:
        CheckpointError: a pattern is no regular expression, or could take long.
    """
    for pattern, value in (patterns or {}).items():
        if _matches(pattern, r"(?:.*\.)?(?:", ")$", name, label):
            return value
    return otherwise


def is_feedforward(patterns: str | list[str] | None, name: str, label: str) -> bool:
    """Whether an (IA)³ module scales its inputs.

    Raises:
        CheckpointError: as of `by_pattern`.
    """
    if isinstance(patterns, str):
        return _matches(patterns, "(?:", r")\Z", name, label)
    return any(name.endswith(pattern) for pattern in patterns or [])


def _matches(pattern: str, before: str, after: str, name: str, label: str) -> bool:
    whole = f"^{before}{pattern}{after}"
    try:
        check_pattern(whole, len(name))
        return re.match(whole, name) is not None
    except (re.error, ValueError) as error:
        raise CheckpointError(
            f"{label}: the pattern '{pattern[:99]}' in its config can't be used: {error}"
        ) from error
