"""Folders that are there whole or not at all, also after Ctrl-C, SIGTERM and a full disk."""

import errno
import glob
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from .errors import UserError
from .locks import LOCK_FILE, is_locked, open_lock


@contextmanager
def temporary_beside(out: Path) -> Iterator[Path]:
    """A folder on the file system of `out`, removed at the end whatever happens, and by the next one after a kill.

    Raises UserError if `out` exists, if the folder cannot be made, and when the disk is full.
    """
    if os.path.lexists(out):  # unlike Path.exists, it takes a name of any length
        raise _exists(out)
    _remove_leftovers(out)
    folder = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    new_parents = [parent for parent in folder.parents if not os.path.lexists(parent)]
    try:
        folder.mkdir(parents=True)
        lock = open_lock(folder)
        is_locked(lock)  # nobody else can have: it says to others that this process lives
    except OSError as error:
        _remove_empty([folder, *new_parents])
        raise UserError(f"--out {out}: {folder} cannot be made ({error.strerror}); give another place") from error
    try:
        with full_disk_explained(out):
            yield folder
    finally:
        with undisturbed():
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
            _remove_empty(new_parents)


def give_name(folder: Path, out: Path) -> None:
    """Rename a complete folder to what it shall be. Raises UserError if somebody else has made that meanwhile."""
    try:
        folder.rename(out)
    except OSError as error:
        if not os.path.lexists(out):
            raise
        raise _exists(out) from error


def _exists(out: Path) -> UserError:
    return UserError(f"--out {out} exists already; nothing is overwritten: give a new folder, or remove that one")


def _remove_leftovers(out: Path) -> None:
    """Remove what killed processes have left of `temporary_beside(out)`: its lock is free, and its process gone.

    The process of one that was made a moment ago may not have come to lock it; locks tell of other machines.
    """
    for folder in out.parent.glob(f"{glob.escape(out.name)}.tmp-*"):
        process = folder.name.rpartition("-")[2]
        is_left = process == str(os.getpid()) or not Path("/proc", process).exists()
        if process.isdecimal() and is_left and (folder / LOCK_FILE).is_file():
            with suppress(OSError):  # another user's, or just now removed
                lock = open_lock(folder)
                if is_locked(lock):
                    shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


@contextmanager
def full_disk_explained(out: Path) -> Iterator[None]:
    """Raise UserError in place of whatever a library makes of a full disk."""
    try:
        yield
    except Exception as error:
        if any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
            raise UserError(
                f"--out {out}: the disk is full; sorting needs several times the size of the log beside the output: "
                "free some, or give another place"
            ) from error
        raise


def run_until_signalled(work: Callable[[], None], *, left: Callable[[], str]) -> int:
    """Do the work; the exit status.

    Ctrl-C, and SIGTERM as job schedulers and `kill` send it, end it cleaned up, with 128 + the signal's number and one
    line that says what is `left`.
    """
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    # Shells start background jobs with Ctrl-C ignored: it is meant for others.
    heeded = [each for each in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(each) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heeded}
    try:
        work()
    except KeyboardInterrupt:
        number = signal.Signals(received[0] if received else signal.SIGINT)
        print(f"stopped by {number.name}: {left()}", file=sys.stderr, flush=True)
        return 128 + number
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C, if they come meanwhile, take effect at the end: for tidying up."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's affair
        return
    received: list[tuple[int, FrameType | None]] = []
    before = {
        number: signal.signal(number, lambda number, frame: received.append((number, frame)))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for came, frame in received[:1]:
            handler = before[signal.Signals(came)]
            if callable(handler):
                handler(came, frame)
            elif handler == signal.SIG_DFL:
                os.kill(os.getpid(), came)


@contextmanager
def waking(wake: Callable[[], None]) -> Iterator[None]:
    """Call `wake`, in a thread, when SIGTERM or Ctrl-C comes.

    Also where the main thread is in DuckDB, which waits for its own threads and does not always look at signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's affair
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)

    def watch() -> None:
        while number := receiver.recv(1):  # empty when the sender is closed
            if number[0] in (signal.SIGTERM, signal.SIGINT):
                wake()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        sender.close()
        watcher.join()
        receiver.close()


def what_is_left(out: Path) -> str:
    """What a stopped `temporary_beside` has made of `out`."""
    if os.path.lexists(out):
        return f"{out} is complete"
    remains = [str(path) for path in out.parent.glob(f"{glob.escape(out.name)}.tmp-{os.getpid()}")]
    return f"{out} was not made, and {f'{remains[0]} is to be removed' if remains else 'nothing is left half-written'}"


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` all files below a folder, and the folders."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def _remove_empty(folders: list[Path]) -> None:
    """Remove what is empty, innermost first; a folder that holds the complete output stays."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
