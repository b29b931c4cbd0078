"""Folders that one process at a time may work in, on whichever machines of a shared file system."""

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path

LOCK_FILE = ".lock"


def open_lock(folder: Path) -> int:
    """A descriptor by which `is_locked` locks a folder: of an empty file in it, that stays.

    Linux's NFS client keeps locks of folders to itself, so that two machines would both get in, and wants a file that
    is locked exclusively to be open for writing. Where there is no room for the file, the folder itself has to do.

    Raises:
        OSError: the file cannot be made, or not be opened.
    """
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        return os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # another user's file
        # Whoever may write in the folder may lock it, whatever the umask of the first.
        os.fchmod(descriptor, folder.stat().st_mode & 0o666)
    return descriptor


def is_locked(descriptor: int) -> bool:
    """Lock the folder, unless somebody else has; closing the descriptor frees it, and so does the end of the process.

    File systems without locks do without.
    """
    with suppress(OSError):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
