"""All families of the sweep."""

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
