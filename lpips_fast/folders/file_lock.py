"""A lock on an open file, which ends with its process however that ends."""

from __future__ import annotations

import os
import sys

__all__ = ["lock_file"]

if sys.platform == "win32":
    import msvcrt

    def lock_file(descriptor: int) -> None:
        """Take the lock, or raise the OSError of one that another has."""
        # One byte far behind the end: Windows would keep readers from a byte that is locked.
        os.lseek(descriptor, 1 << 40, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)

else:
    import fcntl

    def lock_file(descriptor: int) -> None:
        """Take the lock, or raise the OSError of one that another has."""
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
