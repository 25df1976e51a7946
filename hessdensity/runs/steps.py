"""Going on where a killed run stopped: what was done is taken from the checkpoint, what is done
next is added to it.

A computation is a function of its arguments and of its operator's products. So nothing but the
steps is saved: a resumed run makes the decisions of the first one again, from the same numbers, and
skips the products that are on disk."""

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

from hessdensity.operators.protocol import Operator, describe
from hessdensity.vectors import trees as _trees
from hessdensity.vectors.fingerprint import signature

from .failures import LostProcessError
from .store import Journal
from .termination import on_sigterm

PyTree = Any

_CLOSE = 1e-4  # of the mean size: another example moves a batch's loss by more, another number of devices by far less


class Steps:
    """The steps of a computation: those on disk first, then new ones. Without a checkpoint there
    are only new ones.

    Args:
      checkpoint: the folder, or None.
      operator: whose products they are.
      settings: what else they depend on, as JSON takes it.

    Raises:
      ValueError: the folder is no checkpoint, or that of another computation; names what differs.
    """

    def __init__(
        self, checkpoint: str | Path | None, operator: Operator, settings: dict[str, Any]
    ) -> None:
        self._path, self._operator = checkpoint, operator
        self._journal = None if checkpoint is None else Journal(checkpoint)
        self._settings = _plain({**settings, "vectors": signature(operator.like)})
        self.decisions: dict[str, Any] = {}
        """What circumstances decide, such as the memory that was free: those of the first process,
        to be kept to."""
        self._saved: dict[str, Any] | None = None
        self._unchecked = False
        self._next, self._before, self._began = 0, 0.0, time.perf_counter()
        if self._journal is not None:
            self._agree(self._journal.length)
        if self._journal is not None and self._journal.length:
            self._saved = self._journal.scalars(0)["about"]
            self.decisions = self._saved["decisions"]
            self._unchecked = True
            # Which mode it differentiates in, an operator finds out in its first product.
            known = {
                name: value for name, value in _plain(describe(operator)).items() if name != "mode"
            }
            self._compare({"settings": self._settings, "operator": known})

    @property
    def seconds(self) -> float:
        """What the computation has taken, in this process and in those before."""
        return self._before + time.perf_counter() - self._began

    @property
    def on_disk(self) -> bool:
        """Whether the next step is there already."""
        return self._journal is not None and self._next < self._journal.length

    def describe(self) -> dict[str, Any]:
        """The operator's description, with what the checkpoint knows of it: its data, though no
        product was done."""
        return {**(self._saved["operator"] if self._saved else {}), **describe(self._operator)}

    def peek(self) -> dict[str, Any] | None:
        """The scalars of the next step, if it is on disk."""
        return (
            self._journal.scalars(self._next)
            if self._journal is not None and self.on_disk
            else None
        )

    def take(self) -> tuple[PyTree, dict[str, Any]] | None:
        """The next step, if it is on disk: its block of vectors, or None if it had none, and its
        scalars."""
        scalars = self.peek()
        if self._journal is None or scalars is None:
            return None
        vectors, count = None, scalars["num_vectors"]
        if count:
            vectors = self._journal.vectors(
                self._next, _trees.abstract_block(self._operator.like, count)
            )
        self._next += 1
        self._before, self._began = scalars["seconds"], time.perf_counter()
        return vectors, scalars

    def add(self, vectors: PyTree, scalars: dict[str, Any]) -> None:
        """One more step, done just now: a block of vectors, or None, and what JSON takes.

        Raises:
          ValueError: the data are not those of the checkpoint.
          RuntimeError: the data are shuffled, or the checkpoint cannot be written.
        """
        if self._journal is None:
            return
        about = _plain(describe(self._operator))
        if about.get("shuffled"):
            raise RuntimeError(
                f"checkpoint={str(self._path)!r}: the data come in another order in every pass, so "
                "that a resumed run could not tell whether they are the same. Pass shuffle=False "
                "to the loader, or give no checkpoint."
            )
        if self._unchecked:
            self._compare({"operator": about})
            self._unchecked = False
        count = 0 if vectors is None else jax.tree.leaves(vectors)[0].shape[0]
        more: dict[str, Any] = {"seconds": self.seconds, "num_vectors": count}
        if not self._next:
            versions = {package: version(package) for package in ("hessdensity", "jax", "numpy")}
            more["about"] = {
                "settings": self._settings,
                "decisions": _plain(self.decisions),
                "operator": about,
                "versions": versions,
            }
        self._journal.append(vectors, {**scalars, **more})
        self._next += 1

    def check_data(self) -> None:
        """Refuse other data where all steps were on disk, so that no product has met them.

        Cost: a product, if there is one to be done: an operator that tells of its data all along
        needs none."""
        if (
            not self._unchecked
            or self._saved is None
            or set(self._saved["operator"]) <= set(describe(self._operator))
        ):
            return
        jax.block_until_ready(self._operator @ _trees.zeros(self._operator.like, 1))
        self._compare({"operator": _plain(describe(self._operator))})
        self._unchecked = False

    def finish(self) -> None:
        """Wait until all steps are on disk."""
        if self._journal is not None:
            self._journal.finish()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, SIGTERM ends the process on the last step; at the end all steps are on disk."""
        if self._journal is None:
            yield
            return
        with on_sigterm(self.finish):
            try:
                yield
            except LostProcessError:
                raise  # what is under way to the disk cannot be finished without the lost one
            except BaseException:
                with contextlib.suppress(RuntimeError):  # what went wrong first is to be seen
                    self._journal.close()
                raise
            self._journal.close()

    def _agree(self, length: int) -> None:
        """Refuse a folder of which the processes see different steps: one would wait for the other
        for ever."""
        if jax.process_count() == 1:
            return
        from jax.experimental.multihost_utils import process_allgather

        lengths = np.asarray(process_allgather(np.array(length, np.int32))).ravel().tolist()
        if len(set(lengths)) > 1:
            raise ValueError(
                f"checkpoint={str(self._path)!r}: the processes see {lengths} steps there; "
                "expected one folder, on a file system that all of them share."
            )

    def _compare(self, now: dict[str, Any]) -> None:
        assert self._saved is not None
        differences = [
            each
            for part, values in now.items()
            for each in _differences(self._saved[part], values, f"{part}.")
        ]
        if differences:
            raise ValueError(
                f"checkpoint={str(self._path)!r} is another computation's: "
                f"{'; '.join(differences)}. Call with what it was made with, or give another "
                "folder."
            )


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""

    def convert(other: Any) -> Any:
        return other.item() if isinstance(other, np.generic) else str(other)

    plain: dict[str, Any] = json.loads(json.dumps(value, default=convert))
    return plain


def _differences(saved: Any, now: Any, name: str) -> list[str]:
    """Where two plain values differ, in words; entries that only one of two dictionaries has do not
    count."""
    if isinstance(saved, dict) and isinstance(now, dict):
        common = [key for key in saved if key in now]
        return [
            each for key in common for each in _differences(saved[key], now[key], f"{name}{key}.")
        ]
    name = name.rstrip(".")
    if (
        isinstance(saved, list)
        and isinstance(now, list)
        and _are_numbers(saved)
        and _are_numbers(now)
    ):
        if len(saved) != len(now):
            return [f"{name} had {len(saved)} entries, now {len(now)}"]
        was, are = np.asarray(saved, float), np.asarray(now, float)
        far = np.flatnonzero(
            ~np.isclose(was, are, rtol=0, atol=_CLOSE * np.abs(was).mean(), equal_nan=True)
        )
        return [f"{name}[{far[0]}] was {was[far[0]]:.9g}, is {are[far[0]]:.9g}"] if far.size else []
    if isinstance(saved, float) and isinstance(now, float):
        return (
            []
            if np.isclose(saved, now, rtol=_CLOSE, equal_nan=True)
            else [f"{name} was {saved:.9g}, is {now:.9g}"]
        )
    return [] if saved == now else [f"{name} was {saved!r}, is {now!r}"]


def _are_numbers(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, float) for value in values)
