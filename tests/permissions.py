"""Files that the user may not read, for tests that root runs too."""

import os
from contextlib import contextmanager

NOBODY = 65534


@contextmanager
def unreadable(path):
    """Take a file's permissions away, and root's privileges."""
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)
        path.chmod(0o700)
