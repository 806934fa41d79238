"""A bundle's signature: minisign's, over its manifest, whose digests bind every other file.

Signatures and keys are those of minisign (https://jedisct1.github.io/minisign), read and made by
its library for Python: whatever either has signed, the other verifies.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fusionkit.bundles.format import MANIFEST
from fusionkit.bundles.hub import fetched
from fusionkit.checkpoints.paths import open_path
from fusionkit.errors import BundleError, FusionKitError, SignatureError, of_extra

SIGNATURE = MANIFEST + ".minisig"
PUBLIC_KEY = "FUSIONKIT_PUBLIC_KEY"
"""The environment variable of the key by which all bundles are verified that others made."""
PASSWORD = "FUSIONKIT_KEY_PASSWORD"  # noqa: S105
"""The environment variable of a secret key's password."""
_LONGEST = 4096
"""Bytes of a key, or a signature: two or four lines."""


class UnsignedWarning(UserWarning):
    """A bundle was signed, and what it says now is not."""


def key_of(key: str | Path | None) -> str | Path | None:
    """The key to verify a bundle by: one that is given, or that of the environment; None: none."""
    return os.environ.get(PUBLIC_KEY, "") or None if key is None else key or None


def verify(content: bytes, signature: Path, key: str | Path) -> None:
    """Verify what a manifest says, before anything of it is used.

    Args:
        content: the manifest's, as it was read.
        signature: the file beside it.
        key: minisign's public key: a text (`RWQ…`), or its file.

    Raises:
        SignatureError: it is not signed, by another key, or was changed since.
        FusionKitError: the key can't be read.
        MissingExtraError: what verifies is not installed.
    """
    minisign = _minisign()
    public = _public(minisign, key)
    with suppress(BundleError):
        signature = fetched(signature)
    try:
        said = signature.read_bytes()
    except OSError as error:
        raise SignatureError(
            f"{signature.parent}: is not signed (it has no {SIGNATURE}), and is to be verified by "
            f"{_named(key)}; get the signature from whoever made the bundle, or open it without a "
            f"key, if you trust it (--key '', and no {PUBLIC_KEY})"
        ) from error
    try:
        public.verify(content, minisign.Signature.from_bytes(said[:_LONGEST]))
    except ValueError as error:
        raise SignatureError(
            f"{signature}: is no signature of this {MANIFEST} by {_named(key)} ({error}): it was "
            "changed after it was signed, or signed by somebody else; get the bundle again from "
            f"whoever made it, or, if you changed it, sign it again: fusionkit sign "
            f"{signature.parent} --key SECRET_KEY"
        ) from error


def signed(content: bytes, key: str | Path, password: Callable[[], str], comment: str) -> bytes:
    """A signature's file.

    Args:
        content: of the manifest.
        key: the file of minisign's secret key.
        password: asked for, if the key is encrypted.
        comment: that is signed with it.

    Raises:
        FusionKitError: the key can't be read, or the password is wrong.
        MissingExtraError: what signs is not installed.
    """
    minisign, path = _minisign(), open_path(key)
    try:
        with minisign.SecretKey.from_bytes(_read(path)) as secret:
            if secret.is_encrypted():
                secret.decrypt(password())
            made = secret.sign(
                content,
                untrusted_comment="signature of a FusionKit bundle's manifest",
                trusted_comment=comment,
            )
    except ValueError as error:
        raise FusionKitError(
            f"{path}: can't be signed with ({error}); give the file of a secret key of minisign "
            f"(`minisign -G` makes one) and its password ({PASSWORD})"
        ) from error
    return bytes(made) + b"\n"


def _public(minisign: Any, key: str | Path) -> Any:
    try:
        if isinstance(key, str) and key.startswith("RW") and len(key) == 56:
            return minisign.PublicKey.from_base64(key)
        return minisign.PublicKey.from_bytes(_read(open_path(key)))
    except ValueError as error:
        raise FusionKitError(
            f"{_named(key)}: is no public key of minisign ({error}); give its text, RW…, or its "
            f"file, minisign.pub, as the key (--key, {PUBLIC_KEY})"
        ) from error


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_LONGEST)
    except OSError as error:
        raise FusionKitError(f"{path}: this key can't be read ({error.strerror})") from error


def _named(key: str | Path) -> str:
    return f"the key {key}"


def _minisign() -> Any:
    return of_extra("minisign", "sign", "a bundle's signature")
