"""What goes wrong on devices and between processes, in words that say what to do."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

logger = logging.getLogger("hessdensity")

_LOST = (
    "gloo",
    "nccl",
    "connection",
    "coordination service",
    "heartbeat",
    "unavailable",
)  # words of JAX's own errors


class LostProcessError(RuntimeError):
    """Another process has died, stalled or failed: what needs them all cannot be finished."""


@contextlib.contextmanager
def explained(table: Callable[[], str], checkpoint: str | Path | None) -> Iterator[None]:
    """Inside, an exhausted memory and a lost process are told as such.

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
        again = (
            f"the steps up to now are in checkpoint={str(checkpoint)!r}: start"
            if checkpoint
            else "start"
        )
        words = (
            f"process {jax.process_index()} of {jax.process_count()} lost touch with another one, "
            f"which has died, stalled or failed ({first}). Look at the others' messages; {again} "
            "all processes again."
        )
        # Said at once: JAX may end this process before the exception is seen.
        logger.error(words)
        raise LostProcessError(words) from error
