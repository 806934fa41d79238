"""Sign a bundle that is on the local disk."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.changing import changing
from fusionkit.bundles.format import MANIFEST
from fusionkit.bundles.signature import SIGNATURE, signed


def sign_bundle(
    bundle: Bundle,
    key: str | Path,
    *,
    password: str | Callable[[], str] = "",
    comment: str | None = None,
) -> Path:
    """Sign a bundle with a secret key of minisign.

    What is signed is the manifest, which holds the digests of all other files. Whoever opens the
    bundle with the public key, `Bundle(path, key="RWQ…")`, is refused a bundle that is not the one
    that was signed. Adding tasks, removing or calibrating them, takes the signature away.

    Args:
        bundle: the bundle, on the local disk.
        key: the file of the secret key.
        password: of the key; or what asks for it, called only if there is one.
        comment: that is signed with it, in a line; by default the time.

    Returns:
        the signature's file, `manifest.json.minisig` in the bundle's folder.

    Raises:
        FusionKitError: the key can't be read, or the password is wrong.
        BundleError: a file of the bundle is missing; or as of `add_tasks`.
        MissingExtraError: `pip install 'fusionkit[sign]'` is what it takes.
    """
    bundle.check_writable()
    found = Bundle(bundle.path, key="")  # as it lies there, not as it was
    for task in found.tasks:
        next(found.task_names(task), None)  # its header is the one that the manifest names
    said = comment or f"timestamp:{int(time.time())}\tfile:{MANIFEST}\thashed"
    ask = (lambda: password) if isinstance(password, str) else password
    with changing(bundle.path, bundle.manifest) as folder:
        content = (bundle.path / MANIFEST).read_bytes()
        (folder / SIGNATURE).write_bytes(signed(content, key, ask, said))
        os.replace(folder / SIGNATURE, bundle.path / SIGNATURE)
    return bundle.path / SIGNATURE
