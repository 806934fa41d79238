"""All families of the sweep."""

from collections.abc import Mapping

from conformance import language, perception
from conformance.row import ModelFamily

FAMILIES: tuple[ModelFamily, ...] = (
    *language.DECODERS,
    *language.MIXTURES,
    *language.ENCODERS,
    *language.SEQ2SEQS,
    *language.STATE_SPACES,
    *perception.VISION,
    *perception.DUAL_ENCODERS,
    *perception.VISION_LANGUAGE,
    *perception.SPEECH,
    *perception.TIMM,
    *perception.DIFFUSERS,
)

_TIED = "the folder lacks the tied head, which the live model has"
_NAMES = "the folder has other names than the live model"
_FUSED = "the folder has experts one by one, the live model fused"
NOT_YET: Mapping[str, str] = {}
"""Family → why it does not pass the sweep yet."""
