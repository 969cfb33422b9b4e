"""Opening files whose name or folder came from somebody else."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_plain(path: Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading.

    Anything else that a name can stand for is refused: reading a pipe waits for a writer that
    may never come, and a device may have no end. Raises OSError.
    """
    # O_NONBLOCK: opening a pipe would already wait. It means nothing to a regular file.
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "not a plain file", str(path))
