"""The steps of a computation: first those on disk, then new ones, which are saved.

A computation is a function of its arguments and of its operator's products. So only the steps are
saved. A resumed run makes the decisions of the first run again, from the same numbers, and skips
the products that are on disk.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hessdensity.errors import LostProcessError
from hessdensity.krylov.engine import Step
from hessdensity.operators.protocol import Operator, describe
from hessdensity.vectors import trees
from hessdensity.vectors.fingerprint import signature

from .store import StepStore

FORMAT = 3
"""The version of the contents of a step. A run cannot be resumed from steps of another version."""

_CLOSE = 1e-4
"""The largest difference of equal numbers, relative to their mean size.

Another example changes the loss of a batch by more, and another number of devices by far less.
"""


def versions() -> dict[str, str]:
    """The versions that a result records."""
    return {package: version(package) for package in ("hessdensity", "jax", "numpy")}


class SavedSteps:
    """The steps of one computation. Without a checkpoint, all of them are new.

    Args:
      checkpoint: the folder, or None.
      operator: the operator whose products the steps come from.
      settings: everything else that the steps depend on, in types that JSON can hold.
      least_vectors: the smallest number of vectors that a product of the operator takes.

    Raises:
      ValueError: the folder is not a checkpoint, or it belongs to another computation. The message
        names the difference.
    """

    def __init__(
        self,
        checkpoint: str | Path | None,
        operator: Operator,
        settings: dict[str, Any],
        least_vectors: int = 1,
    ) -> None:
        self._path = checkpoint
        self._operator = operator
        self._like = operator.like
        self._least_vectors = least_vectors
        self._store = None if checkpoint is None else StepStore(checkpoint)
        self._settings = plain({**settings, "vectors": signature(self._like)})
        self.decisions: dict[str, Any] = {}
        """Choices that depended on the machine (free memory). A resumed run repeats them."""
        self._saved: dict[str, Any] | None = None
        self._unchecked = False
        self._next = 0
        self._before = 0.0
        self._began = time.perf_counter()
        if self._store is not None:
            self._agree(self._store.length)
        if self._store is not None and self._store.length:
            self._open(self._store.scalars(0)["about"])

    def _open(self, saved: dict[str, Any]) -> None:
        """Check that the first step on disk belongs to this computation."""
        if saved.get("format") != FORMAT:
            raise ValueError(
                f"checkpoint={str(self._path)!r} was written by hessdensity "
                f"{saved['versions']['hessdensity']} in version {saved.get('format', 1)} of the "
                f"format, and this hessdensity can only continue version {FORMAT}. Finish the run "
                "with the hessdensity that began it, or give another folder."
            )
        self._saved = saved
        self._unchecked = True
        self.decisions = saved["decisions"]
        # The mode of differentiation is not known yet. An operator finds it in its first product.
        known = plain(describe(self._operator))
        known.pop("mode", None)
        self._compare({"settings": self._settings, "operator": known})

    @property
    def seconds(self) -> float:
        """The time that the computation has taken, in this process and in earlier ones."""
        return self._before + time.perf_counter() - self._began

    def describe(self) -> dict[str, Any]:
        """The operator's description, completed by the facts about its data in the checkpoint."""
        return {**(self._saved["operator"] if self._saved else {}), **describe(self._operator)}

    def take(self) -> tuple[Step, int] | None:
        """The next step and its number of products, or None if it is not on disk."""
        if self._store is None or self._next >= self._store.length:
            return None
        scalars = self._store.scalars(self._next)
        vectors = None
        if count := scalars["num_vectors"]:
            block = trees.abstract_block(self._like, count)
            vectors = self._store.vectors(self._next, block)
        self._next += 1
        self._before = scalars["seconds"]
        self._began = time.perf_counter()
        return Step(vectors, scalars["step"]), scalars["num_products"]

    def add(self, step: Step, num_products: int) -> None:
        """Save one more step, which has just been done.

        Raises:
          ValueError: the data are not those of the checkpoint.
          RuntimeError: the data are shuffled, or the checkpoint cannot be written.
        """
        if self._store is None:
            return
        about = plain(describe(self._operator))
        if about.get("shuffled"):
            raise RuntimeError(
                f"checkpoint={str(self._path)!r}: the data come in another order in every pass, so "
                "that a resumed run could not tell whether they are the same. Pass shuffle=False "
                "to the loader, or leave checkpoint out."
            )
        if self._unchecked:
            self._compare({"operator": about})
            self._unchecked = False
        scalars: dict[str, Any] = {
            "step": step.scalars,
            "seconds": self.seconds,
            "num_vectors": 0 if step.vectors is None else trees.count(step.vectors),
            "num_products": num_products,
        }
        if not self._next:
            scalars["about"] = {
                "format": FORMAT,
                "settings": self._settings,
                "decisions": plain(self.decisions),
                "operator": about,
                "versions": versions(),
            }
        self._store.append(step.vectors, scalars)
        self._next += 1

    def check_data(self) -> None:
        """Refuse other data if all steps were on disk, so that no product has checked the data.

        Cost: a product, unless the operator describes its data before any product.
        """
        if not self._unchecked or self._saved is None:
            return
        if set(self._saved["operator"]) <= set(describe(self._operator)):
            return
        jax.block_until_ready(self._operator @ trees.zeros(self._like, self._least_vectors))
        self._compare({"operator": plain(describe(self._operator))})
        self._unchecked = False

    def finish(self) -> None:
        """Wait until all steps are on disk."""
        if self._store is not None:
            self._store.finish()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Wait at the end of the context until all steps are on disk."""
        if self._store is None:
            yield
            return
        try:
            yield
        except LostProcessError:
            raise  # without the lost process, the last steps cannot be written
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the first error must remain visible
                self._store.close()
            raise
        self._store.close()

    def _agree(self, length: int) -> None:
        """Refuse a folder in which processes see different steps. They would wait forever."""
        if jax.process_count() == 1:
            return
        from jax.experimental.multihost_utils import process_allgather

        lengths = np.asarray(process_allgather(np.array(length, np.int32))).ravel().tolist()
        if len(set(lengths)) > 1:
            raise ValueError(
                f"checkpoint={str(self._path)!r}: the processes see {lengths} steps there; "
                "expected the same folder, on a file system that all of them share."
            )

    def _compare(self, now: dict[str, Any]) -> None:
        assert self._saved is not None
        found: list[str] = []
        for part, values in now.items():
            found += differences(self._saved[part], values, f"{part}.")
        if found:
            raise ValueError(
                f"checkpoint={str(self._path)!r} belongs to another computation: "
                f"{'; '.join(found)}. Call with the arguments that it was made with, or give "
                "another folder."
            )


def plain(value: dict[str, Any]) -> dict[str, Any]:
    """The value after it was written to JSON and read back."""

    def convert(other: Any) -> Any:
        return other.item() if isinstance(other, np.generic) else str(other)

    result: dict[str, Any] = json.loads(json.dumps(value, default=convert))
    return result


def differences(saved: Any, now: Any, name: str) -> list[str]:
    """The differences of two plain values. Entries that only one dictionary has do not count."""
    if isinstance(saved, dict) and isinstance(now, dict):
        found: list[str] = []
        for key in saved:
            if key in now:
                found += differences(saved[key], now[key], f"{name}{key}.")
        return found
    name = name.rstrip(".")
    if _are_numbers(saved) and _are_numbers(now):
        if len(saved) != len(now):
            return [f"{name} had {len(saved)} entries, now {len(now)}"]
        was = np.asarray(saved, float)
        are = np.asarray(now, float)
        close = np.isclose(was, are, rtol=0, atol=_CLOSE * np.abs(was).mean(), equal_nan=True)
        if close.all():
            return []
        first = int(np.argmin(close))
        return [f"{name}[{first}] was {was[first]:.9g}, is {are[first]:.9g}"]
    if isinstance(saved, float) and isinstance(now, float):
        same = bool(np.isclose(saved, now, rtol=_CLOSE, equal_nan=True))
        return [] if same else [f"{name} was {saved:.9g}, is {now:.9g}"]
    return [] if saved == now else [f"{name} was {saved!r}, is {now!r}"]


def _are_numbers(values: Any) -> bool:
    is_list = isinstance(values, list) and bool(values)
    return is_list and all(isinstance(value, float) for value in values)
