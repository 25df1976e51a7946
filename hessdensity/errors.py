"""The public exceptions. Invalid arguments raise ``ValueError`` and ``TypeError``."""

from __future__ import annotations

from typing import Any


class NonFiniteProductError(FloatingPointError):
    """A product of the operator holds a NaN or an infinity."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"Step {step}: {reason}")
        self.step = step
        """The step in which it happened, counted from 0."""
        self.partial: Any = None
        """The answer that the steps before it give, or None where there was none."""


class LostProcessError(RuntimeError):
    """Another process has died, stalled or failed. What needs all processes cannot be finished."""


class RunTerminated(SystemExit):  # noqa: N818 (it ends the program, as SystemExit does)
    """SIGTERM has arrived during a run: unless it is caught, the program ends with status 143.

    The steps done so far are in the checkpoint, if there is one, and `partial` is the answer that
    they give.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(128 + 15)
        self.reason = reason
        self.partial: Any = None
        """The answer that the steps before it give, or None where there was none."""

    def __str__(self) -> str:
        return self.reason


NOT_FINITE = "the operator's product is not finite. Look for overflow, or for log(0) and 0/0."
