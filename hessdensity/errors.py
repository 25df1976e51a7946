"""The public exceptions. Invalid arguments raise ``ValueError`` or ``TypeError``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class NonFiniteProductError(FloatingPointError):
    """A product with the operator contains a NaN or an infinity."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"Step {step}: {reason}")
        self.step = step
        """The step in which it happened, counted from 0."""
        self.partial: Any = None
        """The result of the steps before it, or None if there was no result yet."""


class LostProcessError(RuntimeError):
    """Another process died, stalled or failed, so work that needs all processes cannot finish."""


class RunTerminated(SystemExit):  # not ...Error: it ends the program, as SystemExit does
    """SIGTERM arrived during a run. Unless this is caught, the program ends with status 143.

    The steps done so far are in the checkpoint, if there is one. `partial` is their result.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(128 + 15)
        self.reason = reason
        """Why the program ends, and whether the same call resumes the run."""
        self.partial: Any = None
        """The result of the steps done so far, or None if there was no result yet."""

    def __str__(self) -> str:
        return self.reason


@contextlib.contextmanager
def needs_extra(extra: str, purpose: str) -> Iterator[None]:
    """Inside, a package that is not installed is answered with the ``pip install`` line."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{purpose} needs the package {error.name!r}, which is not installed. Install it with: "
            f"pip install 'hessdensity[{extra}]'",
            name=error.name,
        ) from error


NOT_FINITE = "the operator's product is not finite. Look for overflow, or for log(0) and 0/0."
