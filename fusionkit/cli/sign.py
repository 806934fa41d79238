"""`fusionkit sign`."""

import os
import sys
from getpass import getpass
from pathlib import Path

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.sign_bundle import sign_bundle
from fusionkit.bundles.signature import PASSWORD, PUBLIC_KEY
from fusionkit.cli import report
from fusionkit.cli.arguments import call
from fusionkit.errors import FusionKitError, UsageError


def run(args: list[str]) -> None:
    """Sign a bundle with a secret key of minisign."""
    call(sign, args, positional="bundle")


def sign(bundle: str, key: str, comment: str | None = None) -> None:
    """Sign a bundle with a secret key of minisign; the signature is a file in its folder.

    Args:
        bundle: the bundle's folder.
        key: the file of the secret key (`minisign -G` makes one); its password is asked for, or is
            in the environment variable FUSIONKIT_KEY_PASSWORD.
        comment: that is signed with it, in a line; by default the time.
    """
    if comment is not None and any(c != "\t" and not " " <= c < "\x7f" for c in comment):
        raise UsageError("--comment: expected one line of plain ASCII text")
    opened = Bundle(bundle, key="")
    path = sign_bundle(opened, key, password=lambda: _password(key), comment=comment)
    report.show(
        f"written: {path}\nnext: fusionkit inspect {bundle} --key PUBLIC_KEY\n"
        f"      {PUBLIC_KEY}=PUBLIC_KEY has all verbs verify the bundles that they open"
    )


def _password(key: str) -> str:
    known = os.environ.get(PASSWORD)
    if known is not None:
        return known
    if not sys.stdin.isatty():
        raise FusionKitError(
            f"{Path(key)}: this key has a password, and nobody is here to be asked; set {PASSWORD}"
        )
    return getpass(f"password of {key}: ")
