"""Long computations: replay the steps on disk, multiply, save, count, and end with a result.

Every long computation is a `Run` that drives one or more engines. It has a checkpoint, a progress
bar, a partial result if it is stopped, one format of description, and a plan that it shows when
memory is exhausted.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from hessdensity.errors import NonFiniteProductError, RunTerminated
from hessdensity.krylov.engine import Engine, multiply
from hessdensity.losses.composition import Composition
from hessdensity.operators.protocol import Operator, composition_of
from hessdensity.text import plural
from hessdensity.vectors import trees

from .failures import explained, terminable, undisturbed
from .memory import free_memory
from .plan import (
    LayoutsOf,
    MemoryLayout,
    Settings,
    activation_bytes,
    first_that_fits,
    plan_from_sizes,
)
from .progress import count, make_bar
from .steps import SavedSteps, versions

logger = logging.getLogger("hessdensity")

T = TypeVar("T")
E = TypeVar("E", bound=Engine)

_ENOUGH_STEPS = 10  # the first steps see little of the asymmetry


class Driver(Protocol):
    """What a computation needs to know of its `Run`, or of its place in one."""

    operator: Any
    """The operator, of which only ``like`` is used."""
    dimension: int
    """n, the number of entries of a vector."""
    num_matvecs: int
    """The number of products done so far."""
    asymmetry: float
    """How far the products are from symmetric."""
    stopped: str | None
    """The reason why the computation ended early, or None."""
    bar: Any
    """The progress bar."""

    def drive(self, engine: Engine) -> Iterator[None]:
        """Do the remaining steps of an engine, and yield after each of them."""

    def stop(self, reason: str) -> None:
        """Record why the computation ends early, and log it."""

    def describe(self, **more: Any) -> dict[str, Any]:
        """The ``description`` of the result."""


class Run:
    """A long computation.

    Args:
      operator: the operator that the computation multiplies.
      settings: the settings of the call.
      key: the random key of the call, if it has one.
      others: everything else that the steps depend on, in types that JSON can hold.
      checkpoint: the folder of its steps, or None.
      progress: whether to show a bar of products.
      vectors_per_product: number of vectors of a block that together make one product with all the
        data.
    """

    def __init__(
        self,
        operator: Operator,
        settings: Settings,
        *,
        key: jax.Array | None = None,
        others: Mapping[str, Any] | None = None,
        checkpoint: str | Path | None = None,
        progress: bool = True,
        vectors_per_product: int = 1,
    ) -> None:
        self.computation = settings.computation
        self.operator = operator
        self.dimension = trees.size(operator.like)
        self.identity = {"computation": self.computation, **settings.identity(), **(others or {})}
        if key is not None:
            self.identity["key"] = key_data(key)
        self.steps = SavedSteps(checkpoint, operator, self.identity, vectors_per_product)
        # This is asked now and not when memory is exhausted, because with several processes all of
        # them must ask.
        self.free = free_memory(operator.like)
        self.num_matvecs = 0
        """The number of products done so far, here and in earlier processes."""
        self.asymmetry = 0.0
        """How far the products are from symmetric, as a share of the operator's norm.

        0 for computations that do not measure it. See `hessdensity.krylov.lanczos.asymmetry`.
        """
        self._tolerated: float | None = None
        self.stopped: str | None = None
        """The reason why the computation ended early, or None."""
        self._settings = settings
        self._checkpoint = checkpoint
        self._vectors_per_product = vectors_per_product
        self.total: int | None = None
        """The number of products in all, if it is known before the computation."""
        self._progress = progress
        self.bar: Any = None
        """The progress bar, while the computation is under way."""

    def drive(self, engine: Engine) -> Iterator[None]:
        """Do the remaining steps of an engine, and yield after each of them.

        First, the steps on disk are replayed. Then the operator is multiplied, and each new step is
        saved.
        """
        while not engine.complete:
            if found := self.steps.take():
                step, products = found
                with undisturbed():
                    engine.replay(step)
                    self.count(products, read_back=True)
            else:
                with undisturbed():
                    block = engine.request()
                product = multiply(self.operator, block, engine.num_done)
                jax.block_until_ready(product)
                with undisturbed():
                    products = trees.count(block) // self._vectors_per_product
                    self.steps.add(engine.take(product), products)
                    self.count(products)
            self._watch(engine)
            yield

    def _watch(self, engine: Engine) -> None:
        """Take over the engine's measure of asymmetry, and warn once if it is not rounding."""
        self.asymmetry = max(self.asymmetry, getattr(engine, "asymmetry", 0.0))
        like = self.operator.like
        if self._tolerated is None:
            self._tolerated = Composition().tolerance(like)
        seen_enough = engine.complete or engine.num_done >= _ENOUGH_STEPS
        if not seen_enough or self.asymmetry <= self._tolerated:
            return
        # Only now, because it reads a batch and traces the loss.
        composition = composition_of(self.operator)
        self._tolerated = composition.tolerance(like)
        if self.asymmetry > self._tolerated:
            self._tolerated = math.inf
            logger.warning(
                "%s: the products are not symmetric. After %s, H - H^T has %.2g %% of the norm of "
                "H. %s The result is that of a symmetric matrix at about this distance from H. "
                "Examine the operator with hd.verify_operator(operator, key).",
                self.computation,
                plural(self.num_matvecs, "product"),
                100 * self.asymmetry,
                composition.explain(),
            )

    def count(self, products: int, *, read_back: bool = False) -> None:
        """Count products that are done."""
        self.num_matvecs += products
        count(self.bar, products, read_back=read_back)

    def execute(self, compute: Callable[[], Iterator[None]], answer: Callable[[], T]) -> T:
        """Exhaust ``compute()``, and return ``answer()`` even if the computation is interrupted.

        After Ctrl-C, the result is that of the steps done so far, and a warning is logged. A
        product that is not finite and SIGTERM raise an exception, with this result as ``partial``.

        Args:
          compute: does the steps, by `drive`, and yields after each of them.
          answer: returns the result of the steps done so far.
        """
        self.bar = make_bar(self.computation.replace("_", " "), self.total, self._progress)
        with (
            contextlib.closing(self.bar),
            self.steps.kept(),
            explained(self._plan, self._checkpoint),
            terminable(self._checkpoint),
        ):
            try:
                for _ in compute():
                    pass
                self.steps.check_data()
            except KeyboardInterrupt:
                if not self.num_matvecs:
                    raise
                self.stop(f"interrupted after {plural(self.num_matvecs, 'product')}")
            except NonFiniteProductError as error:
                error.partial = answer() if self.num_matvecs else None
                raise
            except RunTerminated as error:
                self.stopped = f"terminated after {plural(self.num_matvecs, 'product')}"
                # With several processes the others may be in another step, so that a result which
                # needs them all would never come.
                if self.num_matvecs and jax.process_count() == 1:
                    with contextlib.suppress(Exception):  # the program ends in any case
                        error.partial = answer()
                raise
        return answer()

    def execute_engine(self, make: Callable[[], E], answer: Callable[[E], T]) -> T:
        """`execute` with one engine. It is made inside, because it may exhaust the memory."""
        engines: list[E] = []

        def compute() -> Iterator[None]:
            engines.append(make())
            yield from self.drive(engines[0])

        return self.execute(compute, lambda: answer(engines[0]))

    def stop(self, reason: str) -> None:
        """Record why the computation ends early, and log it."""
        self.stopped = reason
        logger.warning(
            "%s: %s. The result is that of the products done so far.", self.computation, reason
        )

    def choose(self, layouts_of: LayoutsOf) -> MemoryLayout:
        """The first of some layouts that fits.

        Raises:
          MemoryError: none fits. The message shows the plan.
        """
        count = self._settings.num_vectors
        layout = first_that_fits(self.operator, layouts_of, count, self.free)
        if layout is None:
            activations = activation_bytes(self.operator, count)
            raise MemoryError(
                "the settings allow no way to keep the vectors that fits into the free memory.\n\n"
                f"{self._plan(activations)}"
            )
        return layout

    def _plan(self, activations: int | None = None) -> str:
        every = self._settings.everywhere()
        return str(plan_from_sizes(self.operator, every, self.free, activations))

    def describe(self, **more: Any) -> dict[str, Any]:
        """The ``description`` of the result, in the same format for all computations."""
        return {
            **self.identity,
            "operator": self.steps.describe(),
            "seconds": self.steps.seconds,
            "stopped": self.stopped,
            "versions": versions(),
            **more,
        }


def key_data(key: jax.Array) -> list[int]:
    """A random key, in types that JSON can hold."""
    return np.asarray(jax.random.key_data(key)).tolist()
