"""Events that end a run early: exhausted memory, a lost process, SIGTERM and Ctrl-C."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from hessdensity.errors import LostProcessError, RunTerminated

logger = logging.getLogger("hessdensity")

# Words in JAX's own errors that say that another process is lost.
_LOST = ("gloo", "nccl", "connection", "coordination service", "heartbeat", "unavailable")


@contextlib.contextmanager
def explained(table: Callable[[], str], checkpoint: str | Path | None) -> Iterator[None]:
    """Explain exhausted memory or a lost process, if one of them ends the context.

    Args:
      table: returns the plan of the run, as text.
      checkpoint: the folder that the run can be resumed from, if there is one.

    Raises:
      MemoryError: replaces XLA's own error, and shows the plan.
      LostProcessError: replaces an error of communication.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in first:
            # Not "from error", because the trace of XLA's allocator would hide the table.
            raise MemoryError(f"out of memory ({first}).\n\n{table()}") from None
        if jax.process_count() == 1 or not any(word in str(error).lower() for word in _LOST):
            raise
        saved = ""
        if checkpoint:
            saved = f" The steps so far are in checkpoint={str(checkpoint)!r}."
        message = (
            f"process {jax.process_index()} of {jax.process_count()} lost contact with another "
            f"one, which has died, stalled or failed ({first}).{saved} Look at the messages of the "
            "other processes, and start all of them again."
        )
        # Logged immediately, because JAX may end this process before the exception is seen.
        logger.error(message)
        raise LostProcessError(message) from error


@contextlib.contextmanager
def terminable(checkpoint: str | Path | None) -> Iterator[None]:
    """Raise `RunTerminated` at SIGTERM inside the context, which ends the program after a step.

    Clusters announce the end with SIGTERM and kill the process about 30 seconds later. Python calls
    handlers between two of its own instructions. A pass over the data has many of these, but a
    product that is one compiled program is not interrupted. If the process is killed during such a
    product, the product is lost, like any unfinished product. The steps before it are on disk, each
    of them whole, with or without this handler.

    Outside of the main thread, and if the program has its own handler, nothing changes.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if main else None
    if not main or before not in (signal.SIG_DFL, None):
        yield
        return
    reason = "SIGTERM: the process ends after the last finished step"
    if checkpoint:
        reason += "; the same call resumes the run from there"

    def terminate(number: int, frame: Any) -> None:
        logger.warning(reason)
        raise RunTerminated(reason)

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM inside the context, so that no step is left half done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[tuple[int, Any]] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    # Only handlers written in Python are replaced. A default handler needs no help, and a handler
    # that another library has installed below Python could not be restored.
    before = {number: signal.getsignal(number) for number in numbers}
    held = {number: handler for number, handler in before.items() if callable(handler)}
    for number in held:
        signal.signal(number, lambda number, frame: waiting.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        # SIGTERM first: it ends the program, and a Ctrl-C may not.
        for which, frame in sorted(waiting, key=lambda each: each[0] != signal.SIGTERM)[:1]:
            held[signal.Signals(which)](which, frame)
