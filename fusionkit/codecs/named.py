"""A codec by its id or its class's name, as calls in Python may have it."""

from inspect import signature
from typing import Any

from fusionkit import registry
from fusionkit.codecs.base import DeltaCodec
from fusionkit.errors import CodecError, meant


def codec_of(codec: DeltaCodec | type[DeltaCodec] | str, **settings: Any) -> DeltaCodec:
    """A codec with its settings.

    Args:
        codec: the id that it is registered under (`svd`), its class's name (`SVD`) or class; or a
            codec, which has its settings already.
        settings: its own, by name.

    Raises:
        PluginError: no such codec is installed.
        CodecError: it is no codec, has no such setting, or can't have the value.
    """
    if isinstance(codec, str):
        found: Any = registry.named(DeltaCodec.group, codec)
        codec = found
    if not (isinstance(codec, type) and issubclass(codec, DeltaCodec)):
        if not isinstance(codec, DeltaCodec):
            raise CodecError(f"expected a DeltaCodec, got {codec!r}; its id or class will do, too")
        if settings:
            raise CodecError(
                f"{', '.join(settings)}: is no argument, and {codec!r} has its settings already; "
                "settings go with a codec's name or class"
            )
        return codec
    known = list(signature(codec).parameters)
    if unknown := [name for name in settings if name not in known]:
        hint = meant(unknown[0], known) or ";"
        raise CodecError(
            f"{codec.__name__} has no setting '{unknown[0]}'{hint} it has {', '.join(known)}"
        )
    try:
        return codec(**settings)
    except TypeError as error:
        raise CodecError(f"{codec.__name__} can't be made so: {error}") from error
