"""What ends a run early: an exhausted memory, a lost process, SIGTERM, Ctrl-C."""

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

# Words of JAX's own errors where another process is gone.
_LOST = ("gloo", "nccl", "connection", "coordination service", "heartbeat", "unavailable")


@contextlib.contextmanager
def explained(table: Callable[[], str], checkpoint: str | Path | None) -> Iterator[None]:
    """Inside, an exhausted memory and a lost process are explained.

    Args:
      table: what needs how much memory, as text.
      checkpoint: the folder that a run can be resumed from, if there is one.

    Raises:
      MemoryError: in place of XLA's own error, with the table.
      LostProcessError: in place of an error of communication.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in first:
            # Not "from error": the trace of XLA's allocator would hide the table.
            raise MemoryError(f"out of memory ({first}).\n\n{table()}") from None
        if jax.process_count() == 1 or not any(word in str(error).lower() for word in _LOST):
            raise
        again = "start"
        if checkpoint:
            again = f"the steps up to now are in checkpoint={str(checkpoint)!r}: start"
        message = (
            f"process {jax.process_index()} of {jax.process_count()} lost touch with another one, "
            f"which has died, stalled or failed ({first}). Look at the others' messages; {again} "
            "all processes again."
        )
        # Logged at once: JAX may end this process before the exception is seen.
        logger.error(message)
        raise LostProcessError(message) from error


@contextlib.contextmanager
def terminable(checkpoint: str | Path | None) -> Iterator[None]:
    """Inside, SIGTERM raises `RunTerminated`, with which the program ends on the last step.

    Clusters announce the end with SIGTERM and end the process some 30 seconds later. Python calls
    handlers between two of its own instructions: a pass over the data has many, but a product that
    is one compiled program is not interrupted. It is then lost, as any product is that ends in the
    middle; the steps before it are on disk, each whole, with or without this handler.

    Outside of the main thread, and where the program has its own handler, nothing is changed.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if main else None
    if not main or before not in (signal.SIG_DFL, None):
        yield
        return
    reason = "SIGTERM: the process ends on the last step done"
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
    """Inside, Ctrl-C and SIGTERM wait, so that no step is left half done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[tuple[int, Any]] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    # Only handlers written in Python: what a default handler does needs no help, and what another
    # library has installed below Python cannot be put back.
    before = {number: signal.getsignal(number) for number in numbers}
    held = {number: handler for number, handler in before.items() if callable(handler)}
    for number in held:
        signal.signal(number, lambda number, frame: waiting.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        for number, frame in waiting[:1]:
            held[number](number, frame)
