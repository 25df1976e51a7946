"""SIGTERM, with which clusters announce the end: the process ends within seconds, on what has been
saved."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator

logger = logging.getLogger("hessdensity")

_GRACE = 10.0  # seconds for a save that is under way; clusters give 30 in all
_STATUS = 128 + signal.SIGTERM


@contextlib.contextmanager
def on_sigterm(finish: Callable[[], None]) -> Iterator[None]:
    """Inside, SIGTERM ends the process: ``finish`` gets some seconds, the exit status is 143.

    Python calls handlers between two of its own instructions, and a product may be minutes of
    compiled code, in which an exception would wait. But its C handler writes a byte at once, and a
    thread waits for that. (Where JAX runs in several processes it takes SIGTERM for itself, and the
    process would go on.)

    Outside of the main thread, and where the program has its own handler, nothing is changed.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if main else None
    if not main or before not in (signal.SIG_DFL, None):
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    others = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def watch() -> None:
        while byte := reader.recv(1):
            if byte[0] == signal.SIGTERM:
                last = threading.Thread(target=finish, daemon=True)
                last.start()
                last.join(_GRACE)
                logger.warning(
                    "SIGTERM: the process ends on the last saved step; the same call goes on from "
                    "there."
                )
                os._exit(_STATUS)
            elif others != -1:  # an event loop's, in a notebook
                os.write(others, byte)

    watching = threading.Thread(target=watch, daemon=True, name="hessdensity-sigterm")
    watching.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(others)
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
        writer.close()
        watching.join()
        reader.close()
