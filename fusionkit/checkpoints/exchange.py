"""Two folders change names in one step, where the system can: nobody sees a moment without one."""

import ctypes
import errno
import os
from pathlib import Path

_HERE = -100
"""Of `renameat2`: paths are as the process sees them."""
_SWAP = 2
_UNABLE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


def exchange(one: Path, other: Path) -> bool:
    """Give each the other's name.

    Args:
        one: a file or folder that is there.
        other: likewise, on the same file system.

    Returns:
        False: the system, or the file system, can't, and nothing was done.

    Raises:
        OSError: it may not be done.
    """
    library = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(one), os.fsencode(other)
    if hasattr(library, "renameat2"):
        failed = library.renameat2(_HERE, paths[0], _HERE, paths[1], _SWAP)
    elif hasattr(library, "renamex_np"):  # macOS
        failed = library.renamex_np(*paths, _SWAP)
    else:
        return False
    if failed:
        number = ctypes.get_errno()
        if number in _UNABLE:
            return False
        raise OSError(number, os.strerror(number), str(one), None, str(other))
    return True
