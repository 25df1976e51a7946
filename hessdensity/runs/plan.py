"""Plans of computations, made before anything runs: bytes, passes over the data and time.

An estimator describes the ways to keep its vectors as `MemoryLayout`, in order of preference. This
module plans and chooses for all estimators, and prints the table shown when memory is exhausted.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeAlias

import jax

from hessdensity.operators.protocol import Operator, check
from hessdensity.text import format_bytes, format_seconds, table
from hessdensity.vectors import trees

from .memory import Free, bytes_per_device

_NOTHING_FITS = (
    "Nothing fits into the free memory. Take fewer vectors, spread the weights over more devices, "
    "or free memory. Activations become smaller with smaller batches (microbatch=)."
)


@dataclass(frozen=True)
class MemoryLayout:
    """One way to keep the vectors of a computation."""

    basis: str
    """Where its basis is kept: ``"device"``, ``"host"`` or ``"none"``."""
    probes_at_once: int
    """The number of vectors that go through the data together."""
    num_passes: int
    """The largest number of passes over the data."""
    num_matvecs: int
    """The largest number of products."""
    device_bytes: int
    """The peak on a device, beside the weights: vectors, basis and activations."""
    host_bytes: int = 0
    """The peak on the host, for each of its devices."""

    def fits(self, free: Free) -> bool:
        """Whether this much memory is free, as far as that is known."""
        both = self.host_bytes if free.shared else 0
        on_device = free.device is None or self.device_bytes + both <= free.device
        return on_device and self.host_bytes <= free.host


LayoutsOf: TypeAlias = Callable[[int, int, int], Sequence[MemoryLayout]]
"""From (dimension n, bytes of a vector, bytes of a product's activations) to the layouts.

These are the ways to keep the vectors, in order of preference.
"""


@dataclass(frozen=True)
class Settings(ABC):
    """The settings of a computation. Every public call has a subclass that holds its defaults."""

    computation: ClassVar[str] = ""
    """The name of the public call."""
    hint: ClassVar[str] = ""
    """Other ways to need less memory, which the plan prints."""

    @property
    def num_vectors(self) -> int:
        """The number of vectors in a product."""
        return 1

    @abstractmethod
    def layouts(self, n: int, vector_bytes: int, activations: int) -> list[MemoryLayout]:
        """The ways to keep the vectors, in order of preference (`LayoutsOf`)."""

    def everywhere(self) -> Settings:
        """The same settings, with every place for the vectors allowed."""
        return self

    def identity(self) -> dict[str, Any]:
        """The settings that the steps depend on. A run can be resumed only with the same ones."""
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """The memory, products, passes and time that a computation will take with its settings.

    ``print(plan)`` shows a table. All bytes are those of one device, or of the host for each of its
    devices.
    """

    computation: str
    """The name of the public call."""
    dimension: int
    """n, the number of weights that form a vector."""
    num_devices: int
    """The number of devices over which a vector is spread."""
    weight_bytes: int | None
    """Memory of the weights, already in use, or None for an operator that does not tell."""
    vector_bytes: int
    """Memory of one vector."""
    activation_bytes: int | None
    """Memory of a product beside vectors and weights, or None if the operator does not tell."""
    free: Free
    """The free memory, beside the weights."""
    seconds: float | None
    """The time of one product with one vector, or None if it was not measured."""
    layouts: tuple[MemoryLayout, ...]
    """The layouts, starting with the fastest."""
    hint: str = ""
    """Other ways to need less memory."""

    @property
    def fitting(self) -> MemoryLayout | None:
        """The first layout that fits, or None."""
        return _first_fitting(self.layouts, self.free)

    @property
    def chosen(self) -> MemoryLayout:
        """The first layout that fits.

        Raises:
          MemoryError: none fits. The message shows the plan.
        """
        if self.fitting is None:
            raise MemoryError(f"nothing fits.\n\n{self}")
        return self.fitting

    def __str__(self) -> str:
        name = self.computation.replace("_", " ")
        spread = f", spread over {self.num_devices} devices" if self.num_devices > 1 else ""
        sizes = {
            "weights": self.weight_bytes,
            "a vector": self.vector_bytes,
            "activations": self.activation_bytes,
        }
        listed = ", ".join(
            f"{part} {format_bytes(size)}" for part, size in sizes.items() if size is not None
        )
        free = "unknown" if self.free.device is None else format_bytes(self.free.device)
        lines = [
            f"Plan of a {name}: {self.dimension:,} weights{spread}",
            f"  on each device   {listed}; free {free}, and {format_bytes(self.free.host)} on the "
            "host",
        ]
        if self.seconds is not None:
            products = max(layout.num_matvecs for layout in self.layouts)
            whole = format_seconds(self.seconds * products)
            each = format_seconds(self.seconds)
            lines.append(f"  time             a product {each}, the run {whole} at most")
        return "\n".join([*lines, "", *self._rows(), *self._remarks()])

    def _rows(self) -> list[str]:
        rows: list[tuple[str, ...]] = [
            ("basis", "at once", "products", "passes", "on a device", "on the host", "")
        ]
        for layout in self.layouts:
            fits = layout.fits(self.free)
            verdict = "fits" if fits else "does not fit"
            verdict += ", chosen" if layout is self.fitting else ""
            counts = (layout.probes_at_once, layout.num_matvecs, layout.num_passes)
            sizes = (format_bytes(layout.device_bytes), format_bytes(layout.host_bytes))
            rows.append((layout.basis, *map(str, counts), *sizes, verdict))
        return table(rows, left={0, 6})

    def _remarks(self) -> list[str]:
        remarks = []
        if self.fitting is None:
            remarks.append(f"  {_NOTHING_FITS}")
        if len({layout.probes_at_once for layout in self.layouts}) > 1:
            remarks.append(
                "  Probes that run together share the passes over the data.\n"
                "  If they run one after the other, they share the memory of one basis."
            )
        if any(layout.basis == "none" for layout in self.layouts):
            remarks.append("  Without a basis the same number of products finds fewer outliers.")
        if self.hint:
            remarks.append(f"  {self.hint}")
        return remarks


def plan_from_sizes(
    operator: Operator,
    settings: Settings,
    free: Free,
    activations: int | None = None,
    seconds: float | None = None,
) -> Plan:
    """The plan from these figures. It multiplies nothing, because memory may be exhausted."""
    n = check(operator)
    like = trees.abstract(operator.like)
    weights = getattr(operator, "params", None)
    shardings = [leaf.sharding for leaf in jax.tree.leaves(like) if leaf.sharding]
    vector_bytes = bytes_per_device(like)
    return Plan(
        computation=settings.computation,
        dimension=n,
        num_devices=max((len(sharding.device_set) for sharding in shardings), default=1),
        weight_bytes=None if weights is None else bytes_per_device(weights),
        vector_bytes=vector_bytes,
        activation_bytes=activations,
        free=free,
        seconds=seconds,
        layouts=tuple(settings.layouts(n, vector_bytes, activations or 0)),
        hint=settings.hint,
    )


def first_that_fits(
    operator: Operator, layouts_of: LayoutsOf, num_vectors: int, free: Free
) -> MemoryLayout | None:
    """The first layout that fits, or None.

    The activations are measured only if the choice depends on them, because that costs a
    compilation.

    Args:
      operator: the operator.
      layouts_of: returns the layouts.
      num_vectors: number of vectors in a product, which determines its activations.
      free: the free memory.
    """
    n = check(operator)
    vector_bytes = bytes_per_device(operator.like)
    first, *_ = layouts_of(n, vector_bytes, 0)
    if first.fits(free) and (free.device is None or first.device_bytes < free.device / 4):
        return first
    measured = layouts_of(n, vector_bytes, activation_bytes(operator, num_vectors) or 0)
    return _first_fitting(measured, free)


def _first_fitting(layouts: Sequence[MemoryLayout], free: Free) -> MemoryLayout | None:
    return next((layout for layout in layouts if layout.fits(free)), None)


def activation_bytes(operator: Operator, num_vectors: int) -> int | None:
    """Memory of a product beside vectors and weights, or None if the operator cannot tell."""
    measure = getattr(operator, "temporary_bytes", None)
    return None if measure is None else int(measure(num_vectors))


def time_product(operator: Operator) -> float:
    """Seconds of a product with one vector. Of two, the second counts: the first may compile."""
    block = jax.tree.map(lambda leaf: leaf + 1, trees.zeros(operator.like, 1))
    seconds = math.inf
    for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(operator @ block)
        seconds = time.perf_counter() - start
    return seconds
