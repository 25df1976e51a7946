"""The life of one computation: replay what is on disk, multiply, save, count, and end well.

Every long computation is a `Run` that drives one or more engines. It has a checkpoint, a progress
bar, a partial answer when it is stopped, one format of description, and a plan's table when memory
runs out.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from hessdensity.errors import NonFiniteProductError, RunTerminated
from hessdensity.krylov.engine import Engine, multiply
from hessdensity.operators.protocol import Operator
from hessdensity.text import plural
from hessdensity.vectors import trees

from .failures import explained, terminable, undisturbed
from .progress import count, make_bar
from .steps import SavedSteps, versions

logger = logging.getLogger("hessdensity")

T = TypeVar("T")


class Run:
    """One computation under way.

    Args:
      computation: the name of the public call.
      operator: whose products it needs.
      settings: all that the steps depend on, as JSON takes it. They are compared when the run is
        resumed, and recorded in the description.
      table: the plan of its memory as text, for when memory runs out.
      checkpoint: the folder of its steps, or None.
      progress: whether to show a bar of products.
      total: products in all, if that is known.
      vectors_per_product: vectors of a block that together make one product with all the data.
    """

    def __init__(
        self,
        computation: str,
        operator: Operator,
        settings: Mapping[str, Any],
        *,
        table: Callable[[], str],
        checkpoint: str | Path | None = None,
        progress: bool = True,
        total: int | None = None,
        vectors_per_product: int = 1,
    ) -> None:
        self.computation, self.operator = computation, operator
        self.dimension = trees.size(operator.like)
        self.settings = {"computation": computation, **settings}
        self.steps = SavedSteps(checkpoint, operator, self.settings, vectors_per_product)
        self._vectors_per_product = vectors_per_product
        self.num_matvecs = 0
        """Products done so far, here and in earlier processes."""
        self.stopped: str | None = None
        """Why the computation ended before it was done."""
        self._checkpoint, self._table = checkpoint, table
        self.bar = make_bar(computation.replace("_", " "), total, progress)

    def drive(self, engine: Engine) -> Iterator[None]:
        """Do the steps that are left of an engine; yields after each.

        Steps on disk are replayed; then the operator is multiplied, and each new step is saved.
        """
        while not engine.complete:
            if found := self.steps.take():
                step, products = found
                engine.replay(step)
                self.count(products, read_back=True)
            else:
                block = engine.request()
                product = multiply(self.operator, block, engine.num_done)
                jax.block_until_ready(product)
                with undisturbed():
                    products = trees.count(block) // self._vectors_per_product
                    self.steps.add(engine.take(product), products)
                    self.count(products)
            yield

    def count(self, products: int, *, read_back: bool = False) -> None:
        """Count products that are done."""
        self.num_matvecs += products
        count(self.bar, products, read_back=read_back)

    def execute(self, compute: Callable[[], None], answer: Callable[[], T]) -> T:
        """``compute()`` and then ``answer()``, whatever happens in between.

        Ctrl-C gives the answer of the steps done so far, and says so. A product that is not finite
        and SIGTERM raise, with that answer as ``partial``.

        Args:
          compute: does the steps, by `drive`.
          answer: the result of the steps done so far.
        """
        with (
            contextlib.closing(self.bar),
            self.steps.kept(),
            explained(self._table, self._checkpoint),
            terminable(self._checkpoint),
        ):
            try:
                compute()
                self.steps.check_data()
            except KeyboardInterrupt:
                if not self.num_matvecs:
                    raise
                self.stop(f"interrupted after {plural(self.num_matvecs, 'product')}")
            except (NonFiniteProductError, RunTerminated) as error:
                if isinstance(error, RunTerminated):
                    self.stopped = f"terminated after {plural(self.num_matvecs, 'product')}"
                error.partial = answer() if self.num_matvecs else None
                raise
        return answer()

    def stop(self, reason: str) -> None:
        """Note why this is all there is."""
        self.stopped = reason
        logger.warning("%s: %s; the result is that of the products done.", self.computation, reason)

    def describe(self, **more: Any) -> dict[str, Any]:
        """What was computed: the one format of every result's ``description``."""
        return {
            **self.settings,
            "operator": self.steps.describe(),
            "seconds": self.steps.seconds,
            "stopped": self.stopped,
            "versions": versions(),
            **more,
        }


def key_data(key: jax.Array) -> list[int]:
    """A random key as JSON takes it."""
    return np.asarray(jax.random.key_data(key)).tolist()
