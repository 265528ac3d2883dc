"""What ends a command from outside: SIGTERM, and a standard output that takes no more."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from .command import CommandError

__all__ = ["flush_output", "terminable"]

# Seconds between SIGTERM and the end of the process, whatever it is doing.
_GRACE = 0.7


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """End on SIGTERM as on an error, which says what is written, with a shell's exit code.

    Python's handler runs in the main thread, and only when that comes back from torch, from a
    decoder or from waiting for other threads. So a thread waits for the signal too, which Python
    writes to a socket at once, and ends the process if it has not ended by itself after a moment.
    No result file is written through a buffer, so that nothing is lost by it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.signal(signal.SIGTERM, _end)
    fd_before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), name="lpips-fast-signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(fd_before)
        signal.signal(signal.SIGTERM, before)
        writer.close()  # which ends the thread


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _watch(reader: socket.socket) -> None:
    with reader:
        while numbers := reader.recv(64):
            if signal.SIGTERM in numbers:
                break
        else:
            return
        reader.settimeout(_GRACE)
        with contextlib.suppress(TimeoutError):
            while reader.recv(64):  # other signals; nothing: the command has ended
                pass
            # Python then waits for its threads, and one of them may be what hangs. Whoever called
            # the command line from a program of theirs goes on.
            while threading.main_thread().is_alive():
                time.sleep(_GRACE / 10)
            time.sleep(_GRACE)
        with contextlib.suppress(OSError):
            os.write(2, b"lpips-fast: note: stopped\n")
        os._exit(128 + signal.SIGTERM)


def flush_output() -> None:
    """Write what is left for standard output.

    Raises:
        BrokenPipeError: nobody reads it any more.
        CommandError: it takes no more.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        # Else Python tries again at its end, and complains.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise CommandError(f"cannot write to standard output: {error.strerror}") from error
